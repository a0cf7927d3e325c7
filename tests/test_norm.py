"""global_norm and leaf_norms, against NumPy in float64."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from jax.test_util import check_grads

from benchmarks.networks import gpt2_small
from optax_globalclip import global_norm, leaf_norms

ORDS = [1, 1.5, 2, 3, 10.0, math.inf]
dtypes = pytest.mark.parametrize("dtype", sorted(oracle.FLOATS))
ords = pytest.mark.parametrize("ord", ORDS)


def assert_norm(tree, tolerance=oracle.SUMMED, **options):
    expected = oracle.norm(tree, options.get("ord", 2))
    np.testing.assert_allclose(float(global_norm(tree, **options)), expected, tolerance)


# --- Accuracy.


@pytest.mark.slow
@dtypes
def test_thousand_leaves(dtype):
    # optax.global_norm gives 724 for 1000 here in bfloat16.
    assert_norm(oracle.normals([(1000,)] * 1000, dtype))


@pytest.mark.slow
@dtypes
def test_gpt2_small(dtype):
    assert_norm(oracle.normals(gpt2_small(), dtype))


@pytest.mark.slow
@dtypes
def test_one_leaf_of_2_to_the_27(dtype):
    assert_norm(oracle.normals((2**27,), dtype))


@pytest.mark.parametrize(
    ("entry", "dtype"),
    [
        (1e20, "float32"),
        (3e38, "float32"),
        (1e-25, "float32"),
        (1e-37, "float32"),
        (1e20, "bfloat16"),
        (1e-25, "bfloat16"),
        (300.0, "float16"),
        (65504.0, "float16"),
        (1e-4, "float16"),
        (6e-8, "float16"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_squares_out_of_range(entry, dtype, size):
    entry = entry / 40 if size > 1 and entry > 1e38 else entry
    assert_norm({"w": jnp.full(size, entry, dtype)})


@dtypes
@pytest.mark.parametrize("shape", [(1000,), (30, 100), (100, 30), (4, 5, 200)])
@pytest.mark.parametrize("entry", [0.9, 1.3])
def test_equal_entries(shape, entry, dtype):
    # Rounding errors of one sign, which a sum one after the other piles up.
    leaf = jnp.full(shape, entry, dtype)
    assert_norm(leaf)
    np.testing.assert_allclose(
        float(leaf_norms(leaf)), oracle.norm(leaf), oracle.SUMMED
    )


def test_large_beside_small_entries():
    # The squares of the small ones are lost one by one, and count together.
    assert_norm([jnp.full(2**20, 1e-20), jnp.array([1.2e-19])])
    assert_norm([jnp.full(2**20, 1e16), jnp.array([1e20])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_subnormal_entries(dtype):
    # XLA on CPU computes with subnormal floats as zeros; the norm here is none.
    assert_norm(jnp.full(2**20, 1e-39, dtype))


@pytest.mark.parametrize("entry", [1e300, 1e200, 1e-170, 1e-300])
def test_float64(entry):
    with jax.enable_x64(True):
        tree = {"w": jnp.full(7, entry, jnp.float64), "b": jnp.ones(3, jnp.float32)}
        assert global_norm(tree).dtype == jnp.float64
        assert_norm(tree, 1e-15)
        assert_norm([jnp.full(7, entry, jnp.float64)], 1e-15)


def test_float64_counts_each_entry():
    with jax.enable_x64(True):
        assert_norm([jnp.ones(1000), jnp.array([1e-7])], 1e-15)


@ords
@given(oracle.trees())
def test_any_tree(ord, tree):
    expected = oracle.norm(tree, ord)
    largest, tiny = map(float, (np.finfo(np.float32).max, np.finfo(np.float32).tiny))
    measured = float(global_norm(tree, ord=ord))
    if expected > largest:
        assert measured == math.inf
    else:
        np.testing.assert_allclose(measured, expected, 2e-6, tiny)


@given(oracle.trees())
def test_any_tree_under_jit_and_by_leaf(tree):
    largest, tiny = map(float, (np.finfo(np.float32).max, np.finfo(np.float32).tiny))
    expected = min(oracle.norm(tree), math.inf)
    expected = expected if expected <= largest else math.inf
    measured = float(jax.jit(global_norm)(tree))
    np.testing.assert_allclose(measured, expected, 5e-7, tiny)
    for leaf, norm in zip(
        jax.tree.leaves(tree), jax.tree.leaves(leaf_norms(tree)), strict=True
    ):
        expected = oracle.norm(leaf)
        expected = expected if expected <= largest else math.inf
        np.testing.assert_allclose(float(norm), expected, 2e-6, tiny)


# --- What is counted, and how.


def test_empty():
    assert global_norm({}) == 0
    assert global_norm([None, jnp.zeros((0, 3))]) == 0
    assert global_norm({}).dtype == jnp.float32


@ords
def test_what_is_not_counted(ord):
    int_tangent = np.zeros(3, jax.dtypes.float0)
    tree = {"none": None, "int": int_tangent, "w": jnp.array([3.0]), "b": np.float32(4)}
    assert_norm(tree, ord=ord)
    norms = leaf_norms(tree, ord=ord)
    assert norms["none"] is None
    assert [float(norms[key]) for key in ("int", "w", "b")] == [0, 3, 4]
    assert norms["int"].dtype == jnp.float32


@ords
@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_complex_entries_count_by_their_modulus(ord, size):
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((2, 50)) * size
    tree = [jnp.asarray(parts[0] + 1j * parts[1], jnp.complex64), jnp.full(3, size)]
    assert_norm(tree, 2e-6, ord=ord)


def test_python_and_numpy_leaves():
    assert global_norm([3.0, np.float32(4), np.array([12.0], np.float32)]) == 13
    assert global_norm(2j) == 2


@ords
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_entries(ord, bad):
    expected = math.nan if math.isnan(bad) else math.inf
    for tree in ([jnp.array([1.0, bad]), jnp.ones(3)], [jnp.array([1e20, bad])]):
        np.testing.assert_equal(float(global_norm(tree, ord=ord)), expected)
        norms = [float(norm) for norm in leaf_norms(tree, ord=ord)]
        assert not math.isfinite(norms[0])
        assert all(map(math.isfinite, norms[1:]))


def test_leaf_norms_are_those_of_the_leaves():
    tree = oracle.normals({"a": (3, 4), "b": [(5,), ()], "c": (0,)}, "bfloat16")
    tree["d"] = jnp.full(4, 1e30)
    norms = leaf_norms(tree)
    expected = jax.tree.map(oracle.norm, tree)
    jax.tree.map(lambda n, e: np.testing.assert_allclose(n, e, 1e-6), norms, expected)
    assert {norm.dtype for norm in jax.tree.leaves(norms)} == {jnp.dtype("float32")}


# --- ord.


@pytest.mark.parametrize("ord", [0.5, -1, 0, math.nan, np.array(0.5)])
def test_ord_out_of_range(ord):
    with pytest.raises(ValueError, match="real number of at least 1"):
        global_norm(jnp.ones(3), ord=ord)


@ords
def test_traced_ord(ord):
    tree = oracle.normals([(50,), (3, 4)])
    traced = jax.jit(lambda ord: global_norm(tree, ord=ord))(jnp.float32(ord))
    np.testing.assert_allclose(float(traced), oracle.norm(tree, ord), 2e-6)
    concrete = global_norm(tree, ord=jnp.asarray(ord, jnp.float32))
    np.testing.assert_allclose(float(concrete), oracle.norm(tree, ord), 2e-6)


# --- Derivatives.


@pytest.mark.slow
@ords
def test_gradient_matches_finite_differences(ord):
    with jax.enable_x64(True):
        tree = oracle.normals([(5,), (2, 2)])
        tree = [leaf.astype(jnp.float64) for leaf in tree]
        order = 1 if ord == math.inf else 2
        norm = functools.partial(global_norm, ord=ord)
        check_grads(norm, (tree,), order, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25, 1e-15])
def test_gradient_is_the_unit_vector(dtype, scale):
    with jax.enable_x64(dtype == "float64"):
        values = np.random.default_rng(0).standard_normal(20) * scale
        tree = [jnp.asarray(values, dtype)]
        (gradient,) = jax.grad(global_norm)(tree)
        unit = values / oracle.norm(values)
        np.testing.assert_allclose(gradient, unit, 1e-5, 1e-7)
        (hessian,) = jax.hessian(global_norm)(tree)[0]
        expected = (np.eye(20) - np.outer(unit, unit)) / oracle.norm(values)
        np.testing.assert_allclose(hessian, expected, 1e-4, 1e-6 / scale)


@dtypes
def test_gradient_in_half_precision(dtype):
    leaf = oracle.normals((30,), dtype)
    gradient = jax.grad(global_norm)(leaf)
    assert gradient.dtype == leaf.dtype
    expected = oracle.entries(leaf) * np.sign(np.asarray(leaf, np.float64))
    expected = expected / oracle.norm(leaf)
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), expected, oracle.eps(leaf), 1e-7
    )


@ords
def test_first_and_second_derivative_are_zero_at_zero(ord):
    zero = [jnp.zeros(3), jnp.zeros((2, 2))]
    norm = functools.partial(global_norm, ord=ord)
    for derivative in (jax.grad(norm), jax.hessian(norm)):
        assert not any(leaf.any() for leaf in jax.tree.leaves(derivative(zero)))


def test_complex_gradient():
    leaf = jnp.array([3 + 4j, 0j, 12 + 0j])
    # JAX's convention: the conjugate of the direction of steepest ascent.
    expected = np.conj(np.asarray(leaf)) / 13
    np.testing.assert_allclose(jax.grad(global_norm)(leaf), expected, 1e-6)


def test_ties_share_the_slope_of_the_largest_entry():
    gradient = jax.grad(lambda x: global_norm(x, ord=math.inf))(jnp.array([2.0, -2, 1]))
    np.testing.assert_allclose(gradient, [0.5, -0.5, 0])


# --- Transformations.


def test_vmap_gives_a_norm_for_each_example():
    tree = oracle.normals([(6, 5), (6, 2, 2)])
    tree[0] = tree[0].at[2].mul(1e25).at[3].mul(1e-25)
    tree[1] = tree[1].at[3].mul(0)
    expected = [oracle.norm([leaf[i] for leaf in tree]) for i in range(6)]
    np.testing.assert_allclose(jax.vmap(global_norm)(tree), expected, 5e-7)
    norms = jax.vmap(leaf_norms)(tree)
    assert [norm.shape for norm in norms] == [(6,), (6,)]


def test_eval_shape():
    tree = {"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    assert jax.eval_shape(global_norm, tree).dtype == jnp.float32
    assert jax.eval_shape(leaf_norms, tree)["w"].shape == ()


def test_one_program_outside_jit_and_none_on_the_second_call():
    tree = oracle.normals([(7,), (3, 5), (2,)])
    for function in (global_norm, leaf_norms):
        with oracle.compilations() as first:
            function(tree)
        assert len(first) == 1
        with oracle.compilations() as second:
            function(jax.tree.map(lambda leaf: leaf, tree), ord=2.0)
        assert not second


def test_normal_range_reads_each_leaf_once():
    """On CPU the rescue is a branch that is not taken, not a second accumulator."""
    text = jax.jit(global_norm).lower(jnp.ones(10_000)).compile().as_text() or ""
    entry = text[text.index("\nENTRY ") :]
    assert entry.count(" conditional(") == 1
    (leaf,) = re.findall(r"(%\S+) = f32\[10000\]\S* parameter", entry)
    readers = re.findall(rf" ([a-z-]+)\([^()]*{re.escape(leaf)}[,)]", entry)
    # The sum of squares, and the operands of the branch.
    assert sorted(readers) in (["fusion", "tuple"], ["conditional", "fusion"])
