"""What counts as a leaf: arrays of every dtype and layout, and sparse matrices."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, strategies as st
from jax.experimental import sparse
from jax.sharding import PartitionSpec as P

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    skip_by_global_norm,
)

FUNCTIONS = {
    "global_norm": global_norm,
    "leaf_norms": leaf_norms,
    "clip_updates": lambda updates: clip_updates(updates, 1.0),
    "update": lambda updates: clip_by_global_norm(1.0).update(updates, None),
    "jit": lambda updates: jax.jit(global_norm)(updates),
}
BAD = {
    "int array": (jnp.arange(3), r"int32\[3\]"),
    "Python int": (7, "7"),
    "key": (jax.random.key(0), r"key<fry>\[\]"),
    "str": ("adam", "'adam'"),
    "object": (object(), "object"),
    "masked array": (np.ma.masked_array([3.0, 4.0], [0, 1]), r"\.filled\(0\)"),
    "big-endian": (np.ones(2, ">f4"), r"\.astype"),
    "integer matrix": (sparse.BCOO.fromdense(jnp.eye(3, dtype=int)), r"int32\[3,3\]"),
    "other format": (sparse.CSR.fromdense(jnp.eye(3)), "BCOO.*CSR"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", BAD)
def test_leaves_without_a_norm_are_named(function, case):
    leaf, description = BAD[case]
    if function == "jit" and not isinstance(leaf, jax.Array | sparse.JAXSparse):
        pytest.skip("jax.jit has its own error for what it cannot trace")
    tree = {"layer": [jnp.ones(3), {"step": leaf}], "none": None}
    where = r"updates\['layer'\]\[1\]\['step'\] is "
    with pytest.raises(TypeError, match=f"{where}.*{description}"):
        FUNCTIONS[function](tree)
    with pytest.raises(TypeError, match=f"^updates is .*{description}"):
        FUNCTIONS[function](leaf)


class Wrapped:
    """An object that JAX takes for an array, as Flax NNX has them."""

    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return self.array


def test_wrapped_arrays_are_what_they_wrap():
    clipped, norm = clip_updates([Wrapped(jnp.array([3.0, 4.0]))], 1.0)
    assert norm == 5
    np.testing.assert_allclose(clipped[0], [0.6, 0.8], 1e-6)
    weak = jnp.asarray(1.5)
    with jax.enable_x64(True):
        clipped, norm = clip_updates([Wrapped(weak)], 1.0)
    assert (clipped[0].dtype, norm.dtype) == (jnp.float32, jnp.float32)
    float0 = np.zeros(2, jax.dtypes.float0)
    tree = [Wrapped(float0), jnp.array([3.0, 4.0])]
    assert leaf_norms(tree) == [0, 5]
    updates, _ = skip_by_global_norm(optax.identity(), 10.0).update(tree, None)
    assert (updates[0].dtype, updates[0].shape) == (float0.dtype, (2,))


def test_what_is_passed_through():
    tangent = np.zeros(3, jax.dtypes.float0)
    tree = {"a": None, "b": optax.MaskedNode(), "c": tangent, "w": jnp.array([2.0])}
    tree["t"] = (jnp.zeros(1), None, [[], ()])
    clipped, measured = clip_updates(tree, 1.0)
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
    assert (measured, clipped["w"]) == (2, 1)
    assert clipped["c"] is tangent


def test_python_and_numpy_scalars():
    tree = [3.0, np.array([4.0], np.float16), np.float32(12)]
    clipped, measured = clip_updates(tree, 1.0)
    assert measured == 13
    assert [x.dtype for x in clipped] == [jnp.float32, jnp.float16, jnp.float32]
    assert not any(leaf.weak_type for leaf in clipped)
    np.testing.assert_allclose(float(clipped[0]), 3 / 13, 1e-6)
    assert global_norm(2j) == 2


# --- Every float dtype that JAX has.

DTYPES = """
float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz
float8_e5m2 float8_e5m2fnuz float8_e8m0fnu bfloat16 float16 float32 float64 complex64
complex128
"""
DTYPES = [name for name in DTYPES.split() if hasattr(jnp, name)]


def test_table_of_dtypes_is_complete():
    kinds = "float", "bfloat", "complex"
    known = {name for name in dir(jnp) if name.startswith(kinds)}
    known = {name for name in known if isinstance(getattr(jnp, name), type(jnp.int32))}
    # XLA on CPU has no floats of six bits.
    known = {name for name in known if not name.startswith("float6")}
    assert known - {"floating", "complexfloating", "float_", "complex_"} <= {*DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10, 5000])
def test_every_float_dtype(dtype, size):
    """Powers of two that every dtype can hold: e8m0 has no sign and no zero."""
    double = dtype in ("float64", "complex128")
    values = 2.0 ** np.random.default_rng(size).integers(0, 3, size)
    norm = oracle.norm(values)
    with jax.enable_x64(double):
        leaf = jnp.asarray(values.astype(jnp.dtype(dtype)))
        for found in (global_norm([leaf]), leaf_norms([leaf])[0]):
            assert found.dtype == (jnp.float64 if double else jnp.float32)
            np.testing.assert_allclose(found, norm, 1e-6)
        tx = skip_by_global_norm(clip_by_global_norm(np.float32(2 * norm)), 1e6)
        kept, state = jax.jit(tx.update)([leaf], tx.init([leaf]))
        assert (state.num_skipped, state.inner_state.num_clipped) == (0, 0)
        assert np.asarray(kept[0]).tobytes() == np.asarray(leaf).tobytes()
        (clipped,), _ = jax.jit(clip_updates)([leaf], np.float32(norm / 2))
        assert (clipped.dtype, clipped.shape) == (leaf.dtype, leaf.shape)
        # Halves of powers of two are exact, except below a dtype's smallest number.
        halves = np.float32(values / 2)
        rounded = halves.astype(leaf.real.dtype).astype(np.float64)
        error = np.abs(np.asarray(clipped).astype(np.complex128) - halves)
        assert (error <= np.abs(rounded - halves) + 1e-5 * values).all()


# --- NumPy arrays as they lie in memory.

BASE = np.arange(1.0, 61, dtype=np.float32).reshape(6, 10)
STRIDED = {
    "every other": BASE[:, ::2],
    "backwards": BASE[::-1, ::-3],
    "transposed": BASE.T,
    "Fortran": np.asfortranarray(BASE),
    "broadcast": np.broadcast_to(BASE[0], (3, 10)),
    "diagonal": np.einsum("ii->i", BASE[:, :6]),
    "field": np.ones(5, [("w", "f4"), ("b", "i4")])["w"],
    "unaligned": np.frombuffer(b"\0" + BASE.tobytes(), np.uint8)[1:].view(np.float32),
    "read-only": np.frombuffer(BASE.tobytes(), np.float32),
}


@pytest.mark.parametrize("case", STRIDED)
def test_numpy_arrays_count_however_they_lie_in_memory(case):
    leaf, before = STRIDED[case], STRIDED[case].copy()
    for clip in (clip_updates, jax.jit(clip_updates)):
        clipped, norm = clip([leaf], 1.0)
        np.testing.assert_allclose(norm, oracle.norm(leaf), 1e-6)
        np.testing.assert_allclose(clipped[0], before / oracle.norm(before), 1e-5)
        np.testing.assert_array_equal(leaf, before)


# --- Sparse matrices.


def dense(matrix):
    """The matrix in float64: values at one index summed, those outside left out.

    As in NumPy, negative indices count from the end.
    """
    num_batch, shape = matrix.n_batch, matrix.shape

    def full(part):
        part = np.asarray(part)
        return np.broadcast_to(part, (*shape[:num_batch], *part.shape[num_batch:]))

    data, out = full(_wide(matrix.data)), np.zeros(shape, _wide(matrix.data).dtype)
    for where in np.ndindex(*shape[:num_batch]):
        indices = full(matrix.indices)[where]
        if isinstance(matrix, sparse.BCSR):
            rows = np.diff(full(matrix.indptr)[where])
            rows = np.repeat(np.arange(rows.size), rows)
            indices = np.stack([rows, indices[: rows.size]], 1)
        sizes = shape[num_batch:][: indices.shape[1]]
        for value, index in zip(data[where], indices, strict=False):
            if all(-size <= i < size for i, size in zip(index, sizes, strict=True)):
                out[(*where, *index)] += value
    return out


def _wide(data):
    data = np.asarray(data)
    return data.astype(np.complex128 if np.iscomplexobj(data) else np.float64)


def bcoo(data, indices, shape, dtype="float32", **flags):
    data = jnp.asarray(np.asarray(data).astype(jnp.dtype(dtype)))
    indices = jnp.asarray(np.asarray(indices, np.int32))
    return sparse.BCOO((data, indices), shape=shape, **flags)


def bcsr(data, indices, indptr, shape, dtype="float32", **flags):
    data = jnp.asarray(np.asarray(data).astype(jnp.dtype(dtype)))
    indices, indptr = (jnp.asarray(x, jnp.int32) for x in (indices, indptr))
    return sparse.BCSR((data, indices, indptr), shape=shape, **flags)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


ROWS = np.array([[0], [2], [2]])
UNIQUE = {"unique_indices": True}
MATRICES = {
    # Values at one index.
    "bfloat16": lambda: bcoo(np.ones(512), np.full((512, 1), 3), (4,), "bfloat16"),
    "float16": lambda: bcoo([6e4, 6e4, 1.0], [[1], [1], [0]], (3,), "float16"),
    "float16 that cancel": lambda: bcoo(
        [6e4, 6e4, -6e4, -6e4, 3.0], [[1], [1], [1], [1], [0]], (3,), "float16"
    ),
    "compressed float16": lambda: bcsr(
        [6e4, 6e4, -6e4, 1.0], [0, 0, 0, 1], [0, 3, 4], (2, 2), "float16"
    ),
    "compressed": lambda: bcsr([3.0, 4.0, 1.0], [1, 1, 0], [0, 2, 3], (2, 2)),
    "complex": lambda: bcoo([1 + 1j, 1 - 1j, 3j], [[0], [0], [1]], (2,), "complex64"),
    "rows": lambda: bcoo(draw(5, 4), [[1], [7], [1], [3], [1]], (10, 4)),
    "NumPy values": lambda: sparse.BCOO(
        (np.ones(9, ml_dtypes.bfloat16), np.zeros((9, 1), np.int32)), shape=(2,)
    ),
    # Negative indices.
    "from the end": lambda: bcoo([3.0, 4.0], [[-1], [0]], (4,)),
    "one index said twice": lambda: bcoo([3.0, 4.0], [[-1], [3]], (4,)),
    "one of two negative": lambda: bcoo(
        [3.0, 4.0, 99.0], [[0, -1], [0, 1], [-3, 0]], (2, 2)
    ),
    "compressed, negative": lambda: bcsr([3.0, 4, 5], [-1, 1, 0], [0, 2, 3], (2, 2)),
    # Padding.
    "just outside": lambda: bcoo([3.0, 4.0, 100.0], [[0], [1], [3]], (3,)),
    "far outside": lambda: bcoo([3.0, 100.0], [[0], [2**31 - 1]], (3,)),
    "NaN outside": lambda: bcoo([3.0, np.nan, 4.0], [[0], [3], [1]], (3,)),
    "inf outside": lambda: bcoo([3.0, np.inf, -np.inf], [[0], [3], [3]], (3,)),
    "all outside": lambda: bcoo([3.0, np.nan], [[3], [3]], (3,)),
    "unique, NaN outside": lambda: bcoo([3, np.nan], [[0], [3]], (3,), **UNIQUE),
    "batched, outside": lambda: bcoo(
        [[1.0, 2.0, 50.0], [3.0, 50, 50]], [[[0], [1], [4]], [[2], [4], [4]]], (2, 4)
    ),
    "by fromdense": lambda: sparse.BCOO.fromdense(jnp.eye(3), nse=8),
    "by sum_duplicates": lambda: sparse.bcoo_sum_duplicates(
        bcoo([1.0, 2.0, 4.0], [[1], [1], [0]], (3,)), nse=5
    ),
    "beyond the end": lambda: bcsr([3.0, 4.0, 100.0], [0, 1, 1], [0, 1, 2], (2, 2)),
    "NaN beyond the end": lambda: bcsr([3.0, np.nan], [0, 1], [0, 1, 1], (2, 2)),
    "all beyond the end": lambda: bcsr([3.0, np.nan], [0, 1], [0, 0, 0], (2, 2)),
    "column outside": lambda: bcsr([3.0, 100.0], [0, 2], [0, 1, 2], (2, 2)),
    "batched, beyond": lambda: bcsr(
        [[3.0, 100], [4, 12]], [[0, 1]] * 2, [[0, 1, 1], [0, 1, 2]], (2, 2, 2)
    ),
    "compressed by fromdense": lambda: sparse.BCSR.fromdense(jnp.eye(3), nse=8),
    # Batches, of size 1 too.
    "one data": lambda: bcoo(draw(1, 3), np.stack([ROWS] * 4), (4, 3)),
    "one of indices": lambda: bcoo(draw(4, 3), ROWS[None], (4, 3)),
    "two dimensions": lambda: bcoo(draw(2, 1, 3), np.stack([[ROWS] * 3]), (2, 3, 3)),
    "compressed data": lambda: bcsr(
        draw(1, 3), [[0, 1, 1]] * 4, [[0, 1, 3]] * 4, (4, 2, 2)
    ),
    "compressed indices": lambda: bcsr(draw(4, 3), [[0, 1, 1]], [[0, 1, 3]], (4, 2, 2)),
    "full batch": lambda: bcoo(draw(4, 3), np.stack([ROWS] * 4), (4, 3)),
    "only dense dimensions": lambda: bcoo(draw(3, 2), np.zeros((3, 0)), (2,)),
    "no entries": lambda: bcoo(draw(0, 2), np.zeros((0, 1)), (4, 2)),
}
each_matrix = pytest.mark.parametrize("case", MATRICES)


@pytest.mark.slow
@each_matrix
def test_oracle_is_the_matrix_that_jax_makes(case):
    """On values that are not lost in half precision, nor NaN outside the shape."""
    if case == "only dense dimensions":
        pytest.skip("todense of JAX 0.10.2 fails without sparse dimensions")
    (data, *indices), treedef = jax.tree.flatten(MATRICES[case]())
    with jax.enable_x64(True):
        wide = jnp.asarray(np.nan_to_num(_wide(data), posinf=7, neginf=7))
        matrix = treedef.unflatten([wide, *indices])
        np.testing.assert_allclose(dense(matrix), matrix.todense(), 1e-12)


def assert_values_scaled(found, matrix, scale):
    """Those outside too, which nobody reads; and the indices stay."""
    assert jax.tree.structure(found) == jax.tree.structure(matrix)
    (new, *indices), (old, *same) = map(jax.tree.leaves, (found, matrix))
    for index, other in zip(indices, same, strict=True):
        np.testing.assert_array_equal(index, other)
    assert (new.dtype, new.shape) == (old.dtype, old.shape)
    atol = 6e-8 if old.dtype == np.float16 else 1e-37
    tolerance = oracle.eps(old) + 2e-6
    np.testing.assert_allclose(_wide(new), _wide(old) * scale, tolerance, atol)


@each_matrix
def test_norm_is_that_of_the_matrix_and_its_values_are_scaled(case):
    orders, matrix = (1, 3, math.inf), MATRICES[case]()
    tree = {"sparse": matrix, "dense": np.float32([30, 40]), "none": None}
    expected, own = (
        oracle.norm([dense(matrix), tree["dense"]]),
        oracle.norm(dense(matrix)),
    )

    def measure(tree):
        norms = [global_norm([tree["sparse"]], ord=ord) for ord in orders]
        return clip_updates(tree, 0.5, nonfinite="zero"), leaf_norms(tree), norms

    for function in (measure, jax.jit(measure)):
        (clipped, norm), each, norms = function(tree)
        np.testing.assert_allclose(norm, expected, 2e-6)
        np.testing.assert_allclose(each["sparse"], own, 2e-6)
        np.testing.assert_allclose(each["dense"], 50, 1e-6)
        right = [oracle.norm(dense(matrix), ord) for ord in orders]
        np.testing.assert_allclose(norms, right, 2e-6)
        assert_values_scaled(clipped["sparse"], matrix, 0.5 / expected)
    tx = skip_by_global_norm(clip_by_global_norm(1.01 * own + 1e-3), 1e6)
    (kept,), state = tx.update([matrix], tx.init([matrix]))
    assert (state.num_skipped, state.inner_state.num_clipped) == (0, 0)
    assert np.asarray(kept.data).tobytes() == np.asarray(matrix.data).tobytes()


finite = st.floats(-10, 10, width=16)


def lists(elements, *shape):
    size = math.prod(shape)
    drawn = st.lists(elements, min_size=size, max_size=size)
    return drawn.map(lambda values: np.reshape(values, shape))


DRAWN = {
    "rows": (lists(finite, 6, 2), lists(st.integers(0, 6), 6, 1)),
    "entries": (lists(finite, 2, 5), lists(st.integers(0, 3), 2, 5, 2)),
    "data for all": (lists(finite, 1, 5), lists(st.integers(0, 3), 2, 5, 2)),
    "indices for all": (lists(finite, 2, 5), lists(st.integers(0, 3), 1, 5, 2)),
    "compressed": (lists(finite, 6), lists(st.integers(0, 3), 6)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", DRAWN)
def test_any_matrix_of_a_form(form, dtype):
    @jax.jit
    def measure(matrix, max_norm):
        clipped, norm = clip_updates([matrix], max_norm)
        return clipped[0], norm, leaf_norms([matrix])[0]

    @given(*DRAWN[form], lists(st.integers(0, 6), 3))
    def check(values, indices, ends):
        if form == "compressed":
            matrix = bcsr(values, indices, [0, *sorted(ends)], (3, 3), dtype)
        else:
            shape = (4, 2) if form == "rows" else (2, 3, 3)
            matrix = bcoo(values, indices, shape, dtype)
        expected = oracle.norm(dense(matrix))
        max_norm = np.float32(expected / 2 + 0.25)
        clipped, *norms = measure(matrix, max_norm)
        # Values that cancel leave the rounding errors of their sum.
        rounding = 1e-6 * float(np.abs(_wide(matrix.data)).sum())
        np.testing.assert_allclose(norms, expected, 2e-6, rounding)
        scaled = _wide(matrix.data) * min(1, float(max_norm) / (expected or max_norm))
        tolerance = oracle.eps(matrix.data) + 1e-4
        np.testing.assert_allclose(_wide(clipped.data), scaled, tolerance, 1e-7)

    check()


def test_unique_indices_are_trusted():
    twice = bcoo(draw(2, 1), [[2], [2]], (10, 1))
    trusted = bcoo(draw(2, 1), [[2], [2]], (10, 1), **UNIQUE)
    np.testing.assert_allclose(global_norm(trusted), oracle.norm(twice.data), 1e-6)
    np.testing.assert_allclose(global_norm(twice), abs(dense(twice)).max(), 1e-6)


def test_values_that_cancel_have_no_norm():
    matrix = bcoo([[3.0], [-3.0]], [[1], [1]], (4, 1))
    clipped, norm = clip_updates(matrix, 0.0)
    assert norm == 0
    np.testing.assert_array_equal(clipped.data, matrix.data)


def test_values_that_add_up_to_more_than_their_dtype_holds():
    half = MATRICES["float16"]()
    clipped, norm = clip_updates(half, 1.2)
    np.testing.assert_allclose(norm, 1.2e5, 1e-3)
    np.testing.assert_allclose(oracle.norm(dense(clipped)), 1.2, 2e-3)
    matrix = bcoo([3e38, 3e38, 1.0], [[1], [1], [0]], (3,))
    clipped, norm = clip_updates(matrix, 1.0, nonfinite="zero")
    assert norm == math.inf
    np.testing.assert_array_equal(clipped.data, [0, 0, 0])
    # Stored values that are entries themselves are clipped however large they are.
    matrix = bcoo([3e38, 3e38, 1.0], [[1], [2], [0]], (3,), **UNIQUE)
    clipped, norm = clip_updates(matrix, 1.0)
    assert norm == math.inf
    np.testing.assert_allclose(clipped.data, [0.5**0.5, 0.5**0.5, 0], 1e-6, 1e-30)


def test_values_are_summed_in_the_accumulators_precision():
    with jax.enable_x64(True):
        matrix = bcoo([1, 1e-12, -1, 3e-13], [[0], [0], [0], [1]], (2,), "float64")
        half = bcoo([2.0**15] * 3 + [2.0**-14], np.zeros((4, 1)), (2,), "float16")
        for tree in ([matrix], [half, np.float64([1e-3])]):
            expected = oracle.norm([dense(tree[0]), *tree[1:]])
            np.testing.assert_allclose(global_norm(tree), expected, 1e-12)


@pytest.mark.parametrize("nonfinite", ["nan", "zero"])
def test_non_finite_values(nonfinite):
    leaf = bcoo([[np.inf, 1], [2, 3], [4, 5]], [[1], [2], [1]], (10, 2))
    clipped, _ = clip_updates([leaf, jnp.ones(2)], 1.0, nonfinite=nonfinite)
    expected = np.nan if nonfinite == "nan" else 0
    np.testing.assert_array_equal(clipped[0].data, np.full((3, 2), expected))
    np.testing.assert_array_equal(clipped[0].indices, leaf.indices)
    np.testing.assert_array_equal(clipped[1], np.full(2, expected))
    skipped, _ = skip_by_global_norm(optax.identity()).update([leaf], None)
    np.testing.assert_array_equal(skipped[0].indices, leaf.indices)
    assert not skipped[0].data.any()


def test_gradient_through_the_clip_is_that_of_the_dense_matrix():
    leaf, weights = (
        bcoo(10 * draw(3, 2), [[1], [2], [1]], (10, 2)),
        jnp.float32(draw(3, 2)),
    )

    def weighted(data, clip):
        matrix = sparse.BCOO((data, leaf.indices), shape=leaf.shape)
        return jnp.sum(weights * clip(matrix))

    def by_hand(matrix):
        return matrix.data / jnp.sqrt(jnp.sum(jnp.square(matrix.todense())))

    found = jax.grad(weighted)(leaf.data, lambda m: clip_updates(m, 1.0)[0].data)
    expected = jax.grad(weighted)(leaf.data, by_hand)
    np.testing.assert_allclose(found, expected, 1e-4, 1e-6)


def test_cotangent_has_no_indices():
    leaf = bcoo(draw(3, 2), [[1], [2], [3]], (10, 2))
    grads = jax.grad(lambda m: jnp.sum(m.todense() ** 2), allow_int=True)(leaf)
    np.testing.assert_allclose(global_norm(grads), 2 * oracle.norm(leaf.data), 1e-6)
    clipped, _ = clip_updates(grads, 1.0)
    assert clipped.indices.dtype == jax.dtypes.float0
    np.testing.assert_allclose(oracle.norm(clipped.data), 1, 1e-6)


def test_gradient_leaves_out_values_outside_the_matrix():
    indices = jnp.array([[0], [1], [1], [3]])
    gradient = jax.grad(lambda x: global_norm(sparse.BCOO((x, indices), shape=(3,))))
    found = gradient(jnp.array([3.0, 1.0, 3.0, 7.0]))
    np.testing.assert_allclose(found, [0.6, 0.8, 0.8, 0], 1e-6)
    assert jnp.isfinite(gradient(jnp.array([3.0, 1.0, 3.0, math.nan]))[:3]).all()


@pytest.mark.parametrize("ord", [2, 3, math.inf])
@pytest.mark.parametrize("compressed", [False, True])
def test_stored_zero_has_the_derivative_of_the_entry_it_adds_to(compressed, ord):
    def norm(data):
        if compressed:
            parts = data, jnp.array([1, 1, 2]), jnp.array([0, 2, 3])
            return global_norm(sparse.BCSR(parts, shape=(2, 3)), ord=ord)
        indices = jnp.array([[0, 1], [0, 1], [1, 2]])
        return global_norm(sparse.BCOO((data, indices), shape=(2, 3)), ord=ord)

    share = oracle.slope(np.array([7.0, 2.0]), ord)[0]
    for data in ([7.0, 0.0, 2.0], [0.0, 7.0, 2.0], [3.0, 4.0, 2.0]):
        found = jax.grad(norm)(jnp.array(data))
        np.testing.assert_allclose(found[:2], np.float64([share, share]), 1e-6)


def test_vmap_over_the_batch_of_a_matrix():
    matrix = MATRICES["full batch"]()
    expected = [oracle.norm(row) for row in dense(matrix)]
    np.testing.assert_allclose(jax.vmap(global_norm)(matrix), expected, 2e-6)


@pytest.mark.parametrize("names", [None, {"rows": "x", "bias": ()}])
def test_shards_of_rows(names):
    """Each device holds other rows of the matrix, and one of them three times."""
    whole = bcoo(draw(24, 4), np.arange(8).repeat(3)[:, None], (8, 4))
    specs = {"rows": P("x"), "bias": P()}

    def clip(data):
        indices = jnp.repeat(jnp.arange(2), 3)[:, None]
        rows = sparse.BCOO((data["rows"], indices), shape=(2, 4))
        updates, norm = clip_updates(data | {"rows": rows}, 1.0, axis_name=names)
        return updates | {"rows": updates["rows"].data}, norm

    mapped = jax.shard_map(
        clip,
        mesh=oracle.mesh(),
        in_specs=(specs,),
        out_specs=(specs, P()),
        check_vma=names is None,
    )
    data = {"rows": whole.data, "bias": jnp.array([3.0, 4.0])}
    clipped, norm = jax.jit(mapped)(data)
    expected = oracle.norm([dense(whole), data["bias"]])
    np.testing.assert_allclose(norm, expected, 1e-6)
    np.testing.assert_allclose(clipped["rows"], data["rows"] / expected, 1e-5)
