"""The 2-norm: one read of the leaves, and a second where squares overflow."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._leaves import accumulator_dtype
from ._mesh import Axes, all_reduce
from ._sum import Packed, add, sum_over

# The dtypes whose squares XLA on CPU fuses into their sum.
_FUSED = (jnp.float32, jnp.bfloat16, jnp.float64)


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


def l2_norm(leaves: Sequence[jax.Array], axes: tuple[Axes, ...]) -> ScaledNorm:
    """The 2-norm of all entries, each leaf sharded over its own manual mesh axes."""
    value, unit = _l2_norm(list(leaves), axes)
    return ScaledNorm(value, jax.lax.stop_gradient(unit))


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
    shrunk, plain, grown = add(all_reduce(sums, list(groups), jax.lax.psum))

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
        add(list(map(slope_along, _real_parts(leaf), _real_parts(tangent))))
        for leaf, tangent in zip(leaves, tangents, strict=True)
    ]
    groups = _by_axes(slopes, axes)
    slopes = [add(group) for group in groups.values()]
    slope = add(all_reduce(slopes, list(groups), jax.lax.psum))
    return norm, ScaledNorm(slope, jnp.zeros_like(norm.unit))


def _scaled_sums(leaves: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The sums of squares of the entries shrunk, as they are, and grown.

    The middle one is all that counts unless it left the range of floats. Sums of
    several devices can be added entry by entry, even where only some of them did.
    """
    limits, packed = _Range.of(dtype), Packed.of(leaves)
    total = _sum_of_squares(packed, dtype)

    def keep() -> jax.Array:
        root = jnp.sqrt(total)
        shrunk, grown = jnp.square(root * limits.shrink), jnp.square(root * limits.grow)
        return jnp.stack([shrunk, total, grown])

    def rescue() -> jax.Array:
        small = total < 1
        scale = jnp.where(small, limits.grow, limits.shrink).astype(dtype)
        rescued = _sum_of_squares(packed, dtype, scale)
        shrunk = jnp.where(small, 0, rescued)
        grown = jnp.where(small, rescued, math.inf)
        return jnp.stack([shrunk, total, grown])

    return jax.lax.cond(limits.trusts(total), keep, rescue)


def _sum_of_squares(
    leaves: Packed, dtype: jnp.dtype, scale: jax.Array | None = None
) -> jax.Array:
    """The sum of squares of all entries, each first multiplied by ``scale``."""

    def squares(leaf: jax.Array) -> jax.Array:
        parts = [part.astype(dtype) for part in _real_parts(leaf)]
        if scale is not None:
            parts = [_scaled_modulus(part, scale) for part in parts]
        return add(list(map(jnp.square, parts)))

    return sum_over(
        leaves, squares, fused=lambda leaf: scale is None and leaf.dtype in _FUSED
    )


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


def _by_axes(
    items: Sequence[jax.Array], axes: tuple[Axes, ...]
) -> dict[Axes, list[jax.Array]]:
    """The items of each set of manual mesh axes."""
    groups: dict[Axes, list[jax.Array]] = {}
    for item, own in zip(items, axes, strict=True):
        groups.setdefault(own, []).append(item)
    return groups
