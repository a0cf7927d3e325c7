"""Sums of squares of many arrays: in a range that floats can hold, in few kernels.

In one read of the entries, and without a branch, two sums are accumulated,

    Σ (xᵢ · shrink)²  and  Σ (xᵢ · grow)²,

of which at least one neither overflows nor underflows. As the parts of one complex sum
they are one reduction to XLA, so a GPU needs no more kernels than for a plain sum.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._mesh import either, is_local

# The most entries that the ranges below allow for, as a power of two.
_ENTRIES = 40
# The most arrays of one type that are added entry by entry before they are reduced.
# Each reduction is a kernel, and each addend one of its operands.
ADDENDS = 16


class Range(NamedTuple):
    """Powers of two for the sums of squares in an accumulator's dtype.

    Attributes:
      floor: the least sum that is trusted. If a tree has at most 2**40 entries, the
        squares that underflowed change such a sum by less than four roundings.
      shrink: a sum of squares of entries times this does not overflow.
      grow: a sum of squares of entries times this is trusted up to where that of the
        shrunk entries begins to be.
    """

    floor: float
    shrink: float
    grow: float

    @classmethod
    def of(cls, dtype: jnp.dtype) -> "Range":
        """The range of float32 or float64."""
        info = jnp.finfo(dtype)
        floor = int(info.minexp) + int(info.nmant) + _ENTRIES - 2
        return cls(
            floor=2.0**floor,
            shrink=2.0 ** -((int(info.maxexp) + _ENTRIES) // 2),
            grow=2.0 ** ((-floor - _ENTRIES - 1) // 2),
        )


def root_of_squares(two_sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The norm as ``value`` and ``unit``, from the sum that can be trusted."""
    shrunk, grown = two_sums.real, two_sums.imag
    limits = Range.of(grown.dtype)
    in_range = grown < float(jnp.finfo(grown.dtype).max) / 2
    value = jnp.where(in_range, jnp.sqrt(grown) / limits.grow, jnp.sqrt(shrunk))
    return value, either(in_range, 1, 1 / limits.shrink, value.dtype)


def two_sums(arrays: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The sums of squares of the shrunk entries and of the grown, as one complex.

    Summed as one they are one kernel on a GPU. A TPU is faster if they are two.
    """
    limits = Range.of(dtype)
    # So neither the sums nor what is made of them are constants to XLA.
    factors = hidden(jnp.array(limits.shrink, dtype), jnp.array(limits.grow, dtype))
    # Side by side if they are alike: XLA adds sums over the same devices before it
    # reduces them.
    arrays = sum(groups_of(arrays, jax.typeof, len(arrays)), [])
    groups = groups_of(arrays, lambda x: is_local(x) and jax.typeof(x), ADDENDS)

    def sums(groups, *factors, together=True):
        # The last first, because XLA visits operands from the last on. So it joins the
        # all-reduces of gradients as for a plain sum, and copies no tables for that.
        return add([_two_sums(x, *factors, together) for x in reversed(groups)])

    apart = functools.partial(sums, together=False)
    return lax.platform_dependent(groups, *factors, tpu=apart, default=sums)


# Traced once for groups of one type.
@functools.partial(jax.jit, static_argnums=3)
def _two_sums(alike, shrink, grow, together):
    """``two_sums`` of arrays that can be added entry by entry on each device."""
    parts = [part for array in alike for part in real_parts(array, grow.dtype)]
    if not together:
        return lax.complex(*(jnp.sum(_squares(parts, x)) for x in (shrink, grow)))
    # What is grown is limited, so that only a sum over entries is infinite: of an array
    # that is broadcast XLA makes a product of complex numbers, in which inf * 0 is NaN.
    # Each square is limited, and so is a sum of several. A single square is not limited
    # twice: XLA for GPU would then split the sums of many leaves into more kernels.
    parts, info = [*map(jnp.abs, parts)], jnp.finfo(grow.dtype)
    grown = _squares(parts, grow, most=2.0 ** (int(info.maxexp) / 2 - 0.25))
    if len(parts) > 1:
        grown = jnp.minimum(grown, float(info.max))
    return jnp.sum(lax.complex(_squares(parts, shrink), grown))


def _squares(parts, factor, most=None):
    """The squares of the parts, each times the factor, of at most so much; added.

    XLA makes ``(x * x) * (factor * factor)`` of a plain square of an array that is
    broadcast, and both may leave the range: https://github.com/jax-ml/jax/issues/37919
    A minimum prevents it. The largest float leaves each square what it is.
    """
    most = most or float(jnp.finfo(factor.dtype).max)
    return add([jnp.square(jnp.minimum(part * factor, most)) for part in parts])


def hidden(*scalars: jax.Array) -> Sequence[jax.Array]:
    """The scalars, as no constants to XLA.

    It makes ``x * (a * b)`` of ``(x * a) * b`` if a and b are constants, though
    ``a * b`` may underflow. A barrier is no constant.
    """
    return lax.optimization_barrier(scalars)


def groups_of(
    arrays: Sequence[jax.Array], key: Callable[[jax.Array], Hashable], most: int
) -> list[list[jax.Array]]:
    """The arrays in groups of at most so many with one key; alone if that is False."""
    groups: dict[Any, list[jax.Array]] = {}
    for i, array in enumerate(arrays):
        groups.setdefault(key(array) or i, []).append(array)
    return [
        group[i : i + most]
        for group in groups.values()
        for i in range(0, len(group), most)
    ]


def add(values: Sequence[jax.Array]) -> jax.Array:
    """The sum, in halves, so that rounding grows with the logarithm of their number."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return add(values[:middle]) + add(values[middle:])


def real_parts(array: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Real and imaginary part, or the real array itself, cast to ``dtype``."""
    parts = (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)
    return tuple(part.astype(dtype) for part in parts)
