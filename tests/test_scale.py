"""Rounding and selection, bit by bit, and derivatives beside the plain formula."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from optax_globalclip import clip_updates

TINY = float(np.finfo(np.float32).tiny)


def every_bfloat16():
    return np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def bits(array):
    return np.asarray(array).view(np.uint16)


@pytest.mark.parametrize("max_norm", [0.3, 0.9999, 1 / 3, 1e-3, 3e-30, 0.0])
def test_every_bfloat16_is_rounded_as_ieee_says(max_norm):
    leaf = every_bfloat16()
    clipped, _ = jax.jit(clip_updates)(leaf, np.float32(max_norm), use_norm=1.0)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        product = leaf.astype(np.float32) * np.float32(max_norm)
        expected = product.astype(ml_dtypes.bfloat16)
    # Subnormal numbers are zeros to XLA on CPU.
    normal = (np.abs(leaf.astype(np.float32)) >= TINY) & (np.abs(product) >= TINY)
    assert normal.sum() > (1000 if max_norm else -1)
    np.testing.assert_array_equal(bits(clipped)[normal], bits(expected)[normal])
    nan = np.isnan(product)
    assert np.isnan(np.asarray(clipped)[nan].astype(np.float32)).all()
    zero = product == 0
    assert (np.asarray(clipped)[zero].astype(np.float32) == 0).all()


@pytest.mark.parametrize("nonfinite", ["nan", "zero"])
def test_every_bfloat16_is_kept_within_the_threshold(nonfinite):
    leaf = every_bfloat16()
    clipped, _ = clip_updates(leaf, 2.0, use_norm=1.0, nonfinite=nonfinite)
    np.testing.assert_array_equal(bits(clipped), bits(leaf))


def test_ties_go_to_even_in_bfloat16():
    # By 3/2, an odd number of 8 bits becomes one of 9 bits that ends in 1: a tie.
    leaf = np.arange(129, 170, 2).astype(ml_dtypes.bfloat16)
    product = leaf.astype(np.float32) * np.float32(0.75)
    low = product.view(np.uint32) & 0xFFFF
    upper_is_odd = (product.view(np.uint32) >> 16) & 1
    assert (low == 0x8000).all()
    assert set(upper_is_odd) == {0, 1}
    expected = product.astype(ml_dtypes.bfloat16)
    assert not (bits(expected) & 1).any()
    for function in (clip_updates, jax.jit(clip_updates)):
        for sign in (1, -1):
            clipped, _ = function(leaf * leaf.dtype.type(sign), 0.75, use_norm=1.0)
            np.testing.assert_array_equal(clipped, expected * leaf.dtype.type(sign))


def plain(updates, max_norm):
    """The formula, with nothing that makes it fast or safe."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in updates]
    norm = jnp.sqrt(sum(squares))
    scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return [(x.astype(jnp.float32) * scale).astype(x.dtype) for x in updates]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("max_norm", [0.7, 100.0])
@pytest.mark.parametrize("size", [60, 5000])
def test_derivatives_are_those_of_the_plain_formula(dtype, max_norm, size):
    rng = np.random.default_rng(0)
    updates = [jnp.asarray(rng.standard_normal(size), dtype) for _ in range(2)]
    weights = [jnp.asarray(rng.standard_normal(size), dtype) for _ in range(2)]

    def through(clip):
        def loss(updates, max_norm):
            products = zip(clip(updates, max_norm), weights, strict=True)
            return sum(jnp.vdot(x, w).astype(jnp.float32) for x, w in products)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(updates, max_norm)

    ours, slope = through(lambda updates, c: clip_updates(updates, c)[0])
    theirs, plain_slope = through(plain)
    eps = float(jnp.finfo(dtype).eps)
    for own, other in zip(ours, theirs, strict=True):
        own, other = np.asarray(own, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(own, other, rtol=eps, atol=eps * np.abs(other).max())
    np.testing.assert_allclose(slope, plain_slope, rtol=8 * eps)


def test_derivative_at_a_norm_just_above_the_threshold_is_that_of_the_clip():
    # The quotient rounds to 1: the leaf is kept, and still on the sphere.
    updates, threshold = jnp.array([1.0, 0.0]), np.float32(1 - 2**-24)
    jacobian = jax.jacobian(lambda x: clip_updates(x, threshold, use_norm=1.0)[0])
    np.testing.assert_allclose(jacobian(updates), threshold * np.eye(2), rtol=1e-6)
    jacobian = jax.jacobian(lambda x: clip_updates(x, threshold)[0])
    np.testing.assert_allclose(jacobian(updates), np.diag([0.0, 1.0]), atol=1e-6)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_nan_as_the_threshold_makes_every_entry_nan(dtype, bits):
    nan = jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)
    entries = jnp.asarray([1.0, -2.0, 0.0, 3e38, jnp.inf, -jnp.inf], dtype)
    for leaf in (entries, entries[:4]):
        clipped, _ = clip_updates(leaf, nan)
        assert np.isnan(np.asarray(clipped, np.float32)).all()


@pytest.mark.parametrize("bits", [0x7FC0, 0x7FFF, 0x7F81, 0xFFFF, 0xFFC1])
def test_any_nan_among_the_entries_stays_one(bits):
    nan = jax.lax.bitcast_convert_type(jnp.uint16(bits), jnp.bfloat16)
    leaf = jnp.stack([nan, jnp.bfloat16(1), jnp.bfloat16(jnp.inf)])
    for max_norm in (0.0, 1.0, jnp.inf):
        clipped, _ = clip_updates(leaf, max_norm)
        assert np.isnan(np.asarray(clipped, np.float32)).all()
