"""Sums over the entries of a tree: one read of the leaves, and no copy of them.

XLA fuses an elementwise function into the sum of what it gives, except where it does
not. What is done about that is here. Figures are from two CPU cores and jax 0.10.2;
``benchmarks/README.md`` shows the compiled code that each is about.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ._mesh import Axes, all_reduce, by_axes, by_type, is_local, varying_axes

Values = Callable[[jax.Array], jax.Array]
_Item = TypeVar("_Item")
AddValues = Callable[[list[jax.Array]], jax.Array]

# Leaves of at most so many entries are stacked, so many of them at a time.
_SMALL, _PACK = 4096, 64
# The most entries in a chunk of a leaf: 256 KB of float32 stay in the cache.
_CHUNK = 65536
# The most entries of a leaf that is: its chunks are found by int32 indices.
_INDEXED = 2**31 - _CHUNK
# How many arrays are added one by one: leaves of one type, chunks of one leaf.
_ADDENDS = 16
# XLA on CPU adds fewer floats than about 4,096 one after the other.
_ADDED_IN_A_TREE = 8192


class Packed(NamedTuple):
    """The leaves of a tree, with small ones of one type stacked.

    XLA spends its compile time on reductions and on the operands of branches, and
    each reduction is a call at run time. The norm of 2,000 leaves of 1,000 compiled
    in 0.5 s for 4.0. As the new axis is not sharded, packing needs no collective,
    which it does where leaves are laid end to end. Packs are no larger because
    XLA's time grows with the square of what one operation takes: 2.5 s in one pack.

    Attributes:
      packs: stacked leaves.
      large: the others, each as it was.
    """

    packs: list[jax.Array]
    large: list[jax.Array]

    @classmethod
    def of(cls, leaves: Sequence[jax.Array]) -> "Packed":
        large = [leaf for leaf in leaves if leaf.size > _SMALL]
        small = [leaf for leaf in leaves if leaf.size <= _SMALL]
        packs = [
            jnp.stack(alike[i : i + _PACK])
            for alike in by_type(small)
            for i in range(0, len(alike), _PACK)
        ]
        return cls(packs, large)


def sum_over(
    leaves: Packed, values: Values, *, fused: Callable[[jax.Array], bool]
) -> jax.Array:
    """The sum over all entries of all leaves of what ``values`` makes of them.

    Args:
      leaves: at least one.
      values: an elementwise function, from a leaf to a float array of its shape.
      fused: whether XLA on CPU fuses ``values`` of this leaf into its sum.
    """

    def add_values(leaves: list[jax.Array]) -> jax.Array:
        return add(list(map(values, leaves)))

    sums = [sum_entries(values(pack)) for pack in leaves.packs]
    for alike in by_type(leaves.large):
        first = alike[0]
        if fused(first) or first.size > _INDEXED or not is_local(first):
            sums += [sum_entries(values(leaf)) for leaf in alike]
        else:
            for i in range(0, len(alike), _ADDENDS):
                sums.append(_sum_of_unfused(alike[i : i + _ADDENDS], add_values))
    return add(sums)


def sum_across(
    items: Sequence[_Item],
    axes: Sequence[Axes],
    sum_of: Callable[[list[_Item]], jax.Array],
) -> jax.Array:
    """The sum over all devices, with one all-reduce for each set of mesh axes.

    Args:
      items: at least one.
      axes: the manual mesh axes over which each is split.
      sum_of: the sum over one device's part of the items split over the same axes;
        a small array.
    """
    groups = by_axes(items, axes)
    sums = [sum_of(group) for group in groups.values()]
    return add(all_reduce(sums, list(groups), lax.psum))


def sum_entries(array: jax.Array) -> jax.Array:
    """The sum of the entries of an array, to within a few units of its precision.

    Where there are so few that XLA on CPU adds them one after the other, rows of
    zeros are added, and it adds in a tree: the norm of 3,000 equal entries was off
    by 3e-6 without, by 3e-8 with them (jax 0.10.2). To go when XLA adds few in a
    tree too. Rows, as an axis that exists may be sharded.
    """
    if 0 < array.size < _ADDED_IN_A_TREE:
        rows = -(-_ADDED_IN_A_TREE // array.size)
        array = jnp.pad(array[None], [(0, rows - 1)] + [(0, 0)] * array.ndim)
    return jnp.sum(array)


def add(values: Sequence[jax.Array]) -> jax.Array:
    """The sum, in pairs, so that rounding grows with the logarithm of their number."""
    values = list(values)
    while len(values) > 1:
        pairs = zip(values[0::2], values[1::2], strict=False)
        values = [a + b for a, b in pairs] + values[len(values) // 2 * 2 :]
    return values[0]


def _sum_of_unfused(leaves: list[jax.Array], add_values: AddValues) -> jax.Array:
    return lax.platform_dependent(
        leaves,
        cpu=functools.partial(_sum_in_chunks, add_values=add_values),
        default=lambda leaves: sum_entries(add_values(leaves)),
    )


def _sum_in_chunks(leaves: list[jax.Array], *, add_values: AddValues) -> jax.Array:
    """The sum of what XLA on CPU does not fuse into a sum, but writes out first.

    As a loop over chunks it is fused: the norm of 2**26 float16 entries took 11 ms
    for 80, and 0.3 MB for 268. To go when XLA on CPU fuses into its sums what it
    fuses elsewhere.
    """
    size = leaves[0].size
    length = min(_CHUNK, size // _ADDENDS)
    chunks = -(-size // length)

    def chunk(i: jax.Array) -> jax.Array:
        # The last chunk begins early enough to be whole. What it holds for the
        # second time does not count.
        start = jnp.minimum(i * length, size - length)
        fresh = start + lax.iota(start.dtype, length) >= i * length
        slices = [_slice(leaf, start, length, i) for leaf in leaves]
        return jnp.where(fresh, add_values(slices), 0)

    # Not the first chunk: its code would be compiled twice, which for 723 leaves of
    # 70 billion entries takes 15 s for 9.
    dtype = jax.eval_shape(add_values, leaves).dtype
    none = lax.pcast(jnp.zeros(length, dtype), varying_axes(leaves[0]), to="varying")

    def block(i: jax.Array) -> jax.Array:
        # Few enough chunks that adding them one after the other costs no precision.
        first = i * _ADDENDS
        last = jnp.minimum(first + _ADDENDS, chunks)
        return sum_entries(
            lax.fori_loop(first, last, lambda j, sum_: sum_ + chunk(j), none)
        )

    blocks = -(-chunks // _ADDENDS)
    return sum_entries(lax.map(block, jnp.arange(blocks)))


def _slice(leaf: jax.Array, start: jax.Array, length: int, i: jax.Array) -> jax.Array:
    """Entries of the leaf, by their bits: XLA on CPU slices bfloat16 as float32.

    It would convert the whole leaf to it first. The barrier makes the leaf depend on
    the loop, or else the cast to bits would be taken out of it, and written.
    """
    leaf, _ = lax.optimization_barrier((leaf, i))
    if jnp.iscomplexobj(leaf):
        return lax.dynamic_slice(leaf.ravel(), (start,), (length,))
    bits = lax.bitcast_convert_type(leaf.ravel(), f"uint{8 * leaf.dtype.itemsize}")
    bits = lax.dynamic_slice(bits, (start,), (length,))
    return lax.bitcast_convert_type(bits, leaf.dtype)
