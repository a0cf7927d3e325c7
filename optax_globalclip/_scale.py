"""Scaling leaves: in one pass that XLA can fuse into what reads them.

Figures are from two CPU cores and jax 0.10.2; ``benchmarks/README.md`` says more.
"""

import functools

import jax
import jax.numpy as jnp

from ._l2 import ScaledNorm
from ._mesh import factor_of, is_unreduced

Factors = tuple[jax.Array, jax.Array]


def scale_factors(threshold: jax.Array, norm: ScaledNorm) -> Factors:
    """``threshold / norm`` as the product of two floats.

    The first is 1, unless the quotient is subnormal. The CPU takes that as zero, and
    would turn entries of 1e38 and a threshold of 1 into zeros.

    Both end in a division, which keeps XLA on CPU from working them out again in the
    kernel of every leaf: 1,000 kernels compiled in 0.6 s for 1.7.
    """
    value = jax.lax.stop_gradient(norm.value)
    tiny = float(jnp.finfo(threshold.dtype).tiny)
    # So much above ``tiny`` that the second factor is not 1, which means "keep".
    least = 4 * tiny
    whole, part = value * norm.unit, value * (norm.unit * least)
    split = (threshold / whole < tiny) & (threshold > 0)
    shift = 1 / jnp.where(split, 1 / least, 1).astype(threshold.dtype)
    # The derivative of a quotient has the square of the divisor in it. So divide by
    # the norm as a constant, and by the 1 that it is in units of that constant. Not
    # as ``norm.value / value``: XLA would merge the divisions, and overflow in it.
    one = 1 + (norm.value - value) * (1 / value)
    return shift, threshold / jnp.where(split, part, whole) / one


@jax.custom_jvp
def scaled(
    leaves: list[jax.Array],
    factors: Factors,
    within: jax.Array,
    zero: jax.Array | None,
) -> list[jax.Array]:
    """The leaves if ``within``, zeros if ``zero``, else products with both factors.

    Multiplied in at least float32, and rounded once to the leaf's dtype.

    Args:
      leaves: arrays of any shapes and float or complex dtypes.
      factors: as from :func:`scale_factors`, both 1 if ``within``.
      within: bool scalar. It is the derivative that depends on it, at a norm so
        little above the threshold that the factors are 1 too.
      zero: bool scalar, or None for never.
    """
    # One operation in the kernel of a leaf, where ``within`` takes three.
    keep = factors[1] == 1
    return [_scaled_leaf(leaf, factors, keep, zero) for leaf in leaves]


@scaled.defjvp
def _scaled_jvp(primals, tangents):
    """That of the products: bits have no derivative."""

    def products(leaves, factors, within, zero):
        return [_product(leaf, factors, within, zero) for leaf in leaves]

    return scaled(*primals), jax.jvp(products, primals, tangents)[1]


def _scaled_leaf(leaf, factors, keep, zero):
    bits = leaf.dtype == jnp.bfloat16 and factors[1].dtype == jnp.float32
    if not bits or is_unreduced(leaf):
        return _product(leaf, factors, keep, zero)
    return jax.lax.platform_dependent(
        leaf, factors, keep, zero, cpu=_product_by_bits, default=_product
    )


# Traced once for leaves of one type: 2,000 of them in 0.5 s for 0.7.
@functools.partial(jax.jit, inline=True)
def _product(leaf, factors, keep, zero):
    dtype = factors[1].dtype
    if jnp.iscomplexobj(leaf):
        dtype = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    shift, scale = (factor_of(leaf, factor.astype(dtype)) for factor in factors)
    product = (leaf.astype(dtype) * shift * scale).astype(leaf.dtype)
    # Selected, not multiplied by 1 or by 0: the one turns subnormal entries into
    # zeros on CPU, the other leaves NaN entries NaN.
    if zero is not None:
        product = jnp.where(zero, 0, product)
    return jax.lax.select(keep, leaf, product)


def _product_by_bits(leaf, factors, keep, zero):
    """The same for bfloat16 and XLA on CPU, which calculates in float32 only.

    It selects in it too, and makes one of the conversions to it here and of those
    for the norm: a float32 copy of the leaf, written and read back. And it converts
    to bfloat16 once for each operation that the optimizer does with the result.
    Integers have none of this: the clip added 39 ms and 1 MB to an AdamW step of
    GPT-2 small, where the product above added 182 ms and 498 MB. To go when XLA on
    CPU fuses conversions from and to bfloat16.
    """
    shift, scale = factors
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16)
    wide = jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
    wide = wide * shift * scale
    wide_bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    # To nearest: the upper half is incremented if the lower is more than half of its
    # unit, or just half and the upper odd. Infinity stays; NaN might become one.
    rounded = (wide_bits + 0x7FFF + (wide_bits >> 16 & 1)) >> 16
    rounded = jnp.where(jnp.isnan(wide), 0x7FC0, rounded).astype(jnp.uint16)
    if zero is not None:
        rounded = jnp.where(zero, 0, rounded)
    return jax.lax.bitcast_convert_type(
        jax.lax.select(keep, bits, rounded), jnp.bfloat16
    )
