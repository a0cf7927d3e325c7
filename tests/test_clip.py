"""clip_updates: its guarantees, its edge cases and its derivatives, against NumPy."""

import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
from hypothesis import example, given, strategies as st
from jax import export
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    metrics,
)

dtypes = pytest.mark.parametrize("dtype", sorted(oracle.FLOATS))
ords = pytest.mark.parametrize("ord", [1, 1.5, 2, 3, math.inf])
policies = pytest.mark.parametrize("nonfinite", ["nan", "zero"])
TINY = oracle.TINY
MAX = float(np.finfo(np.float32).max)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def on_mesh(tree):
    """On a mesh, where nothing is done as suits a CPU."""
    return jax.device_put(tree, NamedSharding(oracle.mesh(AxisType.Explicit), P()))


each_place = pytest.mark.parametrize("place", [jax.device_put, on_mesh])


# --- Any tree of a few forms, at any magnitude, threshold, order and policy.
#
# HYPOTHESIS_PROFILE=thorough draws 20,000 cases of each mode.

FORMS = {
    "one leaf": "float32[37]",
    "scalars": ["float32[]", "bfloat16[]"],
    "nested": {
        "a": ["float32[3,5]", None, ("bfloat16[7]",)],
        "b": {},
        "c": optax.MaskedNode(),
    },
    "zero sizes": ["bfloat16[0,4]", "float32[3]", "float32[2,0]"],
    "half precision": ["bfloat16[64,130]", "float16[130]"],
    "many small": ["float32[5]"] * 70,
    "one large": {"w": "float32[300,260]", "b": "float32[9]"},
    "complex": ("complex64[4,3]", "float32[5]"),
    "complex alone": "complex64[6]",
    "not counted": {"step": "float0[2]", "w": "float32[8]"},
    "float64": ["float64[7]", "bfloat16[3]", "complex128[2]"],
}


class Case(NamedTuple):
    """A tree, and how it is clipped."""

    tree: Any
    max_norm: float
    ord: float
    nonfinite: str


def filled(form, seed, exponents, bad):
    """The form with normal entries, each leaf times one of the powers of two."""
    rng, next_exponent = np.random.default_rng(seed), itertools.cycle(exponents)

    def draw(spec):
        dtype, sizes = re.fullmatch(r"(\w+)\[(.*)\]", spec).groups()
        shape = tuple(map(int, filter(None, sizes.split(","))))
        if dtype == "float0":
            return np.zeros(shape, jax.dtypes.float0)
        info = jnp.finfo(dtype)
        exponent = next(next_exponent) * (8 if info.bits == 64 else 1)
        # Subnormal entries have tests of their own, with every power of two.
        exponent = np.clip(exponent, info.minexp + 24, info.maxexp)
        parts = np.ldexp(rng.standard_normal((2, *shape)), exponent)
        parts = np.clip(parts, -float(info.max), float(info.max))
        wide = parts[0] + 1j * parts[1] if "complex" in dtype else parts[0]
        array = np.asarray(wide).astype(jnp.dtype(dtype))
        if bad and array.size:
            array.reshape(-1)[rng.integers(array.size)] = bad[0]
        return array

    with np.errstate(over="ignore"):
        return jax.tree.map(draw, form)


@st.composite
def cases(draw, name, lowest=-100):
    bad = draw(st.sampled_from([[], [], [], [], [math.inf], [-math.inf], [math.nan]]))
    exponents = draw(st.lists(st.integers(lowest, 128), min_size=1, max_size=4))
    tree = filled(FORMS[name], draw(st.integers(0, 2**32 - 1)), exponents, bad)
    ord = draw(st.sampled_from([2, 2, 1, 1.5, 3, 10.0, math.inf]))
    norm = float(np.nan_to_num(oracle.exact_norm(tree, ord)))
    relative = st.integers(-40, 4).map(lambda power: min(norm * 2.0**power, 3e38))
    max_norm = float(np.float32(draw(st.sampled_from([0, math.inf, 1]) | relative)))
    return Case(tree, max_norm, ord, draw(st.sampled_from(["nan", "zero"])))


forms = st.sampled_from(list(FORMS))


def check(case, clipped, norm, **options):
    """What the guarantees of ``clip_updates`` say of the result."""
    tree, max_norm, ord, nonfinite = case
    tolerance = {2: 2e-6, math.inf: 1e-6}.get(ord, 2e-5)
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
    pairs = zip(jax.tree.leaves(clipped), jax.tree.leaves(tree), strict=True)
    pairs = [(new, old) for new, old in pairs if old.dtype != jax.dtypes.float0]
    assert all((x.dtype, x.shape) == (y.dtype, y.shape) for x, y in pairs)
    oracle.assert_norm(norm, tree, ord, tolerance, **options)
    right = oracle.exact_norm(tree, ord)
    if not np.isfinite(right):
        for new, _ in pairs:
            assert np.isnan(new).all() if nonfinite == "nan" else not new.any()
    elif right * (1 + 4 * tolerance) <= max_norm:
        assert bits([new for new, _ in pairs]) == bits([old for _, old in pairs])
    elif right > max_norm * (1 + 4 * tolerance):
        found, old = ([pair[i] for pair in pairs] for i in (0, 1))
        oracle.assert_clipped(found, old, max_norm, ord, 4 * tolerance)
        if ord == 2:  # As far above the threshold as each entry's rounding may be.
            slack = max(map(oracle.eps, found)) + 1e-6
            tiny = [float(jnp.finfo(x.dtype).tiny) * x.size**0.5 for x in found]
            assert oracle.exact_norm(found) <= max_norm * (1 + slack) + sum(tiny)


@functools.cache
def compiled(ord, nonfinite, vmapped=False):
    clip = functools.partial(clip_updates, ord=ord, nonfinite=nonfinite)
    clip = jax.vmap(clip) if vmapped else clip
    return jax.jit(lambda tree, max_norm: clip(tree, max_norm))


@given(forms.flatmap(cases))
def test_any_tree_outside_jit(case):
    options = case._asdict()
    with jax.enable_x64(True):
        check(case, *clip_updates(options.pop("tree"), **options))


@each_place
def test_any_tree_under_jit(place):
    lowest = -100 if place is jax.device_put else -50

    @given(forms.flatmap(functools.partial(cases, lowest=lowest)))
    def check_case(case):
        with jax.enable_x64(True):
            tree = jax.tree.map(jnp.asarray, as_jit_takes(case.tree))
            clip = compiled(case.ord, case.nonfinite)
            found = clip(place(tree), np.float32(case.max_norm))
            check(case._replace(tree=tree), *found, on_one_cpu=lowest == -100)

    check_case()


@given(forms.flatmap(lambda name: st.tuples(cases(name), cases(name))))
def test_any_tree_under_vmap_beside_one_of_another_magnitude(pair):
    first, second = pair
    pair = first, second._replace(ord=first.ord, nonfinite=first.nonfinite)
    with jax.enable_x64(True):
        pair = [each._replace(tree=as_jit_takes(each.tree)) for each in pair]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *(x.tree for x in pair))
        thresholds = np.float32([each.max_norm for each in pair])
        clip = compiled(first.ord, first.nonfinite, vmapped=True)
        clipped, norms = clip(batch, thresholds)
        for i, case in enumerate(pair):
            check(case, jax.tree.map(lambda x, i=i: x[i], clipped), norms[i])


def as_jit_takes(tree):
    """Without float0, of which jit takes none."""
    return {"w": tree["w"]} if isinstance(tree, dict) and "step" in tree else tree


# --- Norms above the largest float.

LARGE = {
    "small beside large": ([np.float32([3e38, 3e38, 0.1, 1e-3])], 1e38),
    "to the largest": ([np.full(9, 3e38, np.float32)], MAX),
    "to one": ([np.float32(3e38), np.full(5000, 3e38, np.float32)], 1.0),
    "mixed": ([np.full(7, 3e38, ml_dtypes.bfloat16), np.float32([1, 3e38])], 1e20),
    "complex": ([np.complex64([3e38 + 3e38j, 1.0, 1e38j, -2e38 + 3.3e38j])], 1.0),
    "float64": ([np.full(4, 1.7e308), np.float64([1e290, 1.0])], 1e308),
    "float64 beside float32": ([np.full(4, 1.7e308), np.ones(3, np.float32)], 1e300),
    "complex128": ([np.array([1.5e308 + 1.5e308j, 1e300, 1j])], 3.0),
}


@pytest.mark.parametrize("case", LARGE)
@ords
def test_norms_above_the_largest_float_are_clipped(case, ord):
    tree, max_norm = LARGE[case]
    with jax.enable_x64("64" in case or "128" in case):
        for clip in (clip_updates, jax.jit(clip_updates, static_argnames="ord")):
            clipped, norm = clip(tree, max_norm, ord=ord)
            oracle.assert_norm(norm, tree, ord)
            double = norm.dtype == np.float64
            tolerance = 1e-14 if double else 4e-6
            oracle.assert_clipped(clipped, tree, max_norm, ord, tolerance)
        tx = clip_by_global_norm(max_norm, ord=ord, nonfinite="zero")
        updates, state = jax.jit(tx.update)(tree, tx.init(tree))
        logged = metrics(state)
    assert bits(updates) == bits(clipped)
    if ord == 2:
        assert logged["global_norm"] == math.inf
    # The state is float32, in which a threshold of 1e308 is inf.
    with np.errstate(over="ignore"):
        after = np.float32(min(oracle.exact_norm(tree, ord), max_norm))
        np.testing.assert_array_equal(logged["clipped_norm"], after)
    assert logged["clip_scale"] > 0
    clipped = int(oracle.exact_norm(tree, ord) > max_norm)
    assert (logged["clip_fraction"], logged["nonfinite_fraction"]) == (clipped, 0)


# --- Rounding: every number of half precision, and its bits.


def every_half(dtype):
    return np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("max_norm", [0.3, 0.75, 0.9999, 1 / 3, 1e-3, 3e-30, 0.0])
@each_place
def test_every_number_of_half_precision_is_rounded_as_ieee_says(place, max_norm, dtype):
    """To nearest, of ties to even, of which 0.75 makes many."""
    leaf = every_half(dtype)
    clip = jax.jit(functools.partial(clip_updates, use_norm=1.0))
    clipped = np.asarray(clip(place(leaf), np.float32(max_norm))[0])
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        product = leaf.astype(np.float32) * np.float32(max_norm)
        expected = product.astype(leaf.dtype)
    # Subnormal numbers are zeros to XLA on CPU.
    normal = (np.abs(leaf.astype(np.float32)) >= TINY) & (np.abs(product) >= TINY)
    assert normal.sum() > (1000 if max_norm else -1)
    np.testing.assert_array_equal(
        clipped.view(np.uint16)[normal], expected.view(np.uint16)[normal]
    )
    np.testing.assert_array_equal(np.isnan(clipped), np.isnan(product))
    assert (clipped[product == 0] == 0).all()


def entries_of_every_kind(dtype):
    if dtype in ("bfloat16", "float16"):
        return every_half(dtype)
    quiet = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)
    signalling = np.uint32([0x7F800001, 0xFFC12345, 0x3F800000, 1, 0x80000000])
    values = np.concatenate([quiet, signalling]).view(np.float32)
    return values if dtype == "float32" else values[:5004].view(np.complex64)


@each_place
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@policies
def test_entries_of_every_kind_stay_bit_for_bit_within_a_given_norm(
    place, dtype, nonfinite
):
    values = entries_of_every_kind(dtype)
    if place is on_mesh and dtype == "bfloat16":  # Converted, other NaNs become quiet.
        values = values[values.view(np.uint16) & 0x7FFF <= 0x7F80]
    for norm in (0.5, 1.0):
        clipped, _ = clip_updates(place(values), 1, use_norm=norm, nonfinite=nonfinite)
        assert np.asarray(clipped).tobytes() == values.tobytes()


# --- Entries that XLA knows to be alike, and constants beside a leaf.
#
# XLA computes with one entry of a broadcast, as with a scalar, and merges its products
# with constants: ``(x * c) * (x * c)`` becomes ``(x * x) * (c * c)``, and a factor of
# that may overflow. ``(c * x) * d`` becomes ``x * (c * d)``, which may underflow.

ENTRIES = np.float32([0.0, 1e-37, 1e-30, 1e-25, 1e-19, 1.0, 1e19, 1e25, 1e30, 1e34])


def clip_of_alike(leaf):
    """Its norm, and its largest entry after a clip that scales it, beside its like."""
    (clipped, *_), _ = clip_updates([leaf, leaf, jnp.ones(3)], 0.5)
    return global_norm([leaf]), jnp.max(clipped, initial=0)


def gradient_of_sum(shape, x):
    return jax.grad(lambda leaf: jnp.sum(leaf * x))(jnp.ones(shape))


MADE = {
    "constants": (jnp.full, True),
    "NumPy constants": (np.full, True),
    "broadcasts": (jnp.full, False),
    "gradients": (gradient_of_sum, False),
}


def clips_of_alike(how, shape, xs):
    if how == "examples":
        return jax.vmap(lambda x: jnp.stack(clip_of_alike(jnp.full(shape, x))))(xs)
    make, of_constant = MADE[how]
    xs = ENTRIES if of_constant else xs
    return jnp.array([clip_of_alike(make(shape, x)) for x in xs])


@pytest.mark.parametrize("how", [*MADE, "examples"])
@pytest.mark.parametrize("mode", ["jit", "explicit", "auto", "shard_map"])
@pytest.mark.parametrize("shape", [(), (1,), (35,), (200, 300)], ids=str)
def test_leaves_of_equal_entries(how, mode, shape):
    function, xs = functools.partial(clips_of_alike, how, shape), ENTRIES
    mesh = oracle.mesh(AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    if mode == "shard_map":
        function = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P())
    if mode != "jit":
        xs = jax.device_put(xs, NamedSharding(mesh, P()))
    for x, (norm, entry) in zip(ENTRIES, jax.jit(function)(xs), strict=True):
        leaf = np.full(shape, x)
        oracle.assert_norm(norm, leaf, on_one_cpu=mode == "jit")
        expected = x * 0.5 / math.hypot(oracle.norm([leaf, leaf]), math.sqrt(3))
        np.testing.assert_allclose(entry, expected, 2e-6, 1e-38)


@pytest.mark.parametrize("after", [1e-6, 0.25, 8.0])
@pytest.mark.parametrize("before", [1e-6, 0.25, 8.0])
def test_products_with_constants_around_a_clip(before, after):
    # XLA may merge constants of one product, as of a mean over steps, with ours.
    leaf = np.float32([3e6, -4e6, 0.5, 1e-10])

    @jax.jit
    def update(leaf):
        return clip_updates(leaf * before, 1.0)[0] * after

    scaled = leaf * np.float64(before)
    expected = scaled * min(1, 1 / np.linalg.norm(scaled)) * after
    np.testing.assert_allclose(update(leaf), expected, 1e-6)


NORMS = [1e-37, 1e-30, 1e-10, 1.0, 1e9, 1e19, 0.9e38, 1.7e38, 3e38]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("norm", NORMS)
@each_place
def test_given_norms_and_thresholds_of_any_magnitude(place, norm, dtype):
    """Arguments, constants of the program, and captured arrays."""
    with jax.enable_x64(dtype == "float64"):
        make, least = np.float32, oracle.TINY
        if dtype == "float64":
            make, least, norm = np.float64, 2.3e-308, 1.7e308 if norm == 3e38 else norm
        leaf = (norm * np.array([0.5, -0.25, 1e-3])).astype(jnp.dtype(dtype))
        clip = jax.jit(lambda leaf, c, n: clip_updates(leaf, c, use_norm=n)[0])
        for ratio in (0.5, 1e-5, 1e-20, 1e-36):
            c, n = make(norm * ratio), make(norm)
            expected = oracle.wide(leaf) * (np.longdouble(c) / np.longdouble(n))
            allowed = (oracle.eps(leaf) / 2 + 1e-6) * np.abs(expected) + least
            for captured in ((c, n), jax.device_put((c, n)), (float(c), float(n))):
                inside = jax.jit(lambda leaf, captured=captured: clip(leaf, *captured))
                for found in (inside(place(leaf)), clip(place(leaf), *captured)):
                    assert (np.abs(oracle.wide(found) - expected) <= allowed).all()


# --- Edge cases, by the rows of the docstring's table.


@pytest.mark.whole
@pytest.mark.parametrize("max_norm", [0, 0.0, 1.0, math.inf])
def test_zero_norm_and_zero_threshold(max_norm):
    clipped, measured = clip_updates(jnp.zeros(3), max_norm)
    assert measured == 0
    assert not clipped.any()
    if max_norm == 0:
        assert not clip_updates(jnp.array([1.0, -2.0, 1e30]), max_norm)[0].any()


def test_arrays_out_of_range():
    clip = jax.jit(lambda leaf, c: clip_updates(leaf, c)[0])
    np.testing.assert_array_equal(clip(jnp.ones(3), -1.0), [0, 0, 0])
    for dtype, nan in itertools.product(
        ["bfloat16", "float32"], [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF]
    ):
        nan = jax.lax.bitcast_convert_type(jnp.uint32(nan), jnp.float32)
        leaf = jnp.asarray([1.0, -2.0, 0.0, 3e38, jnp.inf, -jnp.inf], dtype)
        for entries in (leaf, leaf[:4]):
            assert jnp.isnan(clip(entries, nan)).all()
            assert jnp.isnan(clip_updates(entries, nan)[0]).all()


def test_max_norm_none_passes_everything_through():
    tree = [jnp.array([1.0, math.inf]), None, jnp.array([math.nan])]
    clipped, measured = clip_updates(tree, None)
    assert math.isnan(measured)
    assert bits(clipped) == bits(tree)


def test_small_entries_beside_large_ones():
    (clipped,), _ = clip_updates([jnp.array([1e30, 1e20, 1e10, 1.0])], 1.0)
    np.testing.assert_allclose(clipped, [1, 1e-10, 1e-20, 1e-30], 1e-6)
    # No product of two normal floats is less than 2e-76, so these may become 0.
    x = np.float32([1.5e38, -2.0, 1.0])
    for max_norm in (2e-37, 1e-36, 1e-30):
        oracle.assert_clipped(clip_updates([x], max_norm)[0], [x], max_norm)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
@ords
@each_place
def test_non_finite_entries(place, ord, max_norm, bad):
    for dtype in ("float16", "bfloat16", "float32"):
        leaf = np.array([1, bad]).astype(jnp.dtype(dtype))
        tree = [place(leaf), None, place(np.ones((2, 2), leaf.dtype))]
        clipped, _ = clip_updates(tree, max_norm, ord=ord)
        assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(clipped))
        clipped, _ = clip_updates(tree, max_norm, ord=ord, nonfinite="zero")
        assert not any(leaf.any() for leaf in jax.tree.leaves(clipped))
        assert [leaf.dtype for leaf in jax.tree.leaves(clipped)] == [dtype, dtype]


def test_error_policy():
    def clip(updates):
        return clip_updates(updates, 1.0, nonfinite="error")[0]

    bad = jnp.array([1.0, math.nan])
    error, _ = checkify.checkify(jax.jit(clip))(bad)
    with pytest.raises(checkify.JaxRuntimeError, match="global norm nan.*leaf_norms"):
        error.throw()
    with pytest.raises(checkify.JaxRuntimeError, match="global norm nan"):
        clip(bad)
    error, clipped = checkify.checkify(jax.jit(clip))(jnp.array([3.0, 4.0]))
    error.throw()
    np.testing.assert_allclose(clipped, [0.6, 0.8], 1e-6)


# --- use_norm.


def test_use_norm_is_trusted_and_returned():
    leaf = jnp.array([6.0, 8.0])
    for norm, expected in [(2, [3, 4]), (0.5, [6, 8])]:
        clipped, returned = clip_updates([leaf], 1.0, use_norm=norm)
        assert (returned, returned.dtype) == (norm, jnp.float32)
        np.testing.assert_array_equal(clipped[0], expected)
    for norm in (math.inf, math.nan):
        clipped, returned = clip_updates(leaf, 1.0, use_norm=norm)
        np.testing.assert_equal(float(returned), norm)
        assert jnp.isnan(clipped).all()
        zeros, _ = clip_updates(leaf, 1.0, use_norm=norm, nonfinite="zero")
        assert not zeros.any()


# --- Derivatives.


@ords
@policies
def test_derivatives_of_the_clip_at_any_magnitude(nonfinite, ord):
    def clip(x, max_norm):
        return clip_updates(x, max_norm, ord=ord, nonfinite=nonfinite)[0]

    weights = oracle.wide(oracle.WEIGHTS)
    pull = jax.jit(lambda x, c, w: jax.vjp(clip, x, c)[1](w))
    push = jax.jit(lambda x, c, t: jax.jvp(lambda x: clip(x, c), (x,), (t,))[1])
    hessian = jax.jit(
        jax.hessian(lambda x, c: jnp.vdot(clip(x, c), np.float32(oracle.WEIGHTS)))
    )

    @oracle.every_magnitude
    def check(power):
        x = oracle.at(power)
        size, unit = oracle.exact_norm(x, ord), oracle.slope(x, ord)
        for bound in (float(size) / 3, float(size) / 1e3, 0.0, 1e-20, 1, 1e20):
            c = np.float32(bound)
            if size < 2 * np.longdouble(c):
                continue
            ratio, along = np.longdouble(c) / size, weights @ oracle.wide(x) / size
            for factor in (1.0, 1e25):  # So that no derivative underflows.
                found, by_threshold = pull(x, c, np.float32(oracle.WEIGHTS * factor))
                expected = factor * ratio * (weights - along * unit)
                oracle.assert_close(found, expected, terms=2)
                # At 0 that is a mean: a negative array counts as 0.
                oracle.assert_close(by_threshold, factor * along / (1 + (c == 0)))
            for other in (-12, 0, 12, 25):
                t = (oracle.VALUES[::-1] * 10.0**other).astype(np.float32)
                wide = oracle.wide(t)
                expected = ratio * (wide - oracle.wide(x) / size * (unit @ wide))
                oracle.assert_close(push(x, c, t), expected, 2e-5)
        if power <= 35:  # Above, its terms underflow.
            ratio = np.longdouble(np.float32(size / 3)) / size
            cross, twice = np.outer(weights, unit), 2 * along * np.outer(unit, unit)
            bent = along * oracle.curvature(x, ord)
            expected = ratio * ((twice - cross - cross.T) / size - bent)
            found = hessian(x, np.float32(size / 3))
            error = np.abs(oracle.wide(found) - expected)
            assert error.max() <= 1e-4 * np.abs(expected).max() + 8 * TINY

    check()


def plain(updates, max_norm):
    """The formula, with nothing that makes it fast or safe."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in updates]
    norm = jnp.sqrt(sum(squares))
    scale = jnp.where(norm > max_norm, max_norm / norm, 1.0)
    return [(x.astype(jnp.float32) * scale).astype(x.dtype) for x in updates]


@dtypes
@pytest.mark.parametrize("max_norm", [0.7, 100.0])
@pytest.mark.parametrize("size", [60, 5000])
def test_derivatives_are_those_of_the_plain_formula(dtype, max_norm, size):
    updates, weights = (oracle.normals([(size,)] * 2, dtype, seed) for seed in (0, 1))

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


@example(1.0, 38)
@example(0.9e38, 37)
@given(st.floats(2.0**-99, 2.0**127), st.integers(-30, 38))
def test_derivative_by_a_given_norm(norm, power):
    x, weights = oracle.at(power), oracle.wide(oracle.WEIGHTS)
    norm = np.float32(norm)
    max_norm = norm / np.float32(4)
    gradient = jax.grad(
        lambda n: jnp.vdot(
            clip_updates(x, max_norm, use_norm=n)[0], np.float32(oracle.WEIGHTS)
        )
    )
    expected = -np.longdouble(max_norm) / np.longdouble(norm) ** 2
    expected = expected * (weights @ oracle.wide(x))
    if abs(expected) < 3e38:
        oracle.assert_close(gradient(norm), expected)


def test_derivative_at_a_norm_just_above_the_threshold_is_that_of_the_clip():
    # The quotient rounds to 1: the leaf is kept, and still on the sphere.
    updates, threshold = jnp.array([1.0, 0.0]), np.float32(1 - 2**-24)
    jacobian = jax.jacobian(lambda x: clip_updates(x, threshold, use_norm=1.0)[0])
    np.testing.assert_allclose(jacobian(updates), threshold * np.eye(2), rtol=1e-6)
    jacobian = jax.jacobian(lambda x: clip_updates(x, threshold)[0])
    np.testing.assert_allclose(jacobian(updates), np.diag([0.0, 1.0]), atol=1e-6)


@ords
def test_derivatives_of_the_clip_at_zero_are_those_of_the_identity(ord):
    zero = jnp.zeros(3)
    for max_norm in (1.0, math.inf):

        def clip(x, c):
            return clip_updates(x, c, ord=ord)[0]

        by_x, by_threshold = jax.jacobian(clip, (0, 1))(zero, max_norm)
        np.testing.assert_array_equal(by_x, np.eye(3))
        assert not by_threshold.any()
        assert not jax.hessian(clip)(zero, max_norm).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@ords
def test_derivatives_are_zero_where_updates_are_zeroed(bad, ord):
    def total(x, max_norm):
        tree = [x, jnp.ones(3, jnp.bfloat16) * x[0].astype(jnp.bfloat16)]
        clipped, _ = clip_updates(tree, max_norm, ord=ord, nonfinite="zero")
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in clipped)

    at = np.float32([2.0, bad, -1.0]), np.float32(1)
    assert not any(leaf.any() for leaf in jax.grad(total, (0, 1))(*at))
    tangents = np.ones(3, np.float32), np.float32(1)
    assert jax.jvp(total, at, tangents) == (0, 0)
    assert not jax.jit(jax.hessian(total))(*at).any()


# --- Transformations.


def test_one_program_outside_jit_and_none_on_later_calls():
    tree = oracle.normals([(7,), (3, 5), (2,)])
    with oracle.compilations() as first:
        clip_updates(tree, 1.0)
    assert len(first) == 1
    with oracle.compilations() as later:
        clip_updates(tree, 2.5)
        clip_updates(jax.tree.map(lambda leaf: 2 * leaf, tree), 1.0, ord=2.0)
    assert not [entry for entry in later if "multiply" not in entry]


PLATFORMS = ("cpu", "cuda", "tpu")
EXPORTED = {
    "global_norm": global_norm,
    "ord 3": functools.partial(global_norm, ord=3),
    "ord inf": functools.partial(global_norm, ord=np.inf),
    "leaf_norms": leaf_norms,
    "clip_updates": lambda updates: clip_updates(updates, 1.0),
    "zero": lambda updates: clip_updates(updates, 1.0, nonfinite="zero"),
}
EXTENTS = {"b, 3": (5000, 3), "b, n": (70, 80), "b": (9,), "2*b, 3": (4, 3)}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("extents", EXTENTS)
def test_symbolic_shapes_may_be_exported_for_every_platform(extents, name, dtype):
    shape = export.symbolic_shape(extents)
    abstract = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), jnp.zeros(4)]
    program = export.export(jax.jit(EXPORTED[name]), platforms=PLATFORMS)(abstract)
    assert program.platforms == PLATFORMS
    first, second = oracle.normals([EXTENTS[extents], (4,)])
    for scale in (1.0,) if dtype == "float16" else (1.0, 1e-18, 1e30):
        updates = [(first * scale).astype(dtype), second * scale]
        found, expected = program.call(updates), EXPORTED[name](updates)
        for leaf, same in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert leaf.dtype == same.dtype
            rounding = oracle.eps(leaf) + 1e-6
            np.testing.assert_allclose(np.float64(leaf), np.float64(same), rounding)
