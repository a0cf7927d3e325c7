"""The range of floats: where a sum of squares can be trusted, and what to scale by."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The most entries that the bounds below allow for, as a power of two.
_ENTRIES = 40


class Range(NamedTuple):
    """Where a sum of squares can be trusted, and what brings others there.

    Attributes:
      floor: the least trusted sum. If a tree has at most 2**40 entries, the squares
        that underflowed in such a sum change it by less than its rounding.
      shrink: a power of two. If a sum of squares overflows, that of the entries times
        this does not, and it can be trusted.
      grow: the same for a sum below ``floor``. Even the smallest subnormal entry times
        this has a square that is normal.
    """

    floor: float
    shrink: float
    grow: float

    @classmethod
    def of(cls, dtype: jnp.dtype) -> "Range":
        """The range of an accumulator's dtype, float32 or float64."""
        info = jnp.finfo(dtype)
        floor = int(info.minexp) + int(info.nmant) + _ENTRIES
        return cls(
            floor=2.0**floor,
            shrink=2.0 ** (-int(info.maxexp) * 3 // 4),
            grow=2.0 ** ((int(info.maxexp) - 2 - floor) // 2),
        )


@functools.cache
def fits(dtype: jnp.dtype, accumulator: jnp.dtype) -> bool:
    """Whether sums of squares of entries of a dtype neither overflow nor underflow."""
    own, wide = jnp.finfo(dtype), jnp.finfo(accumulator)
    largest, smallest = 2 * int(own.maxexp), 2 * (int(own.minexp) - int(own.nmant))
    floor = int(wide.minexp) + int(wide.nmant) + _ENTRIES
    return largest + _ENTRIES <= int(wide.maxexp) and smallest >= floor


def real_parts(array: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """The arrays whose squares add up to those of the moduli, in the dtype."""
    parts = (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)
    return tuple(part.astype(dtype) for part in parts)


def wide(array: jax.Array, accumulator: jnp.dtype) -> jnp.dtype:
    """The dtype to compute with an array in: the accumulator's, complex if it is."""
    if not jnp.iscomplexobj(array):
        return accumulator
    double = accumulator == jnp.float64
    return jnp.dtype(jnp.complex128 if double else jnp.complex64)


def add(values: Sequence[jax.Array]) -> jax.Array:
    """The sum, in halves, so that rounding grows with the logarithm of their number."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return add(values[:middle]) + add(values[middle:])
