"""Norms, clips and derivatives over the whole range of each dtype."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
from hypothesis import example, given, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

TINY = float(np.finfo(np.float32).tiny)
MAX = float(np.finfo(np.float32).max)
ORDS = [1, 1.5, 2, 3, math.inf]
ords = pytest.mark.parametrize("ord", ORDS)


def eps_of(norm) -> float:
    """The error of a sum of a few dozen squares, relative to the norm."""
    return 5e-15 if norm.dtype == np.float64 else 2e-6


def assert_norm(found, expected):
    """The norm is right, or inf if it is above the largest float of its dtype."""
    info, tolerance = np.finfo(found.dtype), eps_of(found)
    if expected > float(info.max) * (1 - tolerance):
        # At the very edge, the last rounding decides between the largest and inf.
        assert found == math.inf or expected <= float(info.max) * (1 + tolerance)
    else:
        error = abs(np.longdouble(float(found)) - expected)
        below = float(info.tiny) if expected < float(info.tiny) else 0
        assert error <= tolerance * expected + below, (found, expected)


# --- Shards of any magnitude, on eight devices.

DEVICES = 8
NAMES = {"split": "d", "half": "d", "whole": ()}
SPECS = {"split": P("d"), "half": P("d"), "whole": P()}
DTYPES = {
    "float32 and bfloat16": {
        "split": "float32",
        "half": "bfloat16",
        "whole": "float32",
    },
    "float16": {"split": "float16", "half": "float16", "whole": "float16"},
    "float64": {"split": "float64", "half": "float32", "whole": "float64"},
}


def clip_and_measure(tree, max_norm, axis_name=None):
    clipped, norm = clip_updates(tree, max_norm, axis_name=axis_name)
    return clipped, norm, leaf_norms(tree, axis_name=axis_name)


def mesh_of(axis_type):
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(axis_type,))


@functools.cache
def in_shard_map(**options):
    function = clip_and_measure
    if options:
        function = functools.partial(function, axis_name=NAMES)
    mapped = jax.shard_map(
        function,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(SPECS, P()),
        out_specs=(SPECS, P(), P()),
        **options,
    )
    return jax.jit(mapped)


@functools.cache
def mapped_by_pmap():
    axes = {"split": 0, "half": 0, "whole": None}
    return jax.pmap(
        functools.partial(clip_and_measure, axis_name=NAMES),
        axis_name="d",
        in_axes=(axes, None),
        out_axes=(axes, None, None),
    )


def in_pmap(tree, max_norm):
    def stack(leaf):
        return leaf.reshape(DEVICES, -1)

    stacked = {key: stack(tree[key]) for key in ("split", "half")}
    clipped, norm, each = mapped_by_pmap()({**tree, **stacked}, max_norm)
    clipped = {key: clipped[key].reshape(tree[key].shape) for key in tree}
    return clipped, norm, each


@functools.cache
def jitted():
    return jax.jit(clip_and_measure)


def in_jit(tree, max_norm, axis_type):
    mesh = mesh_of(axis_type)
    shardings = {key: NamedSharding(mesh, SPECS[key]) for key in tree}
    return jitted()(jax.device_put(tree, shardings), max_norm)


LAYOUTS = {
    "types": lambda *args: in_shard_map()(*args),
    "names": lambda *args: in_shard_map(check_vma=False)(*args),
    "pmap": in_pmap,
    "explicit": lambda *args: in_jit(*args, AxisType.Explicit),
    "auto": lambda *args: in_jit(*args, AxisType.Auto),
    "one device": lambda *args: jitted()(*args),
}


@st.composite
def magnitudes(draw, dtype, shards, per_shard):
    """An array whose shards lie near one magnitude, far below it, or are zeros."""
    info = ml_dtypes.finfo(dtype)
    low, high = int(info.minexp), int(info.maxexp) - 1
    base = draw(st.integers(low, high))
    below = st.sampled_from([0, 0, 1, 2, 12, high // 2, 2 * high, None])
    leaf = np.zeros((shards, per_shard))
    for shard in leaf:
        offset = draw(below)
        if offset is not None:
            mantissas = draw(st.lists(st.floats(1, 1.9), min_size=1, max_size=3))
            shard[:] = np.resize(mantissas, per_shard) * 2.0 ** max(base - offset, low)
    return leaf.ravel().astype(jnp.dtype(dtype))


def trees_of(dtypes):
    return st.fixed_dictionaries(
        {
            "split": magnitudes(dtypes["split"], DEVICES, 3),
            "half": magnitudes(dtypes["half"], DEVICES, 2),
            "whole": magnitudes(dtypes["whole"], 1, 5),
        }
    )


def check_layout(layout, tree, ratio):
    norm = oracle.exact_norm(tree)
    accumulator = np.float64 if tree["split"].dtype == np.float64 else np.float32
    limit = np.finfo(accumulator)
    max_norm = accumulator(np.clip(norm * ratio, limit.tiny, limit.max))
    clipped, found, each = LAYOUTS[layout](tree, max_norm)
    assert found.dtype == accumulator
    assert_norm(found, norm)
    for key, leaf in tree.items():
        assert_norm(each[key], oracle.exact_norm(leaf))
    oracle.assert_clipped(clipped, tree, max_norm, tolerance=2 * eps_of(found))


CASES = [
    pytest.param(layout, dtypes, id=f"{layout}, {dtypes}")
    for layout in LAYOUTS
    for dtypes in DTYPES
    if dtypes != "float16" or layout in ("types", "pmap")
]
ratios = st.sampled_from([0.5, 2.0**-10, 2.0**-60, 2.0])


@pytest.mark.parametrize(("layout", "dtypes"), CASES)
def test_shards_of_any_magnitude_add_up_to_one_norm(layout, dtypes):
    @given(trees_of(DTYPES[dtypes]), ratios)
    def check(tree, ratio):
        check_layout(layout, tree, ratio)

    with jax.enable_x64(dtypes == "float64"):
        check()


# Shards on both sides of each bound at which a square overflows or underflows.
SEAMS = {
    "float32": [(1e19, 1.9e19), (1.8e19, 3e38), (1e-19, 3e-20), (1e-23, 1e19)],
    "float64": [(7e153, 1.5e154), (1e154, 1e308), (1e-154, 1e-162), (1e-170, 1e154)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SEAMS)
def test_shards_on_both_sides_of_an_overflow_count(layout, dtype):
    with jax.enable_x64(dtype == "float64"):
        for near, far in SEAMS[dtype]:
            tree = {
                "split": np.full(24, near, dtype),
                "half": np.zeros(16, DTYPES[f"{dtype}"]["half"])
                if dtype == "float64"
                else np.zeros(16, ml_dtypes.bfloat16),
                "whole": np.full(5, near, dtype),
            }
            tree["split"][[0, 9, 23]] = far
            check_layout(layout, tree, 0.5)


# --- Norms above the largest float.


@functools.cache
def clip_of(ord=2.0, nonfinite="nan"):
    return jax.jit(functools.partial(clip_updates, ord=ord, nonfinite=nonfinite))


LARGE = {
    "powers of two": ([np.full(4, 2.0**127, np.float32)], 16.0),
    "small beside large": ([np.float32([3e38, 3e38, 0.1, 1e-3])], 1e38),
    "to the largest": ([np.full(9, 3e38, np.float32)], MAX),
    "to one": ([np.full(5000, 3e38, np.float32)], 1.0),
    "to a small number": ([np.full(3, 3e38, np.float32)], 1e-30),
    "two leaves": ([np.float32(3e38), np.full((2, 2), 3e38, np.float32)], 2.0),
    "bfloat16": ([np.full(100, 3e38, ml_dtypes.bfloat16)], 1e30),
    "mixed": ([np.full(7, 3e38, ml_dtypes.bfloat16), np.float32([1, 3e38])], 1e20),
    "complex": ([np.full(4, 2e38 + 3e38j, np.complex64)], 1.0),
    "float64": ([np.full(4, 1.7e308), np.float64([1e290, 1.0])], 1e308),
    "float64 to one": ([np.full(4, 1.7e308)], 1.0),
    "float64 beside float32": ([np.full(4, 1.7e308), np.ones(3, np.float32)], 1e300),
    "complex128": ([np.full(4, 1e308 + 1e308j)], 3.0),
}


def clips_to(tree, max_norm, ord=2.0, clip=None):
    clipped, norm = (clip or clip_of(ord))(tree, max_norm)
    assert_norm(norm, oracle.exact_norm(tree, ord))
    oracle.assert_clipped(clipped, tree, max_norm, ord, 2 * eps_of(norm))


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("ord", [1, 2, 3])
def test_norms_above_the_largest_float_are_clipped(case, ord):
    tree, max_norm = LARGE[case]
    with jax.enable_x64("64" in case or "128" in case):
        clips_to(tree, max_norm, ord)


@pytest.mark.parametrize("case", ["powers of two", "small beside large", "two leaves"])
def test_norms_above_the_largest_float_are_clipped_outside_jit(case):
    clips_to(*LARGE[case], clip=clip_updates)


@given(
    st.lists(st.integers(-126, 127), min_size=7, max_size=7),
    st.lists(st.floats(1, 1.9), min_size=7, max_size=7),
    st.integers(-120, 127),
)
def test_any_tree_is_clipped_to_any_threshold(exponents, mantissas, threshold):
    exponents[0] = exponents[1] = 127
    leaf = np.ldexp(mantissas, exponents).astype(np.float32)
    clips_to([leaf[:2], leaf[2:]], np.float32(2.0**threshold))


@given(
    st.lists(st.integers(-1021, 1023), min_size=7, max_size=7),
    st.lists(st.floats(1, 1.9), min_size=7, max_size=7),
    st.integers(-1000, 1023),
)
def test_any_float64_tree_is_clipped_to_any_threshold(exponents, mantissas, threshold):
    exponents[0] = exponents[1] = 1023
    leaf = np.ldexp(mantissas, exponents)
    with jax.enable_x64(True):
        clips_to([leaf[:2], leaf[2:]], np.float64(2.0**threshold))


@pytest.mark.parametrize("case", LARGE)
def test_state_tells_what_a_norm_above_the_largest_float_was_clipped_to(case):
    tree, max_norm = LARGE[case]
    with jax.enable_x64("64" in case or "128" in case):
        tx = clip_by_global_norm(max_norm, nonfinite="zero")
        _, state = jax.jit(tx.update)(tree, tx.init(tree))
        logged = metrics(state)
    assert logged["global_norm"] == math.inf
    # The state is float32, in which a threshold of 1e308 is inf.
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(logged["clipped_norm"], np.float32(max_norm))
    assert logged["clip_scale"] > 0
    assert (logged["clip_fraction"], logged["nonfinite_fraction"]) == (1, 0)


@pytest.mark.parametrize("threshold", [1e38, 1.0, 1e-30])
def test_clipped_norm_in_the_state_is_that_of_the_updates(threshold):
    update = jax.jit(clip_by_global_norm(np.float32(threshold)).update)
    for entry in (1e-36, 1e-10, 1.0, 1e10, 1e37, 3e38):
        tree = [np.full(3, entry, np.float32)]
        updates, state = update(tree, None)
        expected = min(oracle.norm(tree), float(np.float32(threshold)))
        np.testing.assert_allclose(metrics(state)["clipped_norm"], expected, 1e-6)
        np.testing.assert_allclose(oracle.norm(updates), expected, 1e-6)
        assert state.clip_scale > 0


# --- Norm and threshold in one precision.


@functools.cache
def run_equal(make):
    """Sixty equal gradients: how many were dropped or clipped, and the last update."""
    tx = make()

    def run(leaf):
        def step(state, _):
            updates, state = tx.update([leaf], state)
            return state, updates[0]

        state, updates = jax.lax.scan(step, tx.init([leaf]), length=60)
        counts = optax.tree.get_all_with_path(state, "num_skipped")
        counts += optax.tree.get_all_with_path(state, "num_clipped")
        return updates, [count for _, count in counts]

    return jax.jit(run)


def skip_z():
    return skip_by_global_norm(optax.identity(), zscore_threshold(6.0))


def skip_quantile():
    return skip_by_global_norm(optax.identity(), quantile_threshold(1.0, window=9))


def clip_z():
    return clip_by_global_norm(zscore_threshold(2.5))


def clip_quantile():
    return clip_by_global_norm(quantile_threshold(1.0, window=9))


@pytest.mark.parametrize("make", [skip_z, skip_quantile, clip_z, clip_quantile])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_equal_gradients_are_never_clipped_or_skipped(make, dtype):
    @given(st.integers(0, 2**32 - 1), st.integers(-20, 20))
    def check(seed, exponent):
        leaf = np.random.default_rng(seed).standard_normal(3) * 10.0**exponent
        leaf = leaf.astype(dtype)
        updates, counts = run_equal(make)(leaf)
        assert counts
        assert not any(counts)
        np.testing.assert_array_equal(updates, np.tile(leaf, (60, 1)))

    with jax.enable_x64(dtype == "float64"):
        check()


# --- Derivatives.

VALUES = np.array([1.0, -2.0, 0.5, 1.5, -0.25, 3.0])
WEIGHTS = np.array([0.5, 1.0, -1.0, 2.0, 0.25, -0.75])
powers_of_ten = st.integers(-35, 35)
EXTREMES = (-35, -15, -12, 0, 19, 20, 35)


def every_magnitude(test):
    """Runs a test over magnitudes from 1e-35 to 1e35, the extreme ones always."""
    for power in EXTREMES:
        test = example(power)(test)
    return given(powers_of_ten)(test)


def at(power, dtype=np.float32):
    """The point, and in float64 its norm and unit vector."""
    x = (VALUES * 10.0**power).astype(dtype)
    wide = x.astype(np.float64)
    size = oracle.norm(wide)
    return x, size, wide / size


def assert_close(found, expected, tolerance=1e-5):
    """Close relative to the largest entry; results may be flushed below TINY."""
    expected = np.asarray(expected, np.float64)
    atol = tolerance * np.abs(expected).max() + TINY
    np.testing.assert_allclose(np.float64(found), expected, 0, atol)


def slope(x, ord):
    """The gradient of the p-norm, in float64."""
    x = x.astype(np.float64)
    size = oracle.norm(x, ord)
    if ord == math.inf:
        return np.sign(x) * (np.abs(x) == size)
    return np.sign(x) * (np.abs(x) / size) ** (ord - 1)


def curvature(x, ord):
    """The Hessian of the p-norm, in float64."""
    x = x.astype(np.float64)
    size, unit = oracle.norm(x, ord), slope(x, ord)
    if ord == math.inf:
        return np.zeros((x.size, x.size))
    diagonal = np.diag((np.abs(x) / size) ** (ord - 2))
    return (ord - 1) / size * (diagonal - np.outer(unit, unit))


@functools.cache
def jitted_gradient(ord):
    return jax.jit(jax.grad(lambda x: global_norm(x, ord=ord)))


@functools.cache
def jitted_hessian(ord):
    return jax.jit(jax.hessian(lambda x: global_norm(x, ord=ord)))


@ords
def test_gradient_of_the_norm_at_any_magnitude(ord):
    @every_magnitude
    def check(power):
        x, _, _ = at(power)
        assert_close(jitted_gradient(ord)(x), slope(x, ord))

    check()


@ords
def test_hessian_of_the_norm_at_any_magnitude(ord):
    @every_magnitude
    def check(power):
        x, _, _ = at(power)
        assert_close(jitted_hessian(ord)(x), curvature(x, ord), 1e-4)

    check()


@functools.cache
def jitted_jvp():
    return jax.jit(lambda x, t: jax.jvp(global_norm, (x,), (t,)))


@every_magnitude
def test_tangent_of_any_magnitude_at_entries_of_any_other(power):
    x, size, unit = at(power)
    for other in EXTREMES:
        tangent = (WEIGHTS * 10.0**other).astype(np.float32)
        norm, found = jitted_jvp()(x, tangent)
        np.testing.assert_allclose(norm, size, 2e-6)
        assert_close(found, unit @ tangent.astype(np.float64))


FUNCTIONS_OF_THE_NORM = {
    "square": (lambda n: n**2, lambda n: 2 * n),
    "product": (lambda n: 1e10 * n, lambda n: 1e10),
    "small product": (lambda n: 1e-10 * n, lambda n: 1e-10),
    "logarithm": (jnp.log, lambda n: 1 / n),
    "root": (jnp.sqrt, lambda n: 0.5 / math.sqrt(n)),
}


@pytest.mark.parametrize("name", FUNCTIONS_OF_THE_NORM)
def test_gradient_of_a_function_of_the_norm_at_any_magnitude(name):
    function, derivative = FUNCTIONS_OF_THE_NORM[name]
    gradient = jax.jit(jax.grad(lambda x: function(global_norm(x))))

    @every_magnitude
    def check(power):
        x, size, unit = at(power)
        assert_close(gradient(x), derivative(size) * unit)

    check()


def test_hessian_of_the_squared_norm_is_twice_the_identity():
    hessian = jax.jit(jax.hessian(lambda x: global_norm(x) ** 2))

    @every_magnitude
    def check(power):
        assert_close(hessian(at(power)[0]), 2 * np.eye(6))

    check()


def test_float64_derivatives_at_any_magnitude():
    @given(st.integers(-300, 300))
    @example(-300)
    @example(300)
    def check(power):
        x, size, unit = at(power, np.float64)
        np.testing.assert_allclose(jitted_gradient(2)(x), unit, 0, 1e-13)
        found = jitted_hessian(2)(x)
        expected = (np.eye(6) - np.outer(unit, unit)) / size
        np.testing.assert_allclose(found, expected, 0, 1e-12 / size)

    with jax.enable_x64(True):
        check()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_in_half_precision_at_any_magnitude(dtype):
    powers = range(-36, 37, 9) if dtype == "bfloat16" else range(-4, 5)
    gradient = jax.jit(jax.grad(lambda x: 100 * global_norm(x)))
    for power in powers:
        x = jnp.asarray(VALUES * 10.0**power, dtype)
        wide = np.asarray(x, np.float64)
        assert_close(gradient(x), 100 * wide / oracle.norm(wide), oracle.eps(x))


def test_complex_gradient_at_any_magnitude():
    gradient = jax.jit(jax.grad(global_norm))

    @every_magnitude
    def check(power):
        x = ((VALUES + 1j * WEIGHTS) * 10.0**power).astype(np.complex64)
        # JAX's convention: the conjugate of the direction of steepest ascent.
        expected = np.conj(x.astype(np.complex128)) / oracle.norm(x)
        np.testing.assert_allclose(gradient(x), expected, 0, 1e-5)

    check()


def turn(z, v, ord):
    """The derivative of the complex p-norm's gradient along v, in float64.

    With moduli m, signs s = z/m and the norm N, the gradient is (m/N)ᵖ⁻¹ s.
    """
    z, v = z.astype(np.complex128), v.astype(np.complex128)
    modulus, size = np.abs(z), oracle.norm(z, ord)
    sign = z / modulus
    modulus_dot = np.real(np.conj(sign) * v)
    sign_dot = (v - sign * modulus_dot) / modulus
    if ord == math.inf:
        return (modulus == size) * sign_dot
    share = modulus / size
    share_dot = (modulus_dot - share * np.sum(share ** (ord - 1) * modulus_dot)) / size
    weight_dot = (ord - 1) * share ** (ord - 2) * share_dot
    return weight_dot * sign + share ** (ord - 1) * sign_dot


@ords
def test_second_derivative_at_complex_entries_of_any_magnitude(ord):
    gradient = jax.grad(functools.partial(global_norm, ord=ord))
    gradient_dot = jax.jit(lambda z, v: jax.jvp(gradient, (z,), (v,))[1])
    v = np.complex64(WEIGHTS[::-1] + 1j * VALUES)

    @every_magnitude
    def check(power):
        z = ((VALUES + 1j * WEIGHTS) * 10.0**power).astype(np.complex64)
        # JAX's convention: a gradient is the conjugate of the steepest ascent.
        found, expected = np.conj(gradient_dot(z, v)), turn(z, v, ord)
        parts = (np.stack([x.real, x.imag]) for x in (found, expected))
        assert_close(*parts, 1e-4)

    check()


def weighted(x, max_norm):
    return jnp.vdot(clip_updates(x, max_norm)[0], np.float32(WEIGHTS))


@functools.cache
def clip_derivatives():
    return (
        jax.jit(jax.grad(weighted, argnums=(0, 1))),
        jax.jit(jax.hessian(weighted)),
        jax.jit(lambda x, c, t: jax.jvp(lambda x: weighted(x, c), (x,), (t,))[1]),
    )


def clip_slope(size, unit, max_norm):
    return max_norm / size * (WEIGHTS - unit * (unit @ WEIGHTS))


@every_magnitude
def test_gradient_of_the_clip_at_any_magnitude(power):
    x, size, unit = at(power)
    for ratio in (1 / 3, 1e-3):
        max_norm = np.float32(size * ratio)
        found, by_threshold = clip_derivatives()[0](x, max_norm)
        assert_close(found, clip_slope(size, unit, float(max_norm)))
        np.testing.assert_allclose(by_threshold, unit @ WEIGHTS, 1e-5)


@every_magnitude
def test_gradient_of_the_clip_to_one_at_any_magnitude_above(power):
    x, size, unit = at(abs(power) + 1)
    found, by_threshold = clip_derivatives()[0](x, np.float32(1))
    assert_close(found, clip_slope(size, unit, 1.0))
    np.testing.assert_allclose(by_threshold, unit @ WEIGHTS, 1e-5)


@every_magnitude
def test_hessian_of_the_clip_at_any_magnitude(power):
    x, size, unit = at(power)
    max_norm = np.float32(size / 3)
    cross, along = np.outer(WEIGHTS, unit), unit @ WEIGHTS
    terms = 3 * along * np.outer(unit, unit) - cross - cross.T - along * np.eye(6)
    expected = float(max_norm) / size**2 * terms
    # The terms are sums of numbers below the smallest normal float at 1e35.
    found = np.float64(clip_derivatives()[1](x, max_norm))
    np.testing.assert_allclose(
        found, expected, 0, 1e-4 * np.abs(expected).max() + 8 * TINY
    )


@every_magnitude
def test_tangent_of_the_clip_at_any_magnitude(power):
    x, size, unit = at(power)
    max_norm = np.float32(size / 3)
    expected = clip_slope(size, unit, float(max_norm))
    for other in (-12, 0, 12):
        tangent = (VALUES[::-1] * 10.0**other).astype(np.float32)
        found = clip_derivatives()[2](x, max_norm, tangent)
        assert_close(found, expected @ tangent.astype(np.float64), 2e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_gradient_is_zero_where_updates_are_zeroed(bad, ord):
    def total(x, max_norm):
        clipped, _ = clip_updates(x, max_norm, ord=ord, nonfinite="zero")
        return jnp.vdot(clipped, np.float32(WEIGHTS))

    x = VALUES.astype(np.float32)
    x[1] = bad
    gradients = jax.grad(total, argnums=(0, 1))(x, jnp.float32(1.0))
    np.testing.assert_array_equal(gradients[0], np.zeros(6))
    assert gradients[1] == 0
    tangent = jax.jvp(total, (x, jnp.float32(1)), (np.ones_like(x), jnp.float32(1)))
    assert tangent == (0, 0)
    np.testing.assert_array_equal(jax.jit(jax.hessian(total))(x, 1.0), np.zeros((6, 6)))


def test_gradient_is_zero_where_the_updates_of_one_leaf_are_not_finite():
    def total(tree):
        clipped, _ = clip_updates(tree, 1.0, nonfinite="zero")
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in clipped)

    tree = [jnp.array([1.0, math.nan]), jnp.ones(3, jnp.bfloat16)]
    for leaf in jax.grad(total)(tree):
        np.testing.assert_array_equal(leaf.astype(jnp.float32), np.zeros(leaf.shape))


def slope_by_ord(x, ord):
    """The derivative of the p-norm by p, in float64."""
    moduli = np.abs(x.astype(np.float64))
    ratios = moduli[moduli > 0] / moduli.max()
    powers = ratios**ord
    total = powers.sum()
    relative = (powers * np.log(ratios)).sum() / (ord * total) - math.log(
        total
    ) / ord**2
    return oracle.norm(x, ord) * relative


def test_formula_for_the_derivative_by_ord_matches_finite_differences():
    for ord in (1.0, 1.5, 2.0, 3.0, 10.0):
        step = 1e-6
        higher, lower = (oracle.norm(VALUES, ord + d) for d in (step, -step))
        np.testing.assert_allclose(
            slope_by_ord(VALUES, ord), (higher - lower) / (2 * step), 1e-7
        )


@functools.cache
def gradients_by_ord():
    def clipped(ord, x, max_norm):
        return jnp.vdot(clip_updates(x, max_norm, ord=ord)[0], np.float32(WEIGHTS))

    norm = jax.jit(jax.value_and_grad(lambda ord, x: global_norm(x, ord=ord), (0, 1)))
    return norm, jax.jit(jax.grad(clipped))


@given(st.floats(1, 20, width=32), st.sampled_from([-25, -3, 0, 3, 25]), st.booleans())
@example(1.0, 0, True)
@example(2.0, 0, True)
@example(2.0, 25, False)
def test_gradient_by_a_traced_ord(ord, power, with_zero):
    x, _, _ = at(power)
    x[2] *= not with_zero
    size = oracle.norm(x, ord)
    norm, (by_ord, by_x) = gradients_by_ord()[0](np.float32(ord), x)
    np.testing.assert_allclose(norm, size, 1e-5)
    expected = slope_by_ord(x, ord)
    np.testing.assert_allclose(by_ord, expected, 1e-3, 1e-5 * size)
    if not with_zero:
        assert_close(by_x, slope(x, ord), 1e-4)
    max_norm = np.float32(size / 4)
    found = gradients_by_ord()[1](np.float32(ord), x, max_norm)
    along = WEIGHTS @ x.astype(np.float64) / size
    np.testing.assert_allclose(
        found, -along * float(max_norm) * expected / size, 1e-3, 1e-5 * float(max_norm)
    )


@pytest.mark.parametrize("ord", [1.0, 2.0, 3.0, math.inf])
def test_gradient_by_a_traced_ord_is_zero_at_zero(ord):
    norm, (by_ord, by_x) = gradients_by_ord()[0](
        np.float32(ord), np.zeros_like(at(0)[0])
    )
    assert (norm, by_ord) == (0, 0)
    np.testing.assert_array_equal(by_x, np.zeros(6))


def test_gradient_by_a_traced_ord_is_zero_at_infinity():
    x, _, _ = at(0)
    norm, (by_ord, by_x) = gradients_by_ord()[0](np.float32(math.inf), x)
    assert (norm, by_ord) == (3, 0)
    np.testing.assert_allclose(by_x, slope(x, math.inf), 1e-6)


@ords
def test_derivatives_at_zero_are_zero(ord):
    zero = np.zeros(6, np.float32)
    square = jax.grad(lambda x: global_norm(x, ord=ord) ** 2)
    for derivative in (jitted_gradient(ord), jitted_hessian(ord), square):
        assert not derivative(zero).any()


def test_derivatives_of_the_clip_at_zero_are_those_of_the_identity():
    zero = np.zeros(6, np.float32)
    for max_norm in (1.0, math.inf):
        found, by_threshold = clip_derivatives()[0](zero, np.float32(max_norm))
        np.testing.assert_allclose(found, WEIGHTS)
        assert by_threshold == 0
        assert not clip_derivatives()[1](zero, np.float32(max_norm)).any()


# --- Complex entries.

HUGE_MODULI = {
    "one": np.complex64([3e38 + 3e38j]),
    "several": np.complex64([3e38 + 3e38j, 1.0, 1e38j, -2e38 + 3.3e38j]),
    "complex128": np.array([1.5e308 + 1.5e308j, 1e300, 1j]),
}


@pytest.mark.parametrize("case", HUGE_MODULI)
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_complex_entries_whose_modulus_overflows_are_clipped(case, ord):
    with jax.enable_x64(case == "complex128"):
        for nonfinite in ("nan", "zero"):
            clips_to(
                [HUGE_MODULI[case]], 2.0, ord, clip_of(ord=ord, nonfinite=nonfinite)
            )
        (norm,) = leaf_norms([HUGE_MODULI[case]], ord=ord)
        assert norm == math.inf


@functools.cache
def jitted_norm(ord):
    return jax.jit(functools.partial(global_norm, ord=ord))


@pytest.mark.whole
@pytest.mark.parametrize("ord", [1, 2, 3, 300, 1e4, math.inf])
def test_complex_entries_of_any_magnitude(ord):
    @given(st.lists(st.integers(-120, 126), min_size=8, max_size=8))
    @example([0] * 8)
    def check(exponents):
        parts = np.ldexp([1.0, -1.5, 1.25, 1.75, 1, 1, -1, 1.5], exponents)
        leaf = (parts[:4] + 1j * parts[4:]).astype(np.complex64)
        assert_norm(jitted_norm(ord)([leaf]), oracle.exact_norm(leaf, ord))

    check()


# --- Every magnitude, and every shape.

SHAPES = [(), (1,), (3,), (5000,)]
MAGNITUDES = {
    "float32": np.ldexp(np.float32(1), np.arange(-149, 128)),
    "bfloat16": np.ldexp(np.float64(1), np.arange(-133, 128)).astype(
        ml_dtypes.bfloat16
    ),
    "float16": np.ldexp(np.float64(1), np.arange(-24, 16)).astype(np.float16),
}
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def assert_norms(function, dtype, shape, magnitudes, ord=2):
    for magnitude in magnitudes:
        leaf = np.full(shape, magnitude, jnp.dtype(dtype))
        found = np.asarray(jax.tree.leaves(function(leaf))[0])
        assert_norm(found, oracle.exact_norm(leaf, ord))


@shapes
@pytest.mark.parametrize("dtype", MAGNITUDES)
@pytest.mark.parametrize("function", [global_norm, leaf_norms])
def test_norm_of_one_leaf_of_every_magnitude(function, dtype, shape):
    """Subnormal entries count too, although XLA on CPU computes with none."""
    assert_norms(jax.jit(function), dtype, shape, MAGNITUDES[dtype])


@shapes
@pytest.mark.parametrize("function", [global_norm, leaf_norms])
def test_norm_of_one_leaf_of_every_magnitude_outside_jit(function, shape):
    assert_norms(function, "float32", shape, MAGNITUDES["float32"][::12])


@pytest.mark.parametrize("function", [global_norm, leaf_norms])
@pytest.mark.parametrize("ord", [1, 3, math.inf])
def test_norm_of_other_orders_of_one_scalar_of_every_magnitude(function, ord):
    # XLA merges products with constants, in a scalar leaf above all.
    magnitudes = [m for m in MAGNITUDES["float32"] if m >= TINY]
    function = jax.jit(functools.partial(function, ord=ord))
    assert_norms(function, "float32", (), magnitudes, ord)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-39, 1e-25, 1e25, 3e38])
@pytest.mark.parametrize("function", [global_norm, leaf_norms])
def test_norm_of_a_constant(function, magnitude):
    constant = np.float32(magnitude)
    found = jax.jit(lambda: function([constant]))()
    assert_norm(np.asarray(jax.tree.leaves(found)[0]), oracle.exact_norm(constant))


def test_norm_of_float64_of_every_magnitude():
    with jax.enable_x64(True):
        norms = jax.jit(lambda tree: (global_norm(tree), leaf_norms(tree)))
        for exponent in range(-1022, 1023, 20):
            tree = [np.float64(2.0**exponent), np.full(3, 2.0**exponent)]
            found, each = norms(tree)
            assert_norm(found, oracle.exact_norm(tree))
            for norm, leaf in zip(each, tree, strict=True):
                assert_norm(norm, oracle.exact_norm(leaf))


def test_subnormal_leaves_beside_normal_ones_have_norms():
    tree = {
        "subnormal": np.full(5000, 1e-40, np.float32),
        "half": np.full(5000, 1e-39, ml_dtypes.bfloat16),
        "normal": np.ones(3, np.float32),
    }
    for function in (leaf_norms, jax.jit(leaf_norms)):
        found = function(tree)
        for key, leaf in tree.items():
            assert_norm(found[key], oracle.exact_norm(leaf))


@shapes
@pytest.mark.parametrize("dtype", MAGNITUDES)
def test_one_leaf_of_every_magnitude_is_clipped(shape, dtype):
    normal = float(jnp.finfo(dtype).tiny)
    for magnitude in MAGNITUDES[dtype][::4]:
        if float(magnitude) >= normal:
            leaf = np.full(shape, magnitude, jnp.dtype(dtype))
            largest = min(oracle.exact_norm(leaf), np.longdouble(MAX))
            clips_to([leaf], np.float32(largest / 2))


@shapes
def test_one_leaf_of_any_magnitude_is_clipped_outside_jit(shape):
    for magnitude in (1e-30, 1e-19, 1.0, 1e19, 1e30, 3e38):
        leaf = np.full(shape, magnitude, np.float32)
        largest = min(oracle.exact_norm(leaf), np.longdouble(MAX))
        clips_to([leaf], np.float32(largest / 2), clip=clip_updates)


def test_examples_of_every_magnitude_have_norms_of_their_own():
    batch = np.outer(MAGNITUDES["float32"], np.float32([1, 0, 0.5, 1, 1.5]))
    batch = batch.astype(np.float32)
    for norms in (jax.vmap(global_norm)(batch), jax.vmap(leaf_norms)(batch)):
        for norm, leaf in zip(np.asarray(norms), batch, strict=True):
            assert_norm(norm, oracle.exact_norm(leaf))


def test_derivative_of_the_1_norm_is_the_sign_of_the_smallest_entries_too():
    # Divided by the norm, the last entries underflow.
    x = np.float32([1e34, -3e30, 1e-10, -1e-5, 0.0])
    found = jax.grad(functools.partial(global_norm, ord=1))(x)
    np.testing.assert_allclose(found, [1, -1, 1, -1, 0], rtol=1e-6)
    z = np.complex64([1e34, 1e-10j])
    found = jax.grad(functools.partial(global_norm, ord=1))(z)
    np.testing.assert_allclose(found, [1, -1j], rtol=1e-6)


def test_results_far_below_one_are_scaled_by_two_normal_factors():
    # No product of two normal floats is less than 2e-76, so these may become 0.
    x = np.float32([1.5e38, -2.0, 1.0])
    for max_norm in (2e-37, 1e-36, 1e-30):
        clipped, _ = clip_updates(x, max_norm)
        oracle.assert_clipped([clipped], [x], max_norm)
