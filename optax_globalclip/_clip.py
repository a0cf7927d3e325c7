"""Scaling a tree down to a norm, and what to do where that is not finite."""

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import checkify

from ._axis_name import AxisName, leaf_axes
from ._l2 import ScaledNorm
from ._leaves import accumulator_dtype, split_leaves, values_of, with_values
from ._mesh import Axes
from ._norm import StaticOrd, as_ord, measure
from ._scale import scale_factors, scaled

NonFinite = Literal["nan", "zero", "error"]


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
    max_norm: chex.Numeric | None,
    *,
    use_norm: chex.Numeric | None = None,
    ord: chex.Numeric = 2,
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
      more than a float32 can hold. (Results below 6e-5 in float16 are subnormal,
      and less precise.)
    * Structure, shapes, dtypes and shardings stay. ``None``, ``MaskedNode`` and
      float0 leaves are passed through.

    ======================== ===================================================
    case                     result
    ======================== ===================================================
    norm 0                   the zeros that came in, whatever ``max_norm``
    inf or NaN in an entry   as ``nonfinite`` says, whatever ``max_norm``
    ``max_norm=0``           zeros
    ``max_norm=inf``         never clips
    negative ``max_norm``    ValueError if concrete, taken as 0 if traced
    NaN ``max_norm``         ValueError if concrete, NaN in every entry if traced
    ``max_norm=None``        the updates as they are, non-finite ones too
    ======================== ===================================================

    Args:
      updates: a tree of float or complex arrays of any shapes, NumPy arrays, Python
        scalars, or BCOO and BCSR matrices, whose values at one index count as their
        sum unless ``unique_indices`` is set.
      max_norm: the largest global norm to let through, a real scalar; ``None`` to
        measure and never clip.
      use_norm: a scalar to take as the global norm of ``updates``, trusted as
        given. Nothing is measured then.
      ord: the order of the norm, a real number of at least 1 or ``inf``.
      nonfinite: what becomes of the updates where an entry or ``use_norm`` is inf
        or NaN: ``"nan"`` makes every entry NaN, ``"zero"`` makes every entry 0,
        ``"error"`` adds a ``checkify`` check and otherwise does as ``"nan"``.
      axis_name: as for :func:`global_norm`.

    Returns:
      The clipped tree, and the global norm before the clip (or ``use_norm``), a
      float32 scalar; float64 if any leaf is float64 or complex128.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path; for
        a ``max_norm`` or ``use_norm`` that is no real number.
      ValueError: for a concrete ``max_norm`` or ``use_norm`` that is negative, a
        ``max_norm`` that is NaN, one that is not a scalar, an ``ord`` less than 1,
        an unknown ``nonfinite``.

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
    check_nonfinite(nonfinite)
    check_scalar("max_norm", max_norm)
    check_scalar("use_norm", use_norm, nan_allowed=True)
    leaves, join = split_leaves(updates)
    axes = leaf_axes(leaves, updates, axis_name)
    leaves, clip = _clip_updates(
        leaves, max_norm, use_norm, as_ord(ord), nonfinite, axes
    )
    check_finite(clip, nonfinite)
    return join(leaves), clip.norm


@functools.partial(jax.jit, static_argnames=("nonfinite", "axes"))
def _clip_updates(leaves, max_norm, use_norm, ord, nonfinite, axes):
    norm = norm_of(leaves, use_norm, ord, axes)
    return clip_leaves(leaves, norm, max_norm, nonfinite)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("leaves", "norm", "ord"),
    meta_fields=("axes",),
)
@dataclasses.dataclass(frozen=True)
class Measured:
    """A norm, as ``use_norm``, for whoever asks for the norm of the same leaves.

    One transformation hands it to those inside it, which may have changed the
    updates before they reach one that asks.
    """

    leaves: Sequence[jax.Array]
    norm: ScaledNorm
    ord: StaticOrd | jax.Array
    axes: tuple[Axes, ...]

    def norm_of(
        self,
        leaves: Sequence[jax.Array],
        ord: StaticOrd | jax.Array,
        axes: tuple[Axes, ...],
    ) -> ScaledNorm | None:
        """The norm, if it is that of the very same arrays; else None."""
        same = len(leaves) == len(self.leaves) and axes == self.axes
        same = same and isinstance(ord, StaticOrd) and ord == self.ord
        return (
            self.norm if same and all(map(operator.is_, leaves, self.leaves)) else None
        )


UseNorm = chex.Numeric | Measured | None


def norm_given(
    use_norm: UseNorm,
    leaves: Sequence[jax.Array],
    ord: StaticOrd | jax.Array,
    axes: tuple[Axes, ...],
) -> chex.Numeric | ScaledNorm | None:
    """The norm that ``use_norm`` holds for these leaves, None if they are others."""
    if isinstance(use_norm, Measured):
        return use_norm.norm_of(leaves, ord, axes)
    check_scalar("use_norm", use_norm, nan_allowed=True)
    return use_norm


def norm_of(
    leaves: Sequence[jax.Array],
    use_norm: chex.Numeric | ScaledNorm | None,
    ord: StaticOrd | jax.Array,
    axes: tuple[Axes, ...],
) -> ScaledNorm:
    """The norm given, or else the norm measured."""
    if use_norm is None:
        return measure(leaves, ord, axes)
    if isinstance(use_norm, ScaledNorm):
        return use_norm
    dtype = accumulator_dtype(leaves)
    return ScaledNorm(jnp.asarray(use_norm, dtype), jnp.ones((), dtype))


def clip_leaves(
    leaves: Sequence[jax.Array],
    norm: ScaledNorm,
    max_norm: chex.Numeric | None,
    nonfinite: NonFinite,
) -> tuple[list[jax.Array], Clip]:
    """Scales the leaves so that their norm is at most ``max_norm``."""
    measured = norm.as_float()
    finite = jnp.isfinite(norm.value)
    if max_norm is None:
        return list(leaves), Clip(
            measured,
            threshold=jnp.full_like(measured, math.inf),
            scale=jnp.ones_like(measured),
            clipped=jnp.zeros_like(finite),
            finite=finite,
        )

    threshold = jnp.maximum(jnp.asarray(max_norm, measured.dtype), 0)
    within = finite & (measured <= threshold)
    value = jnp.where(within, 1, jnp.where(finite, norm.value, math.nan))
    norm = ScaledNorm(value, jnp.where(within, 1, norm.unit))
    factors = scale_factors(jnp.where(within, 1, threshold), norm)
    zero = ~finite if nonfinite == "zero" else None
    scale = factors[0] * factors[1]
    if zero is not None:
        scale = jnp.where(zero, 0, scale)
    clip = Clip(measured, threshold, scale, finite & ~within, finite)
    values = scaled(list(map(values_of, leaves)), factors, within, zero)
    return list(map(with_values, leaves, values)), clip


def check_scalar(
    name: str, value: jax.typing.ArrayLike | None, *, nan_allowed: bool = False
) -> None:
    """Raises if ``value`` is no real scalar, or concrete and not a norm."""
    if value is None:
        return
    real = isinstance(value, numbers.Real | np.ndarray | jax.Array)
    if not real or jnp.iscomplexobj(value):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}. Pass a real number or a "
            "scalar array."
        )
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name} has shape {jnp.shape(value)}, but it is one number for the whole "
            "tree. Pass a scalar, of shape ()."
        )
    if isinstance(value, Tracer):
        return
    if value < 0 or (math.isnan(value) and not nan_allowed):
        raise ValueError(
            f"{name}={value}: a norm is at least 0. Pass a number of at least 0, or "
            "math.inf never to clip."
        )


def check_number(
    name: str, value: float, fits: Callable[[float], bool], what: str
) -> None:
    """Raises if ``value`` is no real number that ``fits``, which is to be ``what``."""
    if not isinstance(value, numbers.Real) or not fits(value):
        raise ValueError(f"{name}={value!r}: pass {what}.")


def check_count(name: str, value: int, at_least: int, otherwise: str = "") -> None:
    """Raises if ``value`` is no integer of at least so much."""
    check_number(
        name,
        value,
        lambda value: isinstance(value, numbers.Integral) and value >= at_least,
        f"an integer of at least {at_least}{otherwise}",
    )


def check_nonfinite(nonfinite: NonFinite) -> None:
    """Raises if there is no such policy."""
    if nonfinite not in get_args(NonFinite):
        raise ValueError(
            f"nonfinite={nonfinite!r}: it is one of {', '.join(get_args(NonFinite))}."
        )


def check_finite(clip: Clip, nonfinite: NonFinite) -> None:
    """Under the policy "error", adds a checkify check that all entries are finite."""
    if nonfinite == "error":
        checkify.check(
            clip.finite,
            "The updates have the global norm {norm}: an entry is inf or NaN. "
            "optax_globalclip.leaf_norms tells which leaf it is in.",
            norm=clip.norm,
        )
