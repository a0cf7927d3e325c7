"""global_norm and leaf_norms, against NumPy: values, then derivatives."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import example, given, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from benchmarks.networks import gpt2_small
from optax_globalclip import global_norm, leaf_norms

ORDS = [1, 1.5, 2, 3, 10.0, math.inf]
ords = pytest.mark.parametrize("ord", ORDS)
dtypes = pytest.mark.parametrize("dtype", sorted(oracle.FLOATS))


def norms(tree, **options):
    return global_norm(tree, **options), leaf_norms(tree, **options)


def assert_norms(found, tree, tolerance=None, ord=2, **options):
    whole, each = found
    oracle.assert_norm(whole, tree, ord, tolerance, **options)
    for norm, leaf in zip(*map(jax.tree.leaves, (each, tree)), strict=True):
        oracle.assert_norm(norm, leaf, ord, tolerance, **options)


# --- Sizes: where the code packs, pads, and reads in chunks.

EDGES = [1, 4095, 4096, 4097, 8191, 65536, 16 * 4097 + 5, 2**20 - 1, 2**20 + 70000]
SIZES = {f"one of {size}": [(size,)] for size in EDGES}
SIZES |= {
    f"{count} small": [(7,)] * count + [(2, 2, 2)] * 3 for count in (2, 63, 64, 65, 130)
}
SIZES |= {f"{count} in chunks": [(5007,)] * count for count in (2, 15, 16, 17, 40)}
SIZES |= {"rows": [(30, 100), (100, 30), (4, 5, 200), ()]}
BAD = [math.nan, math.inf, -math.inf]


def fillings(shapes, dtype):
    """Trees of many magnitudes, of equal entries, and with one bad entry each."""
    half, normal = dtype == "float16", oracle.normals(shapes, "float32")
    factors = [1, 1e-4, 1e-7] if half else [1, 1e30, 1e-30, 1e-37, 5e-41]
    for factor in factors:
        yield [np.float64(x) * factor for x in normal]
    # Rounding errors of one sign, which a sum one after the other adds up.
    for entry in (0.3, 0.9, 1.3) if half else (0.3, 0.9, 1.3, 3e30, 1e-25):
        yield [np.full(x.shape, entry) for x in normal]
    for entry, place in itertools.product([*BAD, 3], (0, 65535, 65536, -1)):
        tree = [np.zeros(x.shape) for x in normal]
        leaf = tree[min(place, 0)]
        leaf.flat[min(place, leaf.size - 1)] = entry
        yield tree


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("size", SIZES)
def test_norm_of_any_size(size, dtype):
    function = jax.jit(global_norm)
    for filling in fillings(SIZES[size], dtype):
        tree = [np.array(x, jnp.dtype(dtype)) for x in filling]
        if dtype == "complex64":
            for leaf in tree:
                leaf.imag = np.roll(leaf.real, 1)
        oracle.assert_norm(function(tree), tree, tolerance=oracle.SUMMED)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize(
    "shapes",
    [[(1000,)] * 1000, gpt2_small(), (2**25,)],
    ids=["1,000 leaves", "GPT-2", "one leaf"],
)
def test_norm_of_millions_of_entries(shapes, dtype):
    # optax.global_norm gives 724 for 1000 in bfloat16 of the first.
    tree = oracle.normals(shapes, dtype)
    oracle.assert_norm(global_norm(tree), tree, tolerance=oracle.SUMMED)


def test_equal_entries_are_added_without_drift():
    # Added one after the other, they are off by 3e-5.
    for entry, dtype in [(0.3, "float16"), (0.3, "float32"), (3e30, "float32")]:
        leaf = np.full(2**22 + 1, entry, dtype)
        oracle.assert_norm(global_norm(leaf), leaf, tolerance=oracle.SUMMED)


@pytest.mark.parametrize(("small", "large"), [(1e-20, 1.2e-19), (1e16, 1e20)])
def test_small_entries_beside_large_ones_count_together(small, large):
    tree = [jnp.full(2**20, small), jnp.array([large])]
    oracle.assert_norm(global_norm(tree), tree, tolerance=oracle.SUMMED)


# --- Magnitudes.


# Each makes of a function of a tree what applies it to one tree of NumPy arrays.


def eager(function):
    return function


def in_vmap(function):
    mapped = jax.jit(jax.vmap(function))

    def apply(tree):
        batch = jax.tree.map(lambda x: np.stack([x, np.zeros_like(x), x]), tree)
        return jax.tree.map(lambda x: x[2], mapped(batch))

    return apply


def on_mesh(function, kind=AxisType.Explicit):
    """Where nothing is done as suits a CPU."""
    jitted, replicated = jax.jit(function), NamedSharding(oracle.mesh(kind), P())
    return lambda tree: jitted(jax.device_put(tree, replicated))


def in_shard_map(function):
    mesh = oracle.mesh()
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P()))


PLACES = {
    "eager": eager,
    "jit": jax.jit,
    "vmap": in_vmap,
    "explicit": on_mesh,
    "auto": functools.partial(on_mesh, kind=AxisType.Auto),
    "shard_map": in_shard_map,
}
ON_ONE_CPU = {"eager", "jit", "vmap"}
places = pytest.mark.parametrize("place", PLACES)

# The exponents of all powers of two that a dtype holds, subnormal ones too.
EXPONENTS = {
    "float32": range(-149, 128),
    "bfloat16": range(-133, 128),
    "float16": range(-24, 16),
    "float64": range(-1022, 1024, 8),
}


SHAPES = [(), (1,), (3,), (5000,)]


@pytest.mark.parametrize("dtype", EXPONENTS)
@places
def test_norm_of_every_magnitude(place, dtype):
    """Subnormal entries count too, although XLA on CPU computes with none."""
    with jax.enable_x64(dtype == "float64"):
        function = PLACES[place](norms)
        for shape, exponent in itertools.product(SHAPES, EXPONENTS[dtype]):
            tree = [np.full(shape, 2.0**exponent).astype(jnp.dtype(dtype))]
            assert_norms(function(tree), tree, on_one_cpu=place in ON_ONE_CPU)


@pytest.mark.parametrize("ord", [1, 3, math.inf])
@places
def test_norm_of_other_orders_of_one_scalar_of_every_magnitude(place, ord):
    # XLA merges products with constants, in a scalar leaf above all.
    function = PLACES[place](functools.partial(norms, ord=ord))
    for exponent in range(-126, 128):
        tree = [np.float32(2.0**exponent)]
        found = function(tree)
        assert_norms(found, tree, ord=ord, on_one_cpu=place in ON_ONE_CPU)


def test_leaves_of_all_magnitudes_have_norms_of_their_own():
    tree = {
        "subnormal": np.full(5000, 1e-40, np.float32),
        "half": np.full(5000, 1e-39, ml_dtypes.bfloat16),
        "large": np.full(4, 1e30, np.float32),
        "normal": np.ones(3, np.float32),
    }
    for function in (norms, jax.jit(norms)):
        assert_norms(function(tree), tree)
    batch = np.outer(2.0 ** np.arange(-149, 128), [1, 0, 0.5, 1, 1.5])
    batch = batch.astype(np.float32)
    for found in jax.vmap(norms)(batch):
        for norm, leaf in zip(np.asarray(found), batch, strict=True):
            oracle.assert_norm(norm, leaf)


def test_float64_norms():
    with jax.enable_x64(True):
        for tree in (
            [np.full(7, 1e300), np.ones(3, np.float32)],
            [np.full(7, 1e-300), np.float32(1e-30)],
            [np.ones(1000), np.array([1e-7])],
            [np.full(4, 1.7e308)],
        ):
            assert_norms(norms(tree), tree)
            assert global_norm(tree).dtype == jnp.float64


@ords
@pytest.mark.whole
def test_complex_entries_count_by_their_modulus(ord):
    function = jax.jit(functools.partial(norms, ord=ord))

    @given(st.lists(st.integers(-120, 127), min_size=9, max_size=9))
    @example([0] * 9)
    @example([127] * 9)
    @example([-83] * 9)
    def check(exponents):
        parts = np.ldexp([1.0, -1.5, 1.25, 1.75, 1, 1, -1, 1.5, 1], exponents)
        leaf = (parts[:4] + 1j * parts[4:8]).astype(np.complex64)
        tree = [leaf, parts[8:].astype(np.float32)]
        assert_norms(function(tree), tree, ord=ord)

    check()


@pytest.mark.parametrize("ord", [300, 1e4, 1e6])
def test_large_orders_are_near_the_largest_entry(ord):
    for tree in ([np.float32([3e38, 1e38])], [np.float32([1e-37, -1e-37, 0])]):
        oracle.assert_norm(global_norm(tree, ord=ord), tree, ord)


# --- What is counted.


@ords
@pytest.mark.parametrize("bad", BAD)
@places
def test_bad_entries_make_no_norm_but_their_own_bad(place, bad, ord):
    function = PLACES[place](functools.partial(norms, ord=ord))
    for first in ([1.0, bad], [bad, 1e20], [0.0, bad]):
        tree = [np.float32(first), np.ones(3, np.float32)]
        assert_norms(function(tree), tree, ord=ord)


@ords
def test_what_is_not_counted(ord):
    int_tangent = np.zeros(3, jax.dtypes.float0)
    tree = {"none": None, "int": int_tangent, "w": jnp.array([3.0]), "b": np.float32(4)}
    oracle.assert_norm(global_norm(tree, ord=ord), tree, ord)
    each = leaf_norms(tree, ord=ord)
    assert each["none"] is None
    assert [float(each[key]) for key in ("int", "w", "b")] == [0, 3, 4]
    assert {norm.dtype for norm in jax.tree.leaves(each)} == {jnp.dtype("float32")}
    for empty in ({}, [None, jnp.zeros((0, 3))]):
        norm = global_norm(empty, ord=ord)
        assert (norm, norm.dtype) == (0, jnp.float32)


def test_default_order_is_2():
    for ord in (None, 2, 2.0, np.float32(2), np.int64(2)):
        assert global_norm([jnp.array([3.0, 4.0])], ord=ord) == 5


# --- Derivatives, at entries of every magnitude.


@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, math.inf])
def test_derivatives_at_any_magnitude(ord):
    norm = functools.partial(global_norm, ord=ord)
    derivatives = jax.jit(lambda x: (jax.grad(norm)(x), jax.hessian(norm)(x)))
    tangent = jax.jit(lambda x, t: jax.jvp(norm, (x,), (t,)))

    @oracle.every_magnitude
    def check(power):
        x = oracle.at(power)
        gradient, hessian = derivatives(x)
        oracle.assert_close(gradient, oracle.slope(x, ord))
        if power <= 35:  # Above, its terms underflow.
            oracle.assert_close(hessian, oracle.curvature(x, ord), 1e-4)
        for other in oracle.EXTREMES[:-1]:
            t = (oracle.WEIGHTS * 10.0**other).astype(np.float32)
            found, found_dot = tangent(x, t)
            oracle.assert_norm(found, x, ord)
            oracle.assert_close(found_dot, oracle.slope(x, ord) @ oracle.wide(t))

    check()


FUNCTIONS_OF_THE_NORM = {
    "square": (lambda n: n**2, lambda n: 2 * n),
    "large product": (lambda n: 1e10 * n, lambda n: 1e10),
    "small product": (lambda n: 1e-10 * n, lambda n: 1e-10),
    "logarithm": (jnp.log, lambda n: 1 / n),
    "root": (jnp.sqrt, lambda n: 0.5 / np.sqrt(n)),
}


@pytest.mark.parametrize("name", FUNCTIONS_OF_THE_NORM)
def test_gradient_of_a_function_of_the_norm_at_any_magnitude(name):
    function, derivative = FUNCTIONS_OF_THE_NORM[name]
    gradient = jax.jit(jax.grad(lambda x: function(global_norm(x))))

    @oracle.every_magnitude
    def check(power):
        if power < 38:  # There the norm is inf, and so are functions of it.
            x = oracle.at(power)
            size = oracle.exact_norm(x)
            oracle.assert_close(gradient(x), derivative(size) * oracle.slope(x, 2))

    check()


def test_hessian_of_the_squared_norm_is_twice_the_identity():
    hessian = jax.jit(jax.hessian(lambda x: global_norm(x) ** 2))
    for power in oracle.EXTREMES[:-1]:
        oracle.assert_close(hessian(oracle.at(power)), 2 * np.eye(6))


@pytest.mark.parametrize("ord", [1, 2, 3])
def test_float64_derivatives_at_any_magnitude(ord):
    norm = functools.partial(global_norm, ord=ord)
    with jax.enable_x64(True):
        derivatives = jax.jit(lambda x: (jax.grad(norm)(x), jax.hessian(norm)(x)))
        for power in (-300, -160, -3, 0, 155, 300):
            x = oracle.at(power, np.float64)
            gradient, hessian = derivatives(x)
            oracle.assert_close(gradient, oracle.slope(x, ord), 1e-13)
            oracle.assert_close(hessian, oracle.curvature(x, ord), 1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_in_half_precision_at_any_magnitude(dtype):
    powers = range(-36, 37, 9) if dtype == "bfloat16" else range(-4, 5)
    gradient = jax.jit(jax.grad(lambda x: 100 * global_norm(x)))
    for power in powers:
        x = jnp.asarray(oracle.VALUES * 10.0**power, dtype)
        found = gradient(x)
        assert found.dtype == x.dtype
        oracle.assert_close(
            found.astype(jnp.float32), 100 * oracle.slope(x, 2), oracle.eps(x)
        )


def turn(z, v, ord):
    """The derivative of the complex p-norm's gradient along v.

    With moduli m, signs s = z/m and the norm N, the gradient is (m/N)ᵖ⁻¹ s.
    """
    z, v = oracle.wide(z), oracle.wide(v)
    modulus, size = np.abs(z), oracle.exact_norm(z, ord)
    sign = z / modulus
    modulus_dot = np.real(np.conj(sign) * v)
    sign_dot = (v - sign * modulus_dot) / modulus
    if ord == math.inf:
        return (modulus == size) * sign_dot
    share = modulus / size
    share_dot = (modulus_dot - share * np.sum(share ** (ord - 1) * modulus_dot)) / size
    weight_dot = (ord - 1) * share ** (ord - 2) * share_dot
    return weight_dot * sign + share ** (ord - 1) * sign_dot


@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, math.inf])
def test_derivatives_at_complex_entries_of_any_magnitude(ord):
    gradient = jax.grad(functools.partial(global_norm, ord=ord))
    along = jax.jit(lambda z, v: jax.jvp(gradient, (z,), (v,)))
    v = np.complex64(oracle.WEIGHTS[::-1] + 1j * oracle.VALUES)
    entries = np.complex64(oracle.VALUES + 1j * oracle.WEIGHTS)

    @oracle.every_magnitude
    def check(power):
        z = entries * np.complex64(10.0 ** min(power, 35))
        wide, size = oracle.wide(z), oracle.exact_norm(z, ord)
        share = np.abs(wide) / size
        weight = share == 1 if ord == math.inf else share ** (ord - 1)
        expected = weight * wide / np.abs(wide), turn(z, v, ord)
        # JAX's convention: a gradient is the conjugate of the steepest ascent.
        for found, right in zip(along(z, v), expected, strict=True):
            parts = (np.stack([x.real, x.imag]) for x in (np.conj(found), right))
            oracle.assert_close(*parts, 1e-5 if right is expected[0] else 1e-4)

    check()


def test_derivative_of_the_1_norm_is_the_sign_of_the_smallest_entries_too():
    # Divided by the norm, the last entries underflow.
    gradient = jax.grad(functools.partial(global_norm, ord=1))
    x = np.float32([1e34, -3e30, 1e-10, -1e-5, 0.0])
    np.testing.assert_allclose(gradient(x), [1, -1, 1, -1, 0], rtol=1e-6)
    z = np.complex64([1e34, 1e-10j])
    np.testing.assert_allclose(gradient(z), [1, -1j], rtol=1e-6)


@pytest.mark.parametrize("ord", [300, 1e6, math.inf])
def test_ties_share_the_slope_of_the_largest_entry(ord):
    x = np.float32([2, -2, 1])
    gradient = jax.grad(functools.partial(global_norm, ord=ord))(x)
    np.testing.assert_allclose(gradient, np.float64(oracle.slope(x, ord)), 1e-5, 1e-30)


@ords
def test_derivatives_at_zero_are_zero(ord):
    norm = functools.partial(global_norm, ord=ord)
    zero = [jnp.zeros(3), jnp.zeros((2, 2))]
    square = jax.grad(lambda x: norm(x) ** 2)
    for derivative in (jax.grad(norm), jax.hessian(norm), square):
        assert not any(leaf.any() for leaf in jax.tree.leaves(derivative(zero)))


# --- Transformations.


def test_vmap_gives_a_norm_for_each_example():
    tree = oracle.normals([(6, 5), (6, 2, 2)])
    tree[0] = tree[0].at[2].mul(1e25).at[3].mul(1e-25)
    tree[1] = tree[1].at[3].mul(0)
    tree.append(oracle.normals((6, 70000), "float16"))
    whole, each = jax.vmap(norms)(tree)
    for i in range(6):
        own = [leaf[i] for leaf in tree]
        assert_norms((whole[i], [norm[i] for norm in each]), own, oracle.SUMMED)


def test_abstract_arrays_have_abstract_norms():
    tree = {"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    whole, each = jax.eval_shape(norms, tree)
    assert (whole.dtype, whole.shape, each["w"].shape) == (jnp.float32, (), ())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_leaf_of_more_entries_than_int32_counts_is_lowered(dtype):
    for size in (2**31 - 65536, 2**31 - 65535, 3 * 2**30):
        leaf = jax.ShapeDtypeStruct((size,), jnp.dtype(dtype))
        text = jax.jit(global_norm).lower(leaf).as_text()
        assert ("dynamic_slice" in text) == (size <= 2**31 - 65536)


def test_one_program_outside_jit_and_none_on_the_second_call():
    tree = oracle.normals([(7,), (3, 5), (2,)])
    for function in (global_norm, leaf_norms):
        with oracle.compilations() as first:
            function(tree)
        assert len(first) == 1
        with oracle.compilations() as second:
            function(jax.tree.map(lambda leaf: leaf, tree), ord=2.0)
        assert not second
