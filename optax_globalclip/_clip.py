"""The clip: scaling a tree down to a norm, and what to do if that is not finite."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _cpu
from ._checks import NonFinite, Numeric, as_norm, as_ord, as_scalar, check_nonfinite
from ._mesh import either, factor_of, has_mesh, zero_if
from ._norm import GlobalNorm, divide, measure
from ._tree import AxisName, split_updates, values_of, wide, with_values


class Clip(NamedTuple):
    """What one clip found and did; scalars.

    Attributes:
      norm: the global norm before the clip.
      threshold: what the norm was clipped to; inf if nothing can be.
      scale: what the leaves were multiplied by; 1 if they were returned as they are.
      clipped: bool, whether the norm was finite and above the threshold.
      finite: bool, whether every entry was finite.
    """

    norm: jax.Array
    threshold: jax.Array
    scale: jax.Array
    clipped: jax.Array
    finite: jax.Array


def clip_updates(
    updates: optax.Updates,
    max_norm: Numeric | None,
    *,
    use_norm: Numeric | None = None,
    ord: float | None = None,
    nonfinite: NonFinite = "nan",
    axis_name: AxisName = None,
) -> tuple[optax.Updates, jax.Array]:
    r"""Scales a tree of updates down to a global norm of at most ``max_norm``.

    .. math:: g_i \leftarrow g_i \cdot \min(1, \text{max\_norm} / \lVert g \rVert)

    This is ``tf.clip_by_global_norm`` over pytrees.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
      >>> clipped, norm = optax_globalclip.clip_updates(grads, 1.0)
      >>> print(clipped["w"], clipped["b"], norm)
      [0.6 0. ] [0.8] 5.0

    Args:
      updates: a tree of float or complex arrays of any shapes, NumPy arrays, Python
        scalars, or BCOO and BCSR matrices, whose values at one index count as their
        sum unless ``unique_indices`` is set.
      max_norm: the largest global norm to let through, a real scalar; ``None`` to
        measure and never clip.
      use_norm: a scalar to take as the global norm of ``updates``, unchecked; inf if it
        is too large for the norm's dtype. Nothing is measured then, and ``nonfinite``
        looks at it only.
      ord: the order of the norm, static: a number of at least 1 or ``inf``; None for
        the 2-norm.
      nonfinite: what becomes of the updates if an entry (or ``use_norm``, if given) is
        inf or NaN: ``"nan"`` makes every entry NaN, ``"zero"`` makes every entry 0,
        ``"error"`` adds a ``checkify`` check and does as ``"nan"``.
      axis_name: as for :func:`global_norm`.

    Returns:
      The clipped tree, and the global norm before the clip (or ``use_norm``), a
      float32 scalar; float64 if any leaf is float64 or complex128.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path; for a
        ``max_norm`` or ``use_norm`` that is no real number; for an array as ``ord``.
      ValueError: if ``max_norm`` or ``use_norm`` is negative or not a scalar, if
        ``max_norm`` is NaN, or if ``ord`` is less than 1 (numbers of Python and NumPy
        only: the value of a JAX array is never read); if ``nonfinite`` is unknown, or
        not ``"nan"`` while ``max_norm`` is None.

    Edge cases:

    ======================== ===================================================
    case                     result
    ======================== ===================================================
    norm 0                   zeros; gradient 1
    inf or NaN in an entry   as ``nonfinite`` says, unless ``max_norm`` is None
    ``max_norm=0``           zeros
    ``max_norm=inf``         never clips
    negative ``max_norm``    ValueError; 0 if it is a JAX array
    NaN ``max_norm``         ValueError; NaN in every entry if it is a JAX array
    ``max_norm=None``        the updates as they are, non-finite ones too
    ======================== ===================================================

    Formal guarantees:

    * If the norm is at most ``max_norm``, every leaf is returned bit for bit.
    * Otherwise each is multiplied in at least float32 and rounded once. The norm of the
      result is at most ``max_norm`` to within a few units of the leaves' precision, for
      finite entries within the reach of :func:`global_norm`, even if the norm itself
      overflows. (Results below 2e-37 may become 0. Results below 6e-5 in float16 are
      subnormal, and less precise.)
    * Structure, shapes, dtypes and shardings stay. ``None``, ``MaskedNode`` and
      float0 leaves are passed through.

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://proceedings.mlr.press/v28/pascanu13.html>`_, 2013;
      `tf.clip_by_global_norm
      <https://www.tensorflow.org/api_docs/python/tf/clip_by_global_norm>`_
    """
    check_nonfinite(nonfinite, max_norm)
    threshold = None if max_norm is None else as_scalar("max_norm", max_norm)
    order = as_ord(ord)
    norm = as_norm(use_norm)
    leaves, join = split_updates(updates, axis_name)
    arrays, clip = _clip_updates(leaves, norm, threshold, order, nonfinite)
    check_finite(clip, nonfinite)
    return join(arrays), clip.norm


# One call outside ``jit``.
@functools.partial(jax.jit, static_argnames=("ord", "nonfinite"))
def _clip_updates(leaves, norm, threshold, ord, nonfinite):
    norm = measure(leaves, ord, norm)
    return clip_leaves(leaves, norm, threshold, nonfinite)


def clip_leaves(leaves, norm, threshold, nonfinite) -> tuple[list[Any], Clip]:
    """Scales the leaves so that their norm is at most the threshold.

    Judges in the precision of ``norm.norm``; scales in that of ``norm.value``.
    """
    found, finite = norm.norm, jnp.isfinite(norm.value)
    arrays = [leaf.array for leaf in leaves]
    if threshold is None:
        none, one = jnp.full_like(found, math.inf), jnp.ones_like(found)
        return arrays, Clip(found, none, one, jnp.zeros_like(finite), finite)
    threshold = jnp.maximum(jnp.asarray(threshold, found.dtype), 0)
    within = finite & (found <= threshold)
    zero = ~finite if nonfinite == "zero" else None
    limit = threshold.astype(norm.value.dtype)
    norm = norm._replace(norm=found.astype(limit.dtype))
    with jax.named_scope("clip_by_global_norm"):
        values = _scaled([*map(values_of, arrays)], limit, norm, within, zero)
    shift, scale = _factors(limit, norm, within)
    # Raised to the smallest normal float, unless every entry becomes 0.
    least = jnp.where(limit > 0, float(jnp.finfo(jnp.float32).tiny), 0)
    scale = jnp.maximum(shift * scale, least.astype(scale.dtype))
    scale = scale if zero is None else jnp.where(zero, 0, scale)
    clip = Clip(found, threshold, scale, finite & ~within, finite)
    return list(map(with_values, arrays, values)), clip


def check_finite(clip: Clip, nonfinite: NonFinite) -> None:
    """Under the policy "error", adds a checkify check that all entries are finite."""
    if nonfinite == "error":
        from jax.experimental import checkify

        checkify.check(
            clip.finite,
            "The updates have the global norm {norm}: an entry is inf or NaN. "
            "optax_globalclip.leaf_norms tells which leaf it is in.",
            norm=clip.norm,
        )


@jax.custom_jvp
def _scaled(values, threshold, norm, within, zero):
    """The values if ``within``, zeros if ``zero``, else times ``threshold / norm``.

    Multiplied in at least float32, and rounded once to the dtype of the values.
    """
    return _products(values, *_factors(threshold, norm, within), within, zero)


@_scaled.defjvp
def _scaled_jvp(primals, tangents):
    """With s = threshold/norm: s ẋ + x/norm · (threshold˙ - s norm˙)."""
    values, threshold, norm, within, zero = primals
    dots, threshold_dot, norm_dot, _, _ = tangents
    fixed = within if zero is None else within | zero
    norm = GlobalNorm(norm.norm, *(jnp.where(fixed, 1, x) for x in norm[1:]))
    shift, scale = _factors(threshold, norm, within)
    # Not by the product of the factors, which may be subnormal.
    slope = threshold_dot - norm_dot.norm * shift * scale
    slope = jnp.where(fixed, 0, slope)

    def tangent(x: jax.Array, dot: jax.Array) -> jax.Array:
        to = wide(x, scale.dtype)
        if zero is not None:
            x, dot = zero_if(zero, x), zero_if(zero, dot)
        factors = (factor_of(x, f.astype(to)) for f in (shift, scale, slope))
        shift_, scale_, slope_ = factors
        turned = divide(x.astype(to), norm) * slope_
        return (dot.astype(to) * shift_ * scale_ + turned).astype(x.dtype)

    return _scaled(*primals), list(map(tangent, values, dots))


def _factors(threshold, norm, within):
    """``threshold / norm`` as a product of two normal floats; both 1 if ``within``.

    The first is 1, unless the quotient is subnormal, or nearly so, which would be
    imprecise on GPU and zero elsewhere.
    """
    # A threshold of inf would make the derivative NaN.
    limit, fixed = jnp.where(within, 0, threshold), jax.lax.stop_gradient(norm)
    dtype = limit.dtype
    step = 2.0 ** (int(jnp.finfo(dtype).maxexp) - 4)
    small = limit * (step / fixed.unit) < fixed.value
    # In units in which neither the threshold nor the norm leaves its range.
    unit = jnp.where(small, fixed.unit, 1)
    in_unit = GlobalNorm(norm.norm * (1 / unit), fixed.value, fixed.unit / unit)
    scale = divide(limit * jnp.where(small, step / unit, 1), in_unit)
    # NaN if the threshold is, or the norm not finite.
    scale = scale + 0 * jax.lax.stop_gradient(fixed.value + limit)
    shift = either(small & ~within, 1 / step, 1, dtype)
    return shift, jnp.where(within, 1, scale)


def _products(values, *factors):
    """The product of each value, as suits the platform."""

    def products(values, *factors):
        return [_product(value, *factors) for value in values]

    def on_cpu(values, shift, scale, _, zero):
        factors = *_cpu.factors(shift, scale), zero
        can = functools.partial(_cpu.can_multiply, scale=scale)
        return [(_cpu.product if can(x) else _product)(x, *factors) for x in values]

    if any(map(has_mesh, values)):
        return products(values, *factors)
    return jax.lax.platform_dependent(values, *factors, cpu=on_cpu, default=products)


# Traced once for leaves of one type.
@jax.jit
def _product(value, shift, scale, kept, zero):
    """The value if ``kept``, zeros if ``zero``, else times both factors."""
    to = wide(value, scale.dtype)
    shift_, scale_ = (factor_of(value, factor.astype(to)) for factor in (shift, scale))
    product = (value.astype(to) * shift_ * scale_).astype(value.dtype)
    # Selected, not multiplied by 1 or by 0: the first makes subnormal entries zero on
    # CPU and TPU, the second leaves NaN entries NaN.
    product = jax.lax.select(kept, value, product)
    return product if zero is None else zero_if(zero, product)
