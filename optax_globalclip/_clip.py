"""The clip: scaling a tree down to a norm, and what to do if that is not finite."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _cpu
from ._checks import NonFinite, Numeric, Scalar, as_ord, as_scalar, check_nonfinite
from ._errors import explained
from ._mesh import factor_of, has_mesh, is_marked
from ._norm import GlobalNorm, divide, formula_of, found, measure
from ._range import wide
from ._tree import (
    AxisName,
    Leaf,
    accumulator_dtype,
    split_updates,
    values_of,
    with_values,
)


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


@explained()
def clip_updates(
    updates: optax.Updates,
    max_norm: Numeric | None,
    *,
    use_norm: Numeric | None = None,
    ord: Numeric = 2,
    nonfinite: NonFinite = "nan",
    axis_name: AxisName = None,
) -> tuple[optax.Updates, jax.Array]:
    r"""Scales a tree of updates down to a global norm of at most ``max_norm``.

    .. math:: g_i \leftarrow g_i \cdot \min(1, \text{max\_norm} / \lVert g \rVert)

    This is ``tf.clip_by_global_norm`` over pytrees.

    Formal guarantees:

    * Where the norm is at most ``max_norm``, every leaf is returned bit for bit.
    * Elsewhere each is multiplied in at least float32 and rounded once, so that the
      norm of the result is at most ``max_norm`` to within a few units of the leaves'
      precision. This holds for any finite entries, even where the norm itself is
      more than a float32 can hold. (Results below 2e-37 may become 0, and a norm below
      2e-38 may count as 0. Results below 6e-5 in float16 are subnormal, and less
      precise.)
    * Structure, shapes, dtypes and shardings stay. ``None``, ``MaskedNode`` and
      float0 leaves are passed through.

    ======================== ===================================================
    case                     result
    ======================== ===================================================
    norm 0                   the zeros that came in, unless ``max_norm`` is NaN
    inf or NaN in an entry   as ``nonfinite`` says, unless ``max_norm`` is None
    ``max_norm=0``           zeros
    ``max_norm=inf``         never clips
    negative ``max_norm``    ValueError; 0 if it is a JAX array
    NaN ``max_norm``         ValueError; NaN in every entry if it is a JAX array
    ``max_norm=None``        the updates as they are, non-finite ones too
    ======================== ===================================================

    Args:
      updates: a tree of float or complex arrays of any shapes, NumPy arrays, Python
        scalars, or BCOO and BCSR matrices, whose values at one index count as their
        sum unless ``unique_indices`` is set.
      max_norm: the largest global norm to let through, a real scalar; ``None`` to
        measure and never clip.
      use_norm: a scalar to take as the global norm of ``updates``, trusted as
        given; inf if it is too large for the norm's dtype. Nothing is measured then.
      ord: the order of the norm, a real number of at least 1 or ``inf``.
      nonfinite: what becomes of the updates where an entry, or ``use_norm`` if it is
        given, is inf or NaN: ``"nan"`` makes every entry NaN, ``"zero"`` makes every
        entry 0, ``"error"`` adds a ``checkify`` check and does as ``"nan"``.
      axis_name: as for :func:`global_norm`.

    Returns:
      The clipped tree, and the global norm before the clip (or ``use_norm``), a
      float32 scalar; float64 if any leaf is float64 or complex128.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path; for
        a ``max_norm`` or ``use_norm`` that is no real number.
      ValueError: if ``max_norm`` or ``use_norm`` is negative or not a scalar, if
        ``max_norm`` is NaN, or if ``ord`` is less than 1 (numbers of Python and NumPy
        only: the value of a JAX array is never read); if ``nonfinite`` is unknown, or
        not ``"nan"`` while ``max_norm`` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
      >>> clipped, norm = optax_globalclip.clip_updates(grads, 1.0)
      >>> print(clipped["w"], clipped["b"], norm)
      [0.6 0. ] [0.8] 5.0

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://proceedings.mlr.press/v28/pascanu13.html>`_, 2013;
      `tf.clip_by_global_norm
      <https://www.tensorflow.org/api_docs/python/tf/clip_by_global_norm>`_
    """
    check_nonfinite(nonfinite, max_norm)
    threshold = None if max_norm is None else as_scalar("max_norm", max_norm)
    order = as_ord(ord)
    leaves, join = split_updates(updates, axis_name)
    arrays, clip = _clip_updates(
        leaves,
        norm_given(leaves, use_norm, order),
        threshold,
        formula_of(order),
        nonfinite,
    )
    check_finite(clip, nonfinite)
    return join(arrays), clip.norm


# One call outside ``jit``.
@functools.partial(jax.jit, static_argnames="nonfinite")
def _clip_updates(leaves, norm, threshold, formula, nonfinite):
    norm = measure(leaves, formula) if norm is None else norm
    return clip_leaves(leaves, norm, threshold, nonfinite)


def norm_given(leaves: Sequence[Leaf], use_norm: Any, ord: Scalar) -> GlobalNorm | None:
    """The norm that the user or a transformation around has given, if one has."""
    if use_norm is None:
        return found(leaves, ord)
    use_norm = as_scalar("use_norm", use_norm, nan_allowed=True)
    return GlobalNorm.given(
        use_norm, accumulator_dtype([leaf.array for leaf in leaves])
    )


def clip_leaves(
    leaves: Sequence[Leaf],
    norm: GlobalNorm,
    threshold: Scalar | None,
    nonfinite: NonFinite,
) -> tuple[list[Any], Clip]:
    """Scales the leaves so that their norm is at most the threshold."""
    arrays = [leaf.array for leaf in leaves]
    if threshold is None:
        return arrays, _unclipped(norm)
    values, clip = _clip(list(map(values_of, arrays)), norm, threshold, nonfinite)
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


@jax.jit
def _unclipped(norm: GlobalNorm) -> Clip:
    finite = jnp.isfinite(norm.value)
    return Clip(
        norm.norm,
        threshold=jnp.full_like(norm.norm, math.inf),
        scale=jnp.ones_like(norm.norm),
        clipped=jnp.zeros_like(finite),
        finite=finite,
    )


@functools.partial(jax.jit, static_argnames="nonfinite")
def _clip(values, norm, threshold, nonfinite):
    """Judges in the precision of ``norm.norm``; scales in that of ``norm.value``."""
    threshold = jnp.maximum(jnp.asarray(threshold, norm.norm.dtype), 0)
    finite = jnp.isfinite(norm.value)
    within = finite & (norm.norm <= threshold)
    zero = ~finite if nonfinite == "zero" else None
    clip_to = threshold.astype(norm.value.dtype)
    with jax.named_scope("clip_by_global_norm"):
        values, shift, scale = _scaled(values, clip_to, norm, within, zero)
    return values, Clip(
        norm.norm,
        threshold,
        _reported(shift * scale, threshold, zero),
        finite & ~within,
        finite,
    )


def _reported(
    scale: jax.Array, threshold: jax.Array, zero: jax.Array | None
) -> jax.Array:
    """The scale, raised to the smallest normal float unless the result is 0."""
    least = jnp.where(threshold > 0, float(jnp.finfo(jnp.float32).tiny), 0)
    scale = jnp.maximum(scale, least.astype(scale.dtype))
    return scale if zero is None else jnp.where(zero, 0, scale)


@jax.custom_jvp
def _scaled(
    values: list[jax.Array],
    threshold: jax.Array,
    norm: GlobalNorm,
    within: jax.Array,
    zero: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The values if ``within``, zeros if ``zero``, else times ``threshold / norm``.

    Multiplied in at least float32, and rounded once to the dtype of the values.

    Returns:
      The results, and the two factors whose product is ``threshold / norm``.
    """
    shift, scale = _factors(threshold, norm, within)
    return _products(values, shift, scale, zero), shift, scale


@_scaled.defjvp
def _scaled_jvp(primals, tangents):
    """With s = threshold/norm: s ẋ + x/norm · (threshold˙ - s norm˙)."""
    values, _, norm, within, zero = primals
    dots, threshold_dot, norm_dot, _, _ = tangents
    scaled, shift, scale = _scaled(*primals)
    # Where updates stay as they are, or become 0, so do their factors.
    fixed = within if zero is None else within | zero
    norm = GlobalNorm(
        norm.norm.astype(scale.dtype), *(jnp.where(fixed, 1, x) for x in norm[1:])
    )
    threshold_dot, norm_dot, *factors = (
        jnp.where(fixed, 0, x.astype(scale.dtype))
        for x in (threshold_dot, norm_dot.norm, shift, scale)
    )
    # Not the product of the factors, which may be subnormal.
    moved = threshold_dot - norm_dot * factors[0] * factors[1]
    slope = divide(moved, norm) / jax.lax.stop_gradient(shift)
    kept_scale = scale if zero is None else jnp.where(zero, 0, scale)

    def tangent(x: jax.Array, dot: jax.Array) -> jax.Array:
        to = wide(x, scale.dtype)
        factors = (factor_of(x, f.astype(to)) for f in (shift, kept_scale, moved))
        shift_, scale_, moved_ = factors
        if zero is not None:
            x, dot = jnp.where(zero, 0, x), jnp.where(zero, 0, dot)
        turned = divide(x.astype(to), norm) * moved_
        return (dot.astype(to) * shift_ * scale_ + turned).astype(x.dtype)

    dots = list(map(tangent, values, dots))
    return (scaled, shift, scale), (dots, jnp.zeros_like(shift), slope)


def _factors(
    threshold: jax.Array, norm: GlobalNorm, within: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``threshold / norm`` as a product of two floats, both 1 if ``within``.

    The first is 1, unless the quotient is subnormal, which would be imprecise on GPU
    and zero elsewhere. Both end in a division, because XLA on CPU would compute cheaper
    factors again in the kernel of every leaf.
    """
    finite = jnp.isfinite(norm.value)
    value = jnp.where(within, 1, jnp.where(finite, norm.value, math.nan))
    unit = jnp.where(within, 1, norm.unit)
    # Every NaN as the canonical one, because ``_cpu.product`` rounds its bits.
    threshold = jnp.where(jnp.isnan(threshold), math.nan, threshold)
    threshold = jnp.where(within, 1, threshold)
    tiny = float(jnp.finfo(threshold.dtype).tiny)
    # Above ``tiny``, so that the second factor cannot be 1, which means "keep".
    least = 4 * tiny
    whole = value * unit
    too_large = finite & (whole == math.inf)
    dividend = jnp.where(too_large, threshold * (1 / unit), threshold)
    divisor = jnp.where(too_large, value, whole)
    split = (dividend / divisor < tiny) & (threshold > 0)
    dividend = jnp.where(split, threshold, dividend)
    divisor = jnp.where(split, value * (unit * least), divisor)
    shift = 1 / jnp.where(split, 1 / least, 1).astype(threshold.dtype)
    return shift, dividend / divisor


def kept_or_zero(values: list[jax.Array], keep: jax.Array) -> list[jax.Array]:
    """The values if ``keep``, else zeros."""
    one = jnp.ones((), accumulator_dtype(values))
    return _products(values, one, one, ~keep)


def _products(values, *factors):
    """The product of each value, as suits the platform."""

    def product_on_cpu(value, shift, scale, zero):
        if _cpu.can_multiply(value, scale):
            return _cpu.product(value, shift, scale, zero)
        return _product(value, shift, scale, zero, by_entry=False)

    def each(product):
        return lambda values, *factors: [product(x, *factors) for x in values]

    if any(map(has_mesh, values)):
        return each(_product)(values, *factors)
    return jax.lax.platform_dependent(
        values, *factors, cpu=each(product_on_cpu), default=each(_product)
    )


# Traced once for leaves of one type.
@functools.partial(jax.jit, static_argnames="by_entry")
def _product(value, shift, scale, zero, by_entry=True):
    """The value if ``scale`` is 1, zeros if ``zero``, else times both factors."""
    to = wide(value, scale.dtype)
    shift_, scale_ = (factor_of(value, factor.astype(to)) for factor in (shift, scale))
    entries = value.astype(to)
    product = (entries * shift_ * scale_).astype(value.dtype)
    # Selected, not multiplied by 1 or by 0: the first makes subnormal entries zero on
    # CPU and TPU, the second leaves NaN entries NaN.
    kept = scale == 1
    if by_entry and not is_marked(value) and not jnp.iscomplexobj(value):
        # Found for each entry. A scalar would be one more operand of each kernel, which
        # costs cycles on a TPU (benchmarks/README.md). NaN stays NaN in any case.
        kept = jnp.where(jnp.isnan(entries), 1, scale) == 1
    product = jax.lax.select(kept, value, product)
    return product if zero is None else jnp.where(zero, 0, product)
