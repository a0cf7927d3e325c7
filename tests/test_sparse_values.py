"""Sparse leaves hold the norm of the matrix that JAX makes of them, in float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, strategies as st
from jax.experimental import sparse

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    skip_by_global_norm,
)

# --- The matrix, in float64.


def dense_bcoo(data, indices, shape):
    """Sums the values at each index, by batch; leaves out indices outside the shape.

    As in NumPy, negative indices count from the end.
    """
    data, indices = _wide(data), np.asarray(indices)
    num_batch, num_sparse = indices.ndim - 2, indices.shape[-1]
    batch = shape[:num_batch]
    nse = max(data.shape[num_batch], indices.shape[num_batch])
    dense_shape = shape[num_batch + num_sparse :]
    data = np.broadcast_to(data, (*batch, nse, *dense_shape))
    indices = np.broadcast_to(indices, (*batch, nse, num_sparse))
    out = np.zeros(shape, data.dtype)
    for where in itertools.product(*map(range, batch)):
        for value, index in zip(data[where], indices[where], strict=True):
            sizes = shape[num_batch : num_batch + num_sparse]
            if all(-size <= i < size for i, size in zip(index, sizes, strict=True)):
                out[(*where, *index)] += value
    return out


def dense_bcsr(data, indices, indptr, shape):
    """The same for compressed rows: no value beyond the last row's end."""
    indptr = np.asarray(indptr)
    batch = shape[: indptr.ndim - 1]
    data = np.broadcast_to(_wide(data), (*batch, *data.shape[len(batch) :]))
    indices = np.broadcast_to(
        np.asarray(indices), (*batch, *indices.shape[len(batch) :])
    )
    indptr = np.broadcast_to(indptr, (*batch, indptr.shape[-1]))
    out, columns = np.zeros(shape, data.dtype), shape[len(batch) + 1]
    for where in itertools.product(*map(range, batch)):
        rows = indptr[where]
        for row in range(shape[len(batch)]):
            for k in range(rows[row], rows[row + 1]):
                column = indices[where][k]
                if -columns <= column < columns:
                    out[(*where, row, column)] += data[where][k]
    return out


def _wide(data):
    data = np.asarray(data)
    return data.astype(np.complex128 if np.iscomplexobj(data) else np.float64)


def dense(matrix):
    if isinstance(matrix, sparse.BCSR):
        parts = (matrix.data, matrix.indices, matrix.indptr)
        return dense_bcsr(*parts, matrix.shape)
    return dense_bcoo(matrix.data, matrix.indices, matrix.shape)


def bcoo(data, indices, shape, dtype="float32", **flags):
    data = np.asarray(data).astype(jnp.dtype(dtype))
    indices = np.asarray(indices, np.int32)
    return sparse.BCOO((jnp.asarray(data), jnp.asarray(indices)), shape=shape, **flags)


def bcsr(data, indices, indptr, shape, dtype="float32", **flags):
    data = jnp.asarray(np.asarray(data).astype(jnp.dtype(dtype)))
    indices, indptr = (jnp.asarray(x, jnp.int32) for x in (indices, indptr))
    return sparse.BCSR((data, indices, indptr), shape=shape, **flags)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --- The matrices.

ROWS = np.array([[0], [2], [2]])
DUPLICATES = {
    "bfloat16 rows at one index": lambda: bcoo(
        np.full((512, 2), math.sqrt(2)), np.zeros((512, 1)), (4, 2), "bfloat16"
    ),
    "bfloat16 entries at one index": lambda: bcoo(
        np.ones(512), np.full((512, 1), 3), (4,), "bfloat16"
    ),
    "float16 of equal signs": lambda: bcoo(
        [6e4, 6e4, 1.0], [[1], [1], [0]], (3,), "float16"
    ),
    "float16 of opposite signs": lambda: bcoo(
        [6e4, 6e4, -6e4, -6e4, 3.0], [[1], [1], [1], [1], [0]], (3,), "float16"
    ),
    "float16, many": lambda: bcoo(
        np.full((2049, 1), 1.0), np.zeros((2049, 1)), (1, 1), "float16"
    ),
    "float16 compressed": lambda: bcsr(
        [6e4, 6e4, -6e4, 1.0], [0, 0, 0, 1], [0, 3, 4], (2, 2), "float16"
    ),
    "bfloat16 compressed": lambda: bcsr(
        np.ones(512), np.zeros(512), [0, 512, 512], (2, 2), "bfloat16"
    ),
    "complex": lambda: bcoo([1 + 1j, 1 - 1j, 3j], [[0], [0], [1]], (2,), "complex64"),
}
NEGATIVE = {
    "from the end": lambda: bcoo([3.0, 4.0], [[-1], [0]], (4,)),
    "the same index twice": lambda: bcoo([3.0, 4.0], [[-1], [3]], (4,)),
    "unique": lambda: bcoo([3.0, 4.0], [[-1], [0]], (4,), unique_indices=True),
    "too far": lambda: bcoo([3.0, 100.0], [[-4], [-5]], (4,)),
    "in one of two dimensions": lambda: bcoo(
        [3.0, 4.0, 99.0], [[0, -1], [0, 1], [-3, 0]], (2, 2)
    ),
    "compressed": lambda: bcsr([3.0, 4.0, 5.0], [-1, 1, 0], [0, 2, 3], (2, 2)),
}
PADDED = {
    "just outside": lambda: bcoo([3.0, 4.0, 100.0], [[0], [1], [3]], (3,)),
    "far outside": lambda: bcoo([3.0, 100.0], [[0], [2**31 - 1]], (3,)),
    "in one of two dimensions": lambda: bcoo(
        [3.0, 100.0, 99.0], [[0, 1], [0, 2], [2, 0]], (2, 2)
    ),
    "rows": lambda: bcoo(draw(3, 4), [[0], [9], [1]], (9, 4)),
    "bfloat16": lambda: bcoo([3.0, 100.0], [[0], [3]], (3,), "bfloat16"),
    "NaN": lambda: bcoo([3.0, np.nan, 4.0], [[0], [3], [1]], (3,)),
    "inf": lambda: bcoo([3.0, np.inf, -np.inf], [[0], [3], [3]], (3,)),
    "all of them": lambda: bcoo([3.0, np.nan], [[3], [3]], (3,)),
    "unique": lambda: bcoo([3.0, 9.0], [[0], [3]], (3,), unique_indices=True),
    "unique, NaN": lambda: bcoo([3.0, np.nan], [[0], [3]], (3,), unique_indices=True),
    "batched": lambda: bcoo(
        [[1.0, 2.0, 50.0], [3.0, 50.0, 50.0]],
        [[[0], [1], [4]], [[2], [4], [4]]],
        (2, 4),
    ),
    "by fromdense": lambda: sparse.BCOO.fromdense(jnp.eye(3), nse=8),
    "by sum_duplicates": lambda: sparse.bcoo_sum_duplicates(
        bcoo([1.0, 2.0, 4.0], [[1], [1], [0]], (3,)), nse=5
    ),
}
COMPRESSED = {
    "beyond the end": lambda: bcsr([3.0, 4.0, 100.0], [0, 1, 1], [0, 1, 2], (2, 2)),
    "NaN beyond the end": lambda: bcsr([3.0, np.nan], [0, 1], [0, 1, 1], (2, 2)),
    "all beyond": lambda: bcsr([3.0, np.nan], [0, 1], [0, 0, 0], (2, 2)),
    "column outside": lambda: bcsr([3.0, 100.0], [0, 2], [0, 1, 2], (2, 2)),
    "beyond, unique": lambda: bcsr(
        [3.0, 100.0], [0, 1], [0, 1, 1], (2, 2), unique_indices=True
    ),
    "beyond, batched": lambda: bcsr(
        [[3.0, 100.0], [4.0, 12.0]],
        [[0, 1], [0, 1]],
        [[0, 1, 1], [0, 1, 2]],
        (2, 2, 2),
    ),
    "twice at one index": lambda: bcsr([3.0, 4.0, 1.0], [1, 1, 0], [0, 2, 3], (2, 2)),
    "by fromdense": lambda: sparse.BCSR.fromdense(jnp.eye(3), nse=8),
}
BATCHES = {
    "data": lambda: bcoo(draw(1, 3), np.stack([ROWS] * 4), (4, 3)),
    "indices": lambda: bcoo(draw(4, 3), ROWS[None], (4, 3)),
    "both": lambda: bcoo(draw(1, 3), ROWS[None], (4, 3)),
    "two dimensions": lambda: bcoo(draw(2, 1, 3), np.stack([[ROWS] * 3]), (2, 3, 3)),
    "rows of values": lambda: bcoo(draw(1, 3, 2), ROWS[None], (4, 3, 2)),
    "unique": lambda: bcoo(
        draw(1, 2), np.array([[[0], [2]]]), (4, 3), unique_indices=True
    ),
    "padded": lambda: bcoo(draw(1, 3), np.array([[[0], [3], [2]]]), (4, 3)),
    "compressed": lambda: bcsr(
        draw(1, 3), np.array([[0, 1, 1]] * 4), np.array([[0, 1, 3]] * 4), (4, 2, 2)
    ),
    "compressed, indices": lambda: bcsr(
        draw(4, 3), np.array([[0, 1, 1]]), np.array([[0, 1, 3]]), (4, 2, 2)
    ),
    "none to broadcast": lambda: bcoo(draw(4, 3), np.stack([ROWS] * 4), (4, 3)),
    "dense dimension": lambda: bcoo(draw(3, 2, 5), ROWS, (3, 2, 5)),
    "only dense dimensions": lambda: bcoo(draw(3, 2), np.zeros((3, 0)), (2,)),
    "no entries": lambda: bcoo(draw(0, 2), np.zeros((0, 1)), (4, 2)),
}
MATRICES = {
    f"{group}: {name}": make
    for group, matrices in {
        "duplicates": DUPLICATES,
        "negative": NEGATIVE,
        "padded": PADDED,
        "compressed": COMPRESSED,
        "batches": BATCHES,
    }.items()
    for name, make in matrices.items()
}
each_matrix = pytest.mark.parametrize("case", MATRICES)
FINITE = [name for name in MATRICES if "inf" not in name and "NaN" not in name]


@each_matrix
def test_oracle_is_the_matrix_that_jax_makes(case):
    """On values that are not lost in half precision, nor NaN outside the shape."""
    matrix = MATRICES[case]()
    (data, *indices), treedef = jax.tree.flatten(matrix)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.nan_to_num(_wide(data), posinf=7, neginf=7))
        matrix = treedef.unflatten([wide, *indices])
        if case == "batches: only dense dimensions":
            pytest.skip("todense of JAX 0.10.2 fails without sparse dimensions")
        np.testing.assert_allclose(dense(matrix), matrix.todense(), 1e-12)


@functools.cache
def everything(case):
    """The matrix, and what one program makes of it beside a dense leaf."""
    matrix = MATRICES[case]()

    def measure(tree, max_norm):
        return *clip_updates(tree, max_norm), leaf_norms(tree)

    tree = {"sparse": matrix, "dense": np.float32([3, 4])}
    return (
        matrix,
        oracle.norm([dense(matrix), tree["dense"]]),
        jax.jit(measure)(tree, 0.5),
    )


@each_matrix
def test_norm_is_that_of_the_matrix(case):
    matrix, expected, (_, norm, each) = everything(case)
    np.testing.assert_allclose(norm, expected, 2e-6)
    np.testing.assert_allclose(each["sparse"], oracle.norm(dense(matrix)), 2e-6)
    np.testing.assert_allclose(each["dense"], 5, 1e-6)


@pytest.mark.parametrize(
    "case",
    ["duplicates: float16 of opposite signs", "padded: NaN", "batches: both"],
)
def test_norm_outside_jit_is_that_of_the_matrix(case):
    matrix, expected, _ = everything(case)
    tree = [matrix, np.float32([3, 4])]
    np.testing.assert_allclose(global_norm(tree), expected, 2e-6)
    expected = oracle.norm(dense(matrix))
    np.testing.assert_allclose(leaf_norms(tree)[0], expected, 2e-6)


@pytest.mark.parametrize("case", [*DUPLICATES, *PADDED])
def test_norm_of_other_orders_is_that_of_the_matrix(case):
    matrix, orders = (DUPLICATES | PADDED)[case](), (1, 3, math.inf)
    found = jax.jit(lambda m: [global_norm(m, ord=ord) for ord in orders])(matrix)
    expected = [oracle.norm(dense(matrix), ord) for ord in orders]
    np.testing.assert_allclose(found, expected, 2e-6)


@pytest.mark.parametrize("case", FINITE)
def test_stored_values_are_scaled_and_indices_stay(case):
    """Padding too: a value that nobody reads may well be scaled."""
    matrix, expected, (clipped, _, _) = everything(case)
    found, stored = jax.tree.leaves(clipped["sparse"]), jax.tree.leaves(matrix)
    assert jax.tree.structure(clipped["sparse"]) == jax.tree.structure(matrix)
    assert (found[0].dtype, found[0].shape) == (stored[0].dtype, stored[0].shape)
    for index, same in zip(found[1:], stored[1:], strict=True):
        np.testing.assert_array_equal(index, same)
    tolerance = oracle.eps(stored[0]) + 2e-6
    half = stored[0].dtype == np.float16
    np.testing.assert_allclose(
        _wide(found[0]),
        _wide(stored[0]) * (0.5 / expected),
        tolerance,
        float(jnp.finfo(np.float16).smallest_subnormal) if half else 1e-37,
    )


@pytest.mark.parametrize("case", [*PADDED, *COMPRESSED])
def test_values_outside_the_matrix_make_nothing_non_finite(case):
    matrix = (PADDED | COMPRESSED)[case]()
    leaf = np.float32([30.0, 40.0])
    tx = clip_by_global_norm(1.0, nonfinite="zero")
    updates, state = jax.jit(tx.update)([matrix, leaf], tx.init(None))
    assert (state.num_nonfinite, state.num_clipped) == (0, 1)
    expected = leaf / oracle.norm([dense(matrix), leaf])
    np.testing.assert_allclose(updates[1], expected, 1e-5)


@pytest.mark.parametrize("case", ["NaN", "just outside", "bfloat16"])
def test_steps_are_not_skipped_for_values_outside_the_matrix(case):
    matrix = PADDED[case]()
    tx = skip_by_global_norm(clip_by_global_norm(6.0), 6.0)
    updates, state = jax.jit(tx.update)([matrix], tx.init([matrix]))
    assert (state.num_skipped, state.inner_state.num_clipped) == (0, 0)
    np.testing.assert_array_equal(
        np.asarray(updates[0].data, np.float64), np.asarray(matrix.data, np.float64)
    )


@pytest.mark.parametrize("case", FINITE[::4])
def test_norm_within_the_threshold_keeps_every_stored_value(case):
    matrix = MATRICES[case]()
    max_norm = 1.01 * oracle.norm(dense(matrix)) + 1e-3
    clipped, _ = clip_updates(matrix, max_norm)
    assert np.asarray(clipped.data).tobytes() == np.asarray(matrix.data).tobytes()


def test_float16_values_that_add_up_beyond_float16_are_clipped():
    matrix = DUPLICATES["float16 of equal signs"]()
    clipped, norm = clip_updates(matrix, 1.2)
    np.testing.assert_allclose(norm, 1.2e5, 1e-3)
    np.testing.assert_allclose(oracle.norm(dense(clipped)), 1.2, 2e-3)


def test_float64_values_are_summed_in_float64():
    with jax.enable_x64(True):
        data = [1.0, 1e-12, -1.0, 3e-13]
        matrix = bcoo(data, [[0], [0], [0], [1]], (2,), "float64")
        np.testing.assert_allclose(
            global_norm(matrix), oracle.norm(dense(matrix)), 1e-12
        )


def test_half_precision_values_beside_float64_are_summed_in_float64():
    with jax.enable_x64(True):
        data = [2.0**15] * 3 + [2.0**-14]
        matrix = bcoo(data, np.zeros((4, 1)), (2,), "float16")
        tree = [matrix, np.float64([1e-3])]
        expected = oracle.norm([dense(matrix), tree[1]])
        np.testing.assert_allclose(global_norm(tree), expected, 1e-13)


# --- Any matrix of a few fixed shapes.

finite = st.floats(-10, 10, width=16)


@functools.cache
def measured():
    def measure(matrix, max_norm):
        clipped, norm = clip_updates([matrix], max_norm)
        return clipped[0], norm, leaf_norms([matrix])[0]

    return jax.jit(measure)


def check(matrix):
    expected = oracle.norm(dense(matrix))
    max_norm = np.float32(expected / 2 + 0.25)
    clipped, norm, each = measured()(matrix, max_norm)
    # Values that cancel leave the rounding errors of their sum.
    rounding = 1e-6 * float(np.abs(_wide(matrix.data)).sum())
    np.testing.assert_allclose(norm, expected, 2e-6, rounding)
    np.testing.assert_allclose(each, expected, 2e-6, rounding)
    scale = 1.0 if expected <= max_norm else float(max_norm) / expected
    tolerance = oracle.eps(matrix.data) + 1e-4
    np.testing.assert_allclose(
        _wide(clipped.data), _wide(matrix.data) * scale, tolerance, 1e-7
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_rows_of_a_matrix(dtype):
    @given(
        st.lists(finite, min_size=12, max_size=12),
        st.lists(st.integers(0, 6), min_size=6, max_size=6),
    )
    def check_rows(values, rows):
        data = np.reshape(values, (6, 2))
        check(bcoo(data, np.reshape(rows, (6, 1)), (4, 2), dtype))

    check_rows()


@pytest.mark.parametrize("data_batch", [1, 2])
@pytest.mark.parametrize("index_batch", [1, 2])
def test_any_batch_of_entries(data_batch, index_batch):
    size, num = 5 * data_batch, 10 * index_batch

    @given(
        st.lists(finite, min_size=size, max_size=size),
        st.lists(st.integers(0, 3), min_size=num, max_size=num),
    )
    def check_batch(values, indices):
        data = np.reshape(values, (data_batch, 5))
        check(bcoo(data, np.reshape(indices, (index_batch, 5, 2)), (2, 3, 3)))

    check_batch()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_compressed_rows(dtype):
    @given(
        st.lists(finite, min_size=6, max_size=6),
        st.lists(st.integers(0, 3), min_size=6, max_size=6),
        st.lists(st.integers(0, 6), min_size=3, max_size=3),
    )
    def check_rows(values, columns, ends):
        check(bcsr(values, columns, [0, *sorted(ends)], (3, 3), dtype))

    check_rows()


def test_vmap_over_the_batch_of_a_matrix():
    matrix = bcoo(draw(4, 3), np.stack([ROWS] * 4), (4, 3))
    norms = jax.vmap(global_norm)(matrix)
    expected = [oracle.norm(row) for row in dense(matrix)]
    np.testing.assert_allclose(norms, expected, 2e-6)


def test_gradient_leaves_out_values_outside_the_matrix():
    indices = jnp.array([[0], [1], [1], [3]])

    def norm(data):
        return global_norm(sparse.BCOO((data, indices), shape=(3,)))

    found = jax.grad(norm)(jnp.array([3.0, 1.0, 3.0, 7.0]))
    np.testing.assert_allclose(found, [0.6, 0.8, 0.8, 0], 1e-6)
    assert jnp.isfinite(jax.grad(norm)(jnp.array([3.0, 1.0, 3.0, math.nan]))[:3]).all()


@pytest.mark.parametrize("ord", [2, 3, math.inf])
@pytest.mark.parametrize("rows", [False, True])
def test_stored_zero_has_the_derivative_of_the_entry_it_adds_to(rows, ord):
    def norm(data):
        if rows:
            columns, ends = jnp.array([1, 1, 2]), jnp.array([0, 2, 3])
            matrix = sparse.BCSR((data, columns, ends), shape=(2, 3))
        else:
            indices = jnp.array([[0, 1], [0, 1], [1, 2]])
            matrix = sparse.BCOO((data, indices), shape=(2, 3))
        return global_norm([matrix], ord=ord)

    # The entries are 7 and 2.
    total = 53**0.5 if ord == 2 else 351 ** (1 / 3) if ord == 3 else 7
    share = 1 if ord == math.inf else (7 / total) ** (ord - 1)
    for data in ([7.0, 0.0, 2.0], [0.0, 7.0, 2.0], [3.0, 4.0, 2.0]):
        found = jax.grad(norm)(jnp.array(data))
        np.testing.assert_allclose(found[:2], [share, share], 1e-6)


def test_numpy_arrays_may_hold_the_values():
    data = np.ones(512, ml_dtypes.bfloat16)
    matrix = sparse.BCOO((data, np.zeros((512, 1), np.int32)), shape=(2,))
    np.testing.assert_allclose(global_norm(matrix), 512, 1e-6)


def test_values_at_one_index_that_overflow_are_an_infinite_entry():
    matrix = bcoo([3e38, 3e38, 1.0], [[1], [1], [0]], (3,))
    clipped, norm = clip_updates(matrix, 1.0, nonfinite="zero")
    assert norm == math.inf
    np.testing.assert_array_equal(clipped.data, [0, 0, 0])
    # Stored values that are entries themselves are clipped however large they are.
    matrix = bcoo([3e38, 3e38, 1.0], [[1], [2], [0]], (3,), unique_indices=True)
    clipped, norm = clip_updates(matrix, 1.0)
    assert norm == math.inf
    np.testing.assert_allclose(clipped.data, [0.5**0.5, 0.5**0.5, 0], 1e-6, 1e-30)
