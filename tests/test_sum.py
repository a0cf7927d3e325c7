"""Sums in packs and chunks, beside float64, at the sizes where the code changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from optax_globalclip import global_norm

EDGES = [1, 4095, 4096, 4097, 8191, 16 * 4097 + 5, 65536, 2**20 - 1, 2**20 + 70000]


def entries(size, dtype, scale=1.0):
    values = np.random.default_rng(size).standard_normal(size) * scale
    if dtype == "complex64":
        values = values + 1j * np.roll(values, 1)
    return np.asarray(jnp.asarray(values, dtype))


def exact(leaves):
    squares = [np.sum(np.square(np.abs(_wide(leaf)))) for leaf in leaves]
    return np.sqrt(np.sum(squares))


def _wide(leaf):
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("size", EDGES)
def test_norm_of_one_leaf(dtype, size):
    leaf = entries(size, dtype)
    np.testing.assert_allclose(global_norm(leaf), exact([leaf]), rtol=4e-7)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-37])
@pytest.mark.parametrize("size", EDGES)
def test_norm_of_one_leaf_whose_squares_leave_the_range(size, scale):
    leaf = entries(size, "float32", scale)
    np.testing.assert_allclose(global_norm(leaf), exact([leaf]), rtol=4e-7)


@pytest.mark.parametrize("size", [2**20 - 1, 2**20 + 70000])
def test_norm_of_one_leaf_of_subnormal_entries(size):
    leaf = entries(size, "float32", 5e-41)
    np.testing.assert_allclose(global_norm(leaf), exact([leaf]), rtol=4e-7)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_bfloat16_whose_squares_leave_the_range(scale):
    tree = [entries(2**17 + 3, "bfloat16", scale)] * 3 + [entries(9, "bfloat16", scale)]
    np.testing.assert_allclose(global_norm(tree), exact(tree), rtol=4e-7)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130])
def test_packs_of_every_length(dtype, count):
    tree = [entries(7, dtype)] * count + [entries(8, dtype).reshape(2, 2, 2)] * 3
    np.testing.assert_allclose(global_norm(tree), exact(tree), rtol=4e-7)


@pytest.mark.parametrize("count", [2, 15, 16, 17, 40])
def test_leaves_of_one_type_that_are_read_in_chunks_together(count):
    tree = [entries(5000 + 7, "float16") * np.float16(i + 1) for i in range(count)]
    np.testing.assert_allclose(global_norm(tree), exact(tree), rtol=4e-7)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_equal_entries_are_added_without_drift(dtype):
    # Added one after the other, 2**22 of them are off by 3e-5.
    leaf = np.full(2**22 + 1, 0.3, dtype)
    np.testing.assert_allclose(global_norm(leaf), exact([leaf]), rtol=4e-7)
    big = np.full(2**22 + 1, 3e30, np.float32)
    np.testing.assert_allclose(global_norm(big), exact([big]), rtol=4e-7)


@pytest.mark.parametrize("place", [0, 65535, 65536, 2**20 - 1, 2**20 + 69999])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_bad_entry_is_found_in_any_chunk(dtype, place):
    leaf = np.zeros(2**20 + 70000, jnp.dtype(dtype))
    for bad in (np.nan, np.inf):
        leaf[place] = bad
        np.testing.assert_array_equal(global_norm(leaf), bad)
    leaf[place] = 3
    assert global_norm(leaf) == 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", [2**31 - 65536, 2**31 - 65535, 3 * 2**30])
def test_leaf_with_more_entries_than_int32_counts(dtype, size):
    leaf = jax.ShapeDtypeStruct((size,), jnp.dtype(dtype))
    text = jax.jit(global_norm).lower(leaf).as_text()
    assert ("dynamic_slice" in text) == (size <= 2**31 - 65536)


def test_mapped_over_examples():
    batch = entries(3 * 70000, "float16").reshape(3, 70000)
    norms = jax.vmap(global_norm)(batch)
    np.testing.assert_allclose(norms, [exact([row]) for row in batch], rtol=4e-7)


def test_chunks_of_a_shard():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    norm = jax.shard_map(global_norm, mesh=mesh, in_specs=P("data"), out_specs=P())
    tree = [entries(8 * 70000, "float16"), entries(8 * 30, "float16")]
    np.testing.assert_allclose(jax.jit(norm)(tree), exact(tree), rtol=4e-7)
    tree = [entries(8 * 70000, "float32", 1e30), entries(8 * 30, "float32")]
    np.testing.assert_allclose(jax.jit(norm)(tree), exact(tree), rtol=4e-7)
