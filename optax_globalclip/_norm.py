"""The global norm of a tree, and the norm of each of its leaves."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._leaves import accumulator_dtype, is_float0, split_leaves
from ._mesh import Axes, AxisName, all_reduce, is_local, leaf_axes

# The most entries of a leaf that is packed with others before it is reduced.
_SMALL = 4096


class ScaledNorm(NamedTuple):
    """A norm as ``value * unit``, which may be more than one float can hold.

    Attributes:
      value: scalar; non-finite exactly where an entry of the tree is.
      unit: scalar, positive and finite, and constant under differentiation.
    """

    value: jax.Array
    unit: jax.Array

    def as_float(self) -> jax.Array:
        return self.value * self.unit


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticOrd:
    """An ``ord`` known at trace time: each one compiles to code of its own."""

    value: float


Ord = float | jax.Array


def global_norm(
    updates: optax.Updates, *, ord: chex.Numeric = 2, axis_name: AxisName = None
) -> jax.Array:
    r"""The norm of all entries of a tree, taken as one long vector.

    .. math:: \lVert g \rVert_p = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Formal guarantees:

    * Sums are accumulated in float32, or in float64 if any leaf is float64 or
      complex128, whatever the dtypes of the leaves.
    * The norm is right for every tree of finite normal entries whose norm the
      result's dtype can hold: entries whose powers overflow or underflow are
      rescaled. (XLA on CPU reads subnormal float32 entries as zero.)
    * It can be differentiated twice. Its gradient at zero is zero.
    * Outside ``jit`` it is one compiled call.

    =============================== ========================================
    updates                         norm
    =============================== ========================================
    no leaves, or only empty ones   0
    ``None``, ``MaskedNode``        not counted
    float0 leaves                   not counted
    complex leaves                  by their modulus
    infinite entries                inf
    NaN entries                     NaN
    =============================== ========================================

    Args:
      updates: a tree of float or complex arrays of any shapes, NumPy arrays or
        Python scalars.
      ord: the order p of the norm, a real number of at least 1, or ``inf`` for
        the largest modulus. A traced scalar is accepted, and costs a second read.
      axis_name: for ``pmap``, and ``shard_map`` with ``check_vma=False``: the
        mesh axes over which leaves are sharded, as a name, a tuple of names, or
        a tree prefix of them. Elsewhere it is found from the types of the leaves.

    Returns:
      A float32 scalar; float64 if any leaf is float64 or complex128.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path.
      ValueError: if ``ord`` is less than 1 or NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0]), "frozen": None}
      >>> print(optax_globalclip.global_norm(grads))
      5.0

    References:
      `tf.linalg.global_norm
      <https://www.tensorflow.org/api_docs/python/tf/linalg/global_norm>`_
    """
    leaves, _ = split_leaves(updates)
    axes = leaf_axes(leaves, updates, axis_name)
    return _global_norm(leaves, as_ord(ord), axes)


def leaf_norms(
    updates: optax.Updates, *, ord: chex.Numeric = 2, axis_name: AxisName = None
) -> optax.Updates:
    """The norm of each leaf by itself, to log layers or to find the bad one.

    Args:
      updates: as for :func:`global_norm`.
      ord: as for :func:`global_norm`.
      axis_name: as for :func:`global_norm`.

    Returns:
      A tree like ``updates``, each leaf a float32 scalar (float64 for a float64 or
      complex128 leaf). ``None`` and ``MaskedNode`` stay; float0 leaves give 0.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path.
      ValueError: if ``ord`` is less than 1 or NaN.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.nan])}
      >>> norms = optax_globalclip.leaf_norms(grads)
      >>> print(norms["w"])
      5.0
      >>> bad = [path for path, norm in jax.tree.leaves_with_path(norms)
      ...        if not jnp.isfinite(norm)]
      >>> print(jax.tree_util.keystr(bad[0]))
      ['b']
    """
    leaves, join = split_leaves(updates)
    axes = leaf_axes(leaves, updates, axis_name)
    norms = join(_leaf_norms(leaves, as_ord(ord), axes))
    return jax.tree.map(lambda x: jnp.float32(0) if is_float0(x) else x, norms)


def as_ord(ord: chex.Numeric) -> StaticOrd | jax.Array:
    """Checks ``ord``, and makes it static unless it is traced."""
    if isinstance(ord, Tracer):
        return ord
    real = isinstance(ord, numbers.Real | np.ndarray | jax.Array)
    if not real or not ord >= 1:
        raise ValueError(
            f"ord={ord!r}: the order of a norm is a real number of at least 1, "
            "or math.inf for the largest entry."
        )
    return StaticOrd(float(ord))


def measure(
    leaves: Sequence[jax.Array], ord: StaticOrd | jax.Array, axes: tuple[Axes, ...]
) -> ScaledNorm:
    """The global norm of the leaves, each sharded over its own manual mesh axes."""
    if not leaves:
        return ScaledNorm(jnp.float32(0), jnp.float32(1))
    if _is_static(ord, 2):
        value, unit = _l2_norm(leaves, axes)
        return ScaledNorm(value, jax.lax.stop_gradient(unit))
    if _is_static(ord, math.inf):
        largest = _max_norm(_moduli(leaves), axes)
        return ScaledNorm(largest, jnp.ones_like(largest))
    return _lp_norm(_moduli(leaves), _exponent(ord), axes)


@functools.partial(jax.jit, static_argnames="axes")
def _global_norm(leaves, ord, axes):
    return measure(leaves, ord, axes).as_float()


@functools.partial(jax.jit, static_argnames="axes")
def _leaf_norms(leaves, ord, axes):
    moduli = _moduli(leaves)
    if _is_static(ord, math.inf):
        norms = [_max_norm([m], (own,)) for m, own in zip(moduli, axes, strict=True)]
    else:
        norms = _lp_norms(moduli, _exponent(ord), axes)
    return [
        norm.astype(accumulator_dtype([leaf]))
        for norm, leaf in zip(norms, leaves, strict=True)
    ]


def _is_static(ord: StaticOrd | jax.Array, value: float) -> bool:
    return isinstance(ord, StaticOrd) and ord.value == value


# --- ord=2: one read, and a second where squares leave the range of floats.


class _Range(NamedTuple):
    """Where a sum of squares can be trusted, and what brings others there.

    Attributes:
      floor: the least trusted sum. All the squares that underflowed in it, had the
        tree 2**40 entries, would change it by less than it is rounded by.
      shrink: a power of two that brings every entry of a tree whose sum overflowed
        to where squares and sums do not.
      grow: the same for a tree whose sum is below ``floor``.
    """

    floor: float
    shrink: float
    grow: float

    @classmethod
    def of(cls, dtype: jnp.dtype) -> "_Range":
        info = jnp.finfo(dtype)
        return cls(
            floor=float(info.tiny) / float(info.eps) * 2.0**40,
            shrink=2.0 ** (-info.maxexp * 3 // 4),
            grow=2.0 ** (info.maxexp * 5 // 8),
        )

    def trusts(self, total: jax.Array) -> jax.Array:
        return (total >= self.floor) & (total < math.inf)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _l2_norm(leaves: list[jax.Array], axes: tuple[Axes, ...]) -> ScaledNorm:
    dtype = accumulator_dtype(leaves)
    groups = _by_axes(leaves, axes)
    sums = [_scaled_sums(group, dtype) for group in groups.values()]
    shrunk, plain, grown = _add(all_reduce(sums, list(groups), jax.lax.psum))

    limits = _Range.of(dtype)
    trusted, small = limits.trusts(plain), plain < 1
    total = jnp.where(trusted, plain, jnp.where(small, grown, shrunk))
    scale = jnp.where(trusted, 1, jnp.where(small, limits.grow, limits.shrink))
    return ScaledNorm(jnp.sqrt(total), (1 / scale).astype(dtype))


@_l2_norm.defjvp
def _l2_norm_jvp(axes, primals, tangents):
    """The derivative is the tree's unit vector, and zero where the tree is.

    Written by hand because the derivative of the square root is infinite at zero,
    and because that of the rescue would keep a copy of every leaf.
    """
    (leaves,), (tangents,) = primals, tangents
    norm = _l2_norm(leaves, axes)
    dtype, scale = norm.value.dtype, jax.lax.stop_gradient(1 / norm.unit)
    nonzero = norm.value != 0
    value = jnp.where(nonzero, norm.value, 1)

    def slope_along(part: jax.Array, tangent: jax.Array) -> jax.Array:
        direction = jnp.where(nonzero, part.astype(dtype) * scale / value, 0)
        return jnp.sum(direction * (tangent.astype(dtype) * scale))

    slopes = [
        _add(list(map(slope_along, _real_parts(leaf), _real_parts(tangent))))
        for leaf, tangent in zip(leaves, tangents, strict=True)
    ]
    groups = _by_axes(slopes, axes)
    slopes = [_add(group) for group in groups.values()]
    slope = _add(all_reduce(slopes, list(groups), jax.lax.psum))
    return norm, ScaledNorm(slope, jnp.zeros_like(norm.unit))


def _scaled_sums(leaves: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The sums of squares of the entries shrunk, as they are, and grown.

    The middle one is all that counts unless it left the range of floats. Sums of
    several devices can be added entry by entry, even where only some of them did.
    """
    limits = _Range.of(dtype)
    total = _sum_of_squares(leaves, dtype)

    def keep() -> jax.Array:
        root = jnp.sqrt(total)
        shrunk, grown = jnp.square(root * limits.shrink), jnp.square(root * limits.grow)
        return jnp.stack([shrunk, total, grown])

    def rescue() -> jax.Array:
        small = total < 1
        scale = jnp.where(small, limits.grow, limits.shrink).astype(dtype)
        rescued = _sum_of_squares(leaves, dtype, scale)
        shrunk = jnp.where(small, 0, rescued)
        grown = jnp.where(small, rescued, math.inf)
        return jnp.stack([shrunk, total, grown])

    return jax.lax.cond(limits.trusts(total), keep, rescue)


def _sum_of_squares(
    leaves: Sequence[jax.Array], dtype: jnp.dtype, scale: jax.Array | None = None
) -> jax.Array:
    """The sum of squares of all entries, each first multiplied by ``scale``."""
    parts = [part.astype(dtype) for leaf in leaves for part in _real_parts(leaf)]
    parts = _packed(parts)
    if scale is not None:
        parts = [_scaled_modulus(part, scale) for part in parts]
    return _add([jnp.sum(jnp.square(part)) for part in parts])


def _packed(parts: list[jax.Array]) -> list[jax.Array]:
    """The parts, with all small ones joined into one.

    XLA spends its compile time on reductions, and each is a call at run time.
    """
    small = [part for part in parts if part.size <= _SMALL]
    if len(small) < 2 or not all(map(is_local, parts)):
        return parts
    packed = jnp.concatenate([part.ravel() for part in small])
    return [packed] + [part for part in parts if part.size > _SMALL]


def _scaled_modulus(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``abs(x) * scale``, and right for subnormal entries, which the CPU takes as 0.

    Their bits are an integer: how many times the smallest subnormal they are.
    """
    info = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, f"uint{info.bits}")
    bits = bits & (2 ** (info.bits - 1) - 1)
    # Worked out here, as the smallest subnormal would be zero there.
    scaled_step = math.ldexp(_Range.of(x.dtype).grow, info.minexp - info.nmant)
    step = jnp.where(scale > 1, scaled_step, 0).astype(x.dtype)
    subnormal = bits < 2**info.nmant
    return jnp.where(subnormal, bits.astype(x.dtype) * step, jnp.abs(x) * scale)


def _real_parts(leaf: jax.Array) -> tuple[jax.Array, ...]:
    """What adds up to the square of the modulus of a complex leaf, when squared."""
    return (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)


def _add(values: Sequence[jax.Array]) -> jax.Array:
    """The sum, in pairs, so that rounding grows with the logarithm of their number."""
    values = list(values)
    while len(values) > 1:
        pairs = zip(values[0::2], values[1::2], strict=False)
        values = [a + b for a, b in pairs] + values[len(values) // 2 * 2 :]
    return values[0]


def _by_axes(
    items: Sequence[jax.Array], axes: tuple[Axes, ...]
) -> dict[Axes, list[jax.Array]]:
    """The items of each set of manual mesh axes."""
    groups: dict[Axes, list[jax.Array]] = {}
    for item, own in zip(items, axes, strict=True):
        groups.setdefault(own, []).append(item)
    return groups


# --- Any other ord: a first read finds the largest entry, a second divides by it.


def _moduli(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    dtype = accumulator_dtype(leaves)
    return [jnp.abs(leaf).astype(dtype) for leaf in leaves]


def _exponent(ord: StaticOrd | jax.Array) -> Ord:
    return ord.value if isinstance(ord, StaticOrd) else jax.lax.stop_gradient(ord)


def _lp_norm(moduli: list[jax.Array], ord: Ord, axes: tuple[Axes, ...]) -> ScaledNorm:
    unit = _as_unit(_max_norm(moduli, axes))
    sums = _power_sums(moduli, [unit] * len(moduli), ord, axes)
    return ScaledNorm(_power(_add(sums), 1 / ord), unit)


def _lp_norms(
    moduli: list[jax.Array], ord: Ord, axes: tuple[Axes, ...]
) -> list[jax.Array]:
    units = [_as_unit(largest) for largest in _largest(moduli, axes)]
    sums = _power_sums(moduli, units, ord, axes)
    return [
        _power(total, 1 / ord) * unit for total, unit in zip(sums, units, strict=True)
    ]


def _power_sums(
    moduli: list[jax.Array],
    units: list[jax.Array],
    ord: Ord,
    axes: tuple[Axes, ...],
) -> list[jax.Array]:
    """Each leaf's sum of powers of its entries in its unit."""
    sums = [
        jnp.sum(_power(modulus / unit, ord))
        for modulus, unit in zip(moduli, units, strict=True)
    ]
    return all_reduce(sums, axes, jax.lax.psum)


def _power(x: jax.Array, exponent: Ord) -> jax.Array:
    """``x ** exponent`` for x >= 0, with 0, inf and NaN kept, and no slope at them."""
    regular = jnp.isfinite(x) & (x > 0)
    powers = jnp.where(regular, x, 1) ** jnp.asarray(exponent, x.dtype)
    return jnp.where(regular, powers, jax.lax.stop_gradient(x))


def _as_unit(largest: jax.Array) -> jax.Array:
    """What entries are divided by, a constant: the norm does not depend on it."""
    usable = jnp.isfinite(largest) & (largest > 0)
    return jax.lax.stop_gradient(jnp.where(usable, largest, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_norm(moduli: list[jax.Array], axes: tuple[Axes, ...]) -> jax.Array:
    return jnp.max(jnp.stack(_largest(moduli, axes)), initial=0)


@_max_norm.defjvp
def _max_norm_jvp(axes, primals, tangents):
    """The slope of the largest entry; where several tie, their mean."""
    (moduli,), (tangents,) = primals, tangents
    largest = _max_norm(moduli, axes)
    ties = [(modulus == largest).astype(largest.dtype) for modulus in moduli]
    slopes = [jnp.sum(tie * t) for tie, t in zip(ties, tangents, strict=True)]
    count = _add(all_reduce([jnp.sum(tie) for tie in ties], axes, jax.lax.psum))
    slope = _add(all_reduce(slopes, axes, jax.lax.psum))
    return largest, jnp.where(largest > 0, slope / jnp.maximum(count, 1), 0)


def _largest(moduli: list[jax.Array], axes: tuple[Axes, ...]) -> list[jax.Array]:
    """Each leaf's largest entry, 0 if it has none."""
    largest = [jnp.max(modulus, initial=0) for modulus in moduli]
    return all_reduce(largest, axes, jax.lax.pmax)
