"""The 2-norm: one read of the leaves, and a second where squares overflow."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._leaves import accumulator_dtype
from ._mesh import Axes, is_local, varying_axes
from ._sum import Packed, add, sum_across, sum_over

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

    def scale_for(self, total: jax.Array) -> jax.Array:
        """What to multiply entries by, given the sum of their squares."""
        rescuing = jnp.where(total < 1, self.grow, self.shrink)
        return jnp.where(self.trusts(total), 1, rescuing).astype(total.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _l2_norm(leaves: list[jax.Array], axes: tuple[Axes, ...]) -> ScaledNorm:
    sum_squares = _sum_on_shards if all(map(is_local, leaves)) else _sum_by_xla
    total, scale = sum_squares(leaves, axes)
    return ScaledNorm(jnp.sqrt(total), (1 / scale).astype(total.dtype))


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
    slope = sum_across(slopes, axes, add)
    return norm, ScaledNorm(slope, jnp.zeros_like(norm.unit))


def _sum_on_shards(
    leaves: Sequence[jax.Array], axes: tuple[Axes, ...]
) -> tuple[jax.Array, jax.Array]:
    """The sum of squares of entries times a scale, and the scale.

    Where a sum cannot be trusted, the leaves are read again. As no device can tell
    whether those of others can, each hands on three: of the entries shrunk, as they
    are, and grown. So one all-reduce will do, and there is none in a branch.
    """
    dtype = accumulator_dtype(leaves)
    limits = _Range.of(dtype)

    def three_sums(leaves: Sequence[jax.Array]) -> jax.Array:
        packed = Packed.of(leaves)
        total = _sum_of_squares(packed, dtype)
        trusted, small = limits.trusts(total), total < 1

        def keep() -> jax.Array:
            root = jnp.sqrt(total)
            shrunk, grown = root * limits.shrink, root * limits.grow
            return jnp.stack([jnp.square(shrunk), total, jnp.square(grown)])

        def rescue() -> jax.Array:
            scaled_modulus = functools.partial(
                _scaled_modulus, scale=limits.scale_for(total)
            )
            rescued = _sum_of_squares(packed, dtype, scaled_modulus)
            shrunk = jnp.where(small, 0, rescued)
            grown = jnp.where(small, rescued, math.inf)
            return jnp.stack([shrunk, total, grown])

        return jax.lax.cond(trusted, keep, rescue)

    shrunk, plain, grown = sum_across(leaves, axes, three_sums)
    scale = limits.scale_for(plain)
    total = jnp.where(scale == 1, plain, jnp.where(scale < 1, shrunk, grown))
    return total, scale


def _sum_by_xla(
    leaves: Sequence[jax.Array], axes: tuple[Axes, ...]
) -> tuple[jax.Array, jax.Array]:
    """The same where XLA sums across devices: in a loop of one turn or two.

    A branch would hold, once more, an all-reduce for each leaf and axis, of which XLA
    merges some: 14 for a tree of 70 billion parameters, and 7 in the loop. The product
    with a scale is fused into the sum (but the scale, on CPU, written out for each
    shape of leaves: 10 MB a device). What subnormal entries would need is not (1.1 GB),
    so that on CPU they count as zero here.
    """
    dtype = accumulator_dtype(leaves)
    limits = _Range.of(dtype)

    def again(state: _Turn) -> jax.Array:
        return (state.turn == 0) | ((state.turn == 1) & (state.scale != 1))

    def sum_up(state: _Turn) -> _Turn:
        def sum_of(leaves: list[jax.Array]) -> jax.Array:
            # Or else XLA would take conversions out of the loop, and write them out.
            leaves, _ = jax.lax.optimization_barrier((leaves, state.turn))
            packed = Packed.of(leaves)
            return _sum_of_squares(packed, dtype, lambda part: part * state.scale)

        total = sum_across(leaves, axes, sum_of)
        scale = jnp.where(state.turn == 0, limits.scale_for(total), state.scale)
        return _Turn(state.turn + 1, scale, total)

    one = jax.lax.pcast(jnp.ones((), dtype), _still_varying(leaves, axes), to="varying")
    last = jax.lax.while_loop(again, sum_up, _Turn(jnp.int32(0), one, one))
    return last.total, last.scale


def _still_varying(leaves: Sequence[jax.Array], axes: tuple[Axes, ...]) -> Axes:
    """The manual axes over which sums differ even when added up over ``axes``."""
    left = (
        set(varying_axes(leaf)).difference(own)
        for leaf, own in zip(leaves, axes, strict=True)
    )
    return tuple(sorted(set().union(*left)))


class _Turn(NamedTuple):
    """How many turns there were, the scale for the next, and the sum of the last."""

    turn: jax.Array
    scale: jax.Array
    total: jax.Array


def _sum_of_squares(
    leaves: Packed,
    dtype: jnp.dtype,
    scaled: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The sum of squares of all entries, each first made ``scaled`` of it."""

    def squares(leaf: jax.Array) -> jax.Array:
        parts = [part.astype(dtype) for part in _real_parts(leaf)]
        if scaled is not None:
            parts = list(map(scaled, parts))
        return add(list(map(jnp.square, parts)))

    return sum_over(
        leaves, squares, fused=lambda leaf: scaled is None and leaf.dtype in _FUSED
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
