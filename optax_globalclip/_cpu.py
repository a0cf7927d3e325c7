"""What XLA on CPU needs in place of the formulas of ``_reduce`` and ``_clip``.

XLA on CPU fuses little into a reduction, computes bfloat16 in float32, and takes
subnormal entries as zero. This module works around that, for leaves on one device:

* The two sums are one plain sum, and another behind a branch. Every normal norm is
  right.
* A sum of what XLA does not fuse is a loop over chunks.
* Small leaves are packed and padded.
* bfloat16 is rounded by integers.

Nothing of this is lowered for other platforms. Without this module results are right
too, but slower, and subnormal entries count as zero. ``benchmarks/README.md`` has the
figures. The workarounds wait for these issues:

* XLA on CPU materializes what a reduction reads:
  https://github.com/openxla/xla/issues/49131
* XLA on CPU flushes subnormals to zero: https://github.com/openxla/xla/issues/22858
* XLA on CPU adds few entries one after the other:
  https://github.com/jax-ml/jax/issues/4199
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ._mesh import either, has_mesh
from ._reduce import ADDENDS, Range, add, groups_of, hidden, real_parts
from ._tree import Leaf

# The dtypes whose squares XLA on CPU fuses into their sum.
_FUSED = (jnp.float32, jnp.bfloat16, jnp.float64)
# Leaves of at most so many entries are stacked, so many of them at a time: XLA's time
# to compile grows with the square of the operands of one operation.
_SMALL, _PACK = 4096, 64
# The most entries in a chunk of a leaf: 256 KB of float32 stay in the cache.
_CHUNK = 65536
# The most entries of a leaf that is read in chunks: they are found by int32 indices.
_INDEXED = 2**31 - _CHUNK
# XLA on CPU adds fewer floats than about 4,096 one after the other.
_ADDED_IN_A_TREE = 8192


def can_sum(leaf: Leaf) -> bool:
    """Whether ``root_of_squares`` takes it: on one device, of no symbolic shape."""
    array = leaf.array
    static = all(isinstance(size, int) for size in array.shape)
    return static and not leaf.axes and not has_mesh(array)


def root_of_squares(
    arrays: Sequence[jax.Array], dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """The 2-norm of all entries, as ``value`` and ``unit``.

    If the plain sum of squares cannot be trusted, that of scaled entries is computed
    too, in a branch: XLA on CPU would read the entries once for each sum.
    """
    small = [array for array in arrays if array.size <= _SMALL]
    large = [array for array in arrays if array.size > _SMALL]
    packs = list(map(jnp.stack, groups_of(small, jax.typeof, _PACK)))
    groups = groups_of(large, jax.typeof, ADDENDS)
    sum_of_squares = functools.partial(_sum_of_squares, packs, groups, dtype)
    (plain,) = hidden(sum_of_squares(None))
    limits, grow = Range.of(dtype), _grow(dtype)
    tiny, huge = plain < limits.floor, ~(plain < math.inf)
    scale = either(tiny, grow, limits.shrink, dtype)
    total = lax.cond(tiny | huge, sum_of_squares, lambda _: plain, scale)
    # Both end in a division, as ``once`` says.
    value = jnp.sqrt(total) / either(tiny, grow, 1, dtype)
    return value, 1 / either(huge, limits.shrink, 1, dtype)


def once(scalar: jax.Array) -> jax.Array:
    """The scalar, as a division.

    XLA on CPU computes cheaper scalars again in each kernel that reads them, with all
    that they are made of: compiling takes quadratic time in the number of leaves.
    """
    return scalar / jnp.where(scalar == scalar, 1, scalar)


def factors(shift, scale):
    """The factors of every product, and whether it is to be the value itself.

    That is read off the scale, because each kernel would repeat the comparisons of norm
    and threshold.
    """
    scale = once(scale)
    return once(shift), scale, scale == 1


def can_multiply(array: jax.Array, scale: jax.Array) -> bool:
    """Whether ``product`` takes it."""
    return array.dtype == jnp.bfloat16 and scale.dtype == jnp.float32


# Traced once for leaves of one type.
@jax.jit
def product(array, shift, scale, kept, zero):
    """``array * shift * scale`` in bfloat16, by integers; the array if ``kept``.

    XLA on CPU would convert the leaf to float32, share that conversion with the norm's,
    and so materialize a float32 copy of the leaf. It would also round the product again
    in each operation of the optimizer that reads it. Integers need no conversion.
    """
    bits = lax.bitcast_convert_type(array, jnp.uint16)
    wide = lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    wide = wide * shift * scale
    wide_bits = lax.bitcast_convert_type(wide, jnp.uint32)
    # To nearest: the upper half is incremented if the lower is more than half of its
    # unit, or just half and the upper odd. Infinity stays, as its lower half is 0.
    rounded = (wide_bits + 0x7FFF + (wide_bits >> 16 & 1)) >> 16
    rounded = jnp.where(wide == wide, rounded, 0x7FC0)
    rounded = lax.select(kept, bits, rounded.astype(jnp.uint16))
    if zero is not None:
        rounded = jnp.where(zero, 0, rounded)
    return lax.bitcast_convert_type(rounded, jnp.bfloat16)


def _grow(dtype: jnp.dtype) -> float:
    """The smallest subnormal times this has a square that is normal."""
    floor = math.log2(Range.of(dtype).floor)
    return 2.0 ** ((int(jnp.finfo(dtype).maxexp) - 2 - floor) // 2)


def _sum_of_squares(packs, groups, dtype, scale):
    """The sum of squares of all entries, each times the scale if there is one."""
    squares = functools.partial(_squares, scale=scale, dtype=dtype)
    sums = [_sum_entries(squares(pack)) for pack in packs]
    for alike in groups:
        fused = scale is None and alike[0].dtype in _FUSED
        if fused or alike[0].size > _INDEXED:
            sums += [_sum_entries(squares(leaf)) for leaf in alike]
        else:
            sums.append(_sum_in_chunks(alike, squares, dtype))
    return add(sums)


# Traced once for leaves of one type.
@functools.partial(jax.jit, static_argnames="dtype")
def _squares(array: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """The squares of the moduli, each times the scale."""
    parts = real_parts(array, dtype)
    if scale is not None:
        parts = tuple(_scaled_modulus(part, scale) for part in parts)
    return add([part * part for part in parts])


def _scaled_modulus(x: jax.Array, scale: jax.Array) -> jax.Array:
    """``abs(x) * scale``, and right for subnormal entries, which the CPU takes as 0.

    Their bits are an integer: how many times the smallest subnormal they are.
    """
    info = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, f"uint{info.bits}")
    bits = bits & (2 ** (info.bits - 1) - 1)
    # Computed here, as the smallest subnormal would be zero there.
    scaled_step = math.ldexp(_grow(x.dtype), int(info.minexp - info.nmant))
    step = jnp.where(scale > 1, scaled_step, 0).astype(x.dtype)
    subnormal = bits < 2**info.nmant
    return jnp.where(subnormal, bits.astype(x.dtype) * step, jnp.abs(x) * scale)


def _sum_entries(array: jax.Array) -> jax.Array:
    """The sum of the entries of an array, to within a few units of its precision.

    XLA on CPU adds few entries one after the other. If rows of zeros follow them, XLA
    adds all of them in a tree.
    """
    if 0 < array.size < _ADDED_IN_A_TREE:
        rows = -(-_ADDED_IN_A_TREE // array.size)
        array = jnp.pad(array[None], [(0, rows - 1)] + [(0, 0)] * array.ndim)
    return jnp.sum(array)


def _sum_in_chunks(leaves, values, dtype):
    """The sum of what XLA on CPU does not fuse into a sum, but materializes first.

    As a loop over chunks it is fused.
    """
    size = leaves[0].size
    length = min(_CHUNK, size // ADDENDS)
    chunks = -(-size // length)

    def chunk(i: jax.Array) -> jax.Array:
        # The last chunk begins early enough to be whole. What it holds for the
        # second time does not count.
        start = jnp.minimum(i * length, size - length)
        fresh = start + lax.iota(start.dtype, length) >= i * length
        slices = [_slice(leaf, start, length, i) for leaf in leaves]
        return jnp.where(fresh, add(list(map(values, slices))), 0)

    def block(i: jax.Array) -> jax.Array:
        # Few enough chunks that adding them one after the other costs no precision.
        first = i * ADDENDS
        last = jnp.minimum(first + ADDENDS, chunks)
        # From 0, not from the first chunk: its code would be compiled twice.
        total = jnp.zeros(length, dtype)
        total = lax.fori_loop(first, last, lambda j, total: total + chunk(j), total)
        return _sum_entries(total)

    return _sum_entries(lax.map(block, jnp.arange(-(-chunks // ADDENDS))))


# Traced once for leaves of one type.
@functools.partial(jax.jit, static_argnames="length")
def _slice(leaf: jax.Array, start: jax.Array, length: int, i: jax.Array) -> jax.Array:
    """Entries of the leaf, by their bits: XLA on CPU slices bfloat16 as float32.

    It would convert the whole leaf first. The barrier makes the leaf depend on the
    loop. Without it the cast to bits would be taken out of the loop, and materialized.
    """
    leaf, _ = lax.optimization_barrier((leaf, i))
    bits = jnp.finfo(leaf.dtype).bits
    if jnp.iscomplexobj(leaf) or bits < 16:
        return lax.dynamic_slice(leaf.ravel(), (start,), (length,))
    entries = lax.bitcast_convert_type(leaf.ravel(), f"uint{bits}")
    entries = lax.dynamic_slice(entries, (start,), (length,))
    return lax.bitcast_convert_type(entries, leaf.dtype)
