"""One norm and one clip, however the leaves lie on the devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

SHAPES = {
    "both": (16, 8),
    "swapped": (8, 16),
    "one": (12, 5),
    "together": (5, 16),
    "whole": (3, 7),
    "large": (2048, 64),
}
SPECS = {
    "both": P("x", "y"),
    "swapped": P("y", "x"),
    "one": P("x"),
    "together": P(None, ("x", "y")),
    "whole": P(),
    "large": P(None, "y"),
}
NAMES = {
    "both": ("x", "y"),
    "swapped": ("y", "x"),
    "one": "x",
    "together": ("x", "y"),
    "whole": (),
    "large": ("y",),
}


def part_of(spec, axis):
    """What of a spec concerns one axis."""

    def own(entry):
        return axis if axis == entry or axis in (entry or ()) else None

    return P(*map(own, spec))


def laid_out(tree, mesh):
    shardings = {key: NamedSharding(mesh, SPECS[key]) for key in tree}
    return jax.device_put(tree, shardings)


# Each takes a function of a tree and of axis_name to a like tree and scalars, and
# applies it to a tree of NumPy arrays.


def by_jit(function, tree, axis_type=AxisType.Auto):
    return jax.jit(function)(laid_out(tree, oracle.mesh(axis_type)))


def by_in_shardings(function, tree):
    shardings = {
        key: NamedSharding(oracle.mesh(*[AxisType.Auto] * 2), SPECS[key])
        for key in tree
    }
    return jax.jit(function, in_shardings=(shardings,))(tree)


def by_shard_map(function, tree, **options):
    specs = {key: SPECS[key] for key in tree}
    mapped = jax.shard_map(
        function,
        mesh=oracle.mesh(),
        in_specs=(specs,),
        out_specs=(specs, P()),
        **options,
    )
    return jax.jit(mapped)(tree)


def by_unchecked_shard_map(function, tree):
    names = {key: NAMES[key] for key in tree}
    function = functools.partial(function, axis_name=names)
    return by_shard_map(function, tree, check_vma=False)


def by_partly_manual_shard_map(function, tree, other=AxisType.Auto, manual="x"):
    specs = {key: part_of(SPECS[key], manual) for key in tree}
    types = {"x": other, "y": other, manual: AxisType.Auto}
    mesh = oracle.mesh(*types.values())
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(specs, P()),
        axis_names={manual},
    )
    return jax.jit(mapped)(laid_out(tree, mesh))


def by_nested_shard_maps(function, tree):
    outer = {key: part_of(SPECS[key], "x") for key in tree}
    inner = {key: part_of(SPECS[key], "y") for key in tree}
    mapped = jax.shard_map(
        jax.shard_map(
            function, in_specs=(inner,), out_specs=(inner, P()), axis_names={"y"}
        ),
        mesh=oracle.mesh(),
        in_specs=(outer,),
        out_specs=(outer, P()),
        axis_names={"x"},
    )
    return jax.jit(mapped)(tree)


LAYOUTS = {
    "jit, auto": by_jit,
    "jit, explicit": functools.partial(by_jit, axis_type=AxisType.Explicit),
    "jit, in_shardings": by_in_shardings,
    "shard_map": by_shard_map,
    "shard_map, unchecked": by_unchecked_shard_map,
    "shard_map, y auto": by_partly_manual_shard_map,
    "shard_map, x auto": functools.partial(by_partly_manual_shard_map, manual="y"),
    "shard_map, y explicit": functools.partial(
        by_partly_manual_shard_map, other=AxisType.Explicit
    ),
    "shard_map, nested": by_nested_shard_maps,
}
# Without types JAX cannot tell how to differentiate a sum over devices inside, and
# one ``shard_map`` in another it cannot differentiate from outside (0.10.2).
CHECKED = {name: each for name, each in LAYOUTS.items() if "unchecked" not in name}
DIFFERENTIABLE = {name: each for name, each in LAYOUTS.items() if "nested" not in name}
# The others differ from these in the mesh alone.
CORE = ("jit, auto", "jit, explicit", "shard_map", "shard_map, unchecked")


def each_of(layouts, fast=CORE):
    """Runs a test on every layout, the slower suite on those not in ``fast``."""
    return pytest.mark.parametrize(
        "layout",
        [
            pytest.param(layout, id=name, marks=[pytest.mark.slow] * (name not in fast))
            for name, layout in layouts.items()
        ],
    )


every_layout = each_of(LAYOUTS)
every_checked_layout = each_of(CHECKED)
every_differentiable_layout = each_of(DIFFERENTIABLE)


def draw(dtype="float32", scale=1.0, keys=tuple(SHAPES)):
    tree = oracle.normals({key: SHAPES[key] for key in keys}, dtype, scale=scale)
    return jax.tree.map(np.array, tree)


# Clips to half the norm of the step before.
last_norm = Threshold(
    init=lambda: jnp.float32(math.inf),
    update=lambda norm, last, count: (0.5 * last, norm),
)


def assert_clipped(clipped, tree, max_norm, ord=2.0):
    expected = oracle.clipped(tree, max_norm, ord)
    for key, leaf in tree.items():
        assert clipped[key].dtype == leaf.dtype
        assert_close(clipped[key], expected[key], oracle.eps(leaf))


def assert_close(actual, expected, tolerance):
    actual = np.asarray(actual)
    wide = np.complex128 if np.iscomplexobj(actual) else np.float64
    np.testing.assert_allclose(actual.astype(wide), expected, max(tolerance, 1e-6))


# --- The features, on each layout.


@each_of(LAYOUTS, fast=LAYOUTS)
@pytest.mark.parametrize(
    ("ord", "scale"),
    [(2, 1.0), (2, 1e-30), (2, 1e30), (math.inf, 1.0)]
    + [
        pytest.param(ord, scale, marks=pytest.mark.slow)
        for ord in (1, 3.5, math.inf)
        for scale in (1.0, 1e-30, 1e30)
        if (ord, scale) != (math.inf, 1.0)
    ],
)
def test_norm_and_updates(layout, ord, scale):
    tree = draw(scale=scale)
    norm = oracle.norm(tree, ord)

    def clip(tree, axis_name=None):
        options = {"ord": ord, "axis_name": axis_name}
        clipped, measured = clip_updates(tree, norm / 3, **options)
        return clipped, (measured, leaf_norms(tree, **options))

    clipped, (measured, each) = layout(clip, tree)
    np.testing.assert_allclose(measured, norm, 1e-6)
    for key, leaf in tree.items():
        np.testing.assert_allclose(each[key], oracle.norm(leaf, ord), 1e-6)
    assert_clipped(clipped, tree, norm / 3, ord)


@every_layout
def test_below_the_threshold_nothing_changes(layout):
    tree = draw("bfloat16")

    max_norm = 1.01 * oracle.norm(tree)
    clipped, _ = layout(
        lambda tree, axis_name=None: clip_updates(tree, max_norm, axis_name=axis_name),
        tree,
    )
    for key, leaf in tree.items():
        np.testing.assert_array_equal(clipped[key], leaf)


@every_layout
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_other_dtypes(layout, dtype):
    scale = 30.0 if dtype == "float16" else 1e25
    tree = draw(dtype, scale)
    max_norm = oracle.norm(tree) / 3
    clipped, norm = layout(
        lambda tree, axis_name=None: clip_updates(tree, max_norm, axis_name=axis_name),
        tree,
    )
    np.testing.assert_allclose(norm, 3 * max_norm, 1e-6)
    assert_clipped(clipped, tree, max_norm)


@every_layout
def test_float64(layout):
    with jax.enable_x64(True):
        tree = {key: leaf.astype(np.float64) * 1e200 for key, leaf in draw().items()}
        clipped, norm = layout(
            lambda tree, axis_name=None: clip_updates(tree, 1.0, axis_name=axis_name),
            tree,
        )
        assert norm.dtype == np.float64
        np.testing.assert_allclose(norm, oracle.norm(tree), 1e-14)
        assert_close(clipped["both"], oracle.clipped(tree, 1.0)["both"], 1e-14)


@every_layout
@pytest.mark.parametrize(("bad", "nonfinite"), [(math.nan, "zero"), (math.inf, "nan")])
def test_one_bad_entry_on_one_device(layout, bad, nonfinite):
    tree = draw()
    tree["both"][0, 0] = bad

    def clip(tree, axis_name=None):
        return clip_updates(tree, 1.0, nonfinite=nonfinite, axis_name=axis_name)

    clipped, norm = layout(clip, tree)
    np.testing.assert_equal(np.asarray(norm), bad)
    expected = math.nan if nonfinite == "nan" else 0.0
    for leaf in clipped.values():
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, expected))


@every_layout
@pytest.mark.parametrize("value", [1e30, 1e-30])
def test_overflow_on_one_device_only(layout, value):
    # Each device decides by itself whether to read again, and must not wait for others.
    tree = jax.tree.map(lambda leaf: 0 * leaf, draw())
    tree["both"][0, 0] = tree["large"][-1, -1] = value

    def clip(tree, axis_name=None):
        return clip_updates(tree, value, axis_name=axis_name)

    clipped, norm = layout(clip, tree)
    np.testing.assert_allclose(norm, math.sqrt(2) * value, 1e-6)
    assert_clipped(clipped, tree, value)


@every_layout
def test_norm_given(layout):
    tree = draw()
    clipped, norm = layout(
        lambda tree, axis_name=None: clip_updates(
            tree, 1.0, use_norm=4.0, axis_name=axis_name
        ),
        tree,
    )
    assert norm == 4
    for key, leaf in tree.items():
        assert_close(clipped[key], leaf.astype(np.float64) / 4, 1e-6)


@every_layout
def test_scan_over_steps_keeps_the_state_as_it_was(layout):
    tree = draw()
    norm = oracle.norm(tree)

    def train(tree, axis_name=None):
        tx = clip_by_global_norm(last_norm, axis_name=axis_name)

        def step(state, scale):
            updates = jax.tree.map(lambda leaf: leaf * scale, tree)
            updates, state = tx.update(updates, state)
            return state, None

        state, _ = jax.lax.scan(step, tx.init(tree), jnp.array([1.0, 2.0, 0.5]))
        updates, state = tx.update(tree, state)
        return updates, state

    updates, state = layout(train, tree)
    np.testing.assert_allclose(state.global_norm, norm, 1e-6)
    np.testing.assert_allclose(state.threshold, 0.25 * norm, 1e-6)
    assert (state.num_updates, state.num_clipped) == (4, 2)
    assert_clipped(updates, tree, 0.25 * norm)


@every_layout
def test_skip_with_adaptive_thresholds(layout):
    """A spike and a NaN are skipped, and the norm of the clip inside is the same."""
    tree = draw(keys=("both", "one", "whole"))
    norm = oracle.norm(tree)
    scales = np.float32([1, 1.1, 0.9, 100, np.nan, 1.05])

    def train(tree, axis_name=None):
        clip = clip_by_global_norm(
            quantile_threshold(0.5, window=4, warmup_steps=3), axis_name=axis_name
        )
        tx = skip_by_global_norm(
            clip, zscore_threshold(6.0, warmup_steps=3), axis_name=axis_name
        )

        def step(state, scale):
            updates = jax.tree.map(lambda leaf: leaf * scale, tree)
            _, state = tx.update(updates, state)
            return state, state.threshold

        state, thresholds = jax.lax.scan(step, tx.init(tree), scales[:-1])
        updates, state = tx.update(
            jax.tree.map(lambda leaf: leaf * scales[-1], tree), state
        )
        return updates, (state, thresholds)

    updates, (state, thresholds) = layout(train, tree)
    assert (state.num_updates, state.num_skipped) == (6, 2)
    assert state.inner_state.num_updates == 4
    np.testing.assert_allclose(state.inner_state.threshold, 1.025 * norm, 1e-5)
    np.testing.assert_allclose(oracle.norm(updates), 1.025 * norm, 1e-5)
    # Mean 1 and standard deviation of 1, 1.1 and 0.9; at the spike, pulled to the mean.
    margin = 6 * np.std([1, 1.1, 0.9])
    expected = [np.inf] * 3 + [(1 + margin**2 / 99) * norm]
    np.testing.assert_allclose(thresholds[:4], expected, 1e-5)


@every_differentiable_layout
@pytest.mark.parametrize("ord", [2, 3])
def test_gradient_through_the_clip(layout, ord):
    tree = draw(keys=("both", "one", "whole"))
    weights = jax.tree.map(np.asarray, oracle.normals(SHAPES, seed=1))
    norm = oracle.norm(tree, ord)

    def clip(tree, axis_name=None):
        return clip_updates(tree, norm / 3, ord=ord, axis_name=axis_name)

    def loss(tree):
        clipped, _ = layout(clip, tree)
        return sum(jnp.sum(weights[key] * leaf) for key, leaf in clipped.items())

    slopes = jax.jit(jax.grad(loss))(tree)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)
    along = sum(np.vdot(weights[key], leaf) for key, leaf in wide.items())
    for key, slope_of_norm in norm_slopes(wide, ord).items():
        expected = (weights[key] - along / norm * slope_of_norm) / 3
        np.testing.assert_allclose(slopes[key], expected, 1e-4, 1e-6)


@every_checked_layout
@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_gradient_of_the_norm_inside(layout, ord):
    tree = draw(keys=("both", "one", "whole"))

    def gradient(tree):
        return jax.grad(functools.partial(global_norm, ord=ord))(tree), ()

    slopes, _ = layout(gradient, tree)
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), tree)
    for key, expected in norm_slopes(wide, ord).items():
        np.testing.assert_allclose(slopes[key], expected, 1e-4, 1e-7)


def norm_slopes(tree, ord):
    norm = oracle.norm(tree, ord)
    if ord == math.inf:
        return {k: np.sign(x) * (np.abs(x) == norm) for k, x in tree.items()}
    return {k: np.sign(x) * (np.abs(x) / norm) ** (ord - 1) for k, x in tree.items()}


# --- Types: what comes in comes out, and the state stays as it began.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jit_keeps_types_and_shardings(axis_type, dtype):
    tree = laid_out(draw(dtype), oracle.mesh(axis_type))
    tx = clip_by_global_norm(last_norm)
    state = tx.init(tree)
    update = jax.jit(tx.update)
    with oracle.compilations() as compiled:
        updates, new_state = update(tree, state)
        assert_same_types(updates, tree)
        assert_same_types(new_state, state)
        update(updates, new_state)
    assert len(compiled) == 1
    for key, leaf in tree.items():
        assert updates[key].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_shard_map_keeps_types():
    def update(tree):
        updates, state = clip_by_global_norm(1.0).update(tree, None)
        assert_same_types(updates, tree)
        assert {str(jax.typeof(leaf)) for leaf in state[:-1]} == {
            "float32[]",
            "int32[]",
        }
        return updates, state

    _, state = by_shard_map(update, draw())
    assert state.num_updates == 1


def assert_same_types(actual, expected):
    types = [jax.tree.map(jax.typeof, tree) for tree in (actual, expected)]
    assert types[0] == types[1]


@pytest.mark.parametrize("manual", [{"x"}, {"x", "y"}])
def test_no_names_is_local_where_leaves_have_types(manual):
    tree = draw(keys=("one",))
    norms = jax.shard_map(
        lambda tree: global_norm(tree, axis_name=())[None],
        mesh=oracle.mesh(),
        in_specs=P("x"),
        out_specs=P("x"),
        axis_names=manual,
    )
    expected = [oracle.norm(shard) for shard in np.split(tree["one"], 4)]
    np.testing.assert_allclose(jax.jit(norms)(tree), expected, 1e-6)


def test_numpy_array_in_an_explicit_mesh_context():
    with jax.set_mesh(oracle.mesh(AxisType.Explicit)):
        assert jax.jit(global_norm)(np.float32([3, 4])) == 5
        assert jax.jit(global_norm)([np.float32([3]), jnp.ones(16)]) == 5


def test_error_policy_in_shard_map():
    def clip(tree):
        return clip_updates(tree, 1.0, nonfinite="error")

    tree = draw(keys=("both", "whole"))
    checked = checkify.checkify(lambda tree: by_shard_map(clip, tree))
    error, (_, norm) = checked(tree)
    error.throw()
    np.testing.assert_allclose(norm, oracle.norm(tree), 1e-6)
    tree["both"][-1, -1] = math.nan
    with pytest.raises(checkify.JaxRuntimeError, match="leaf_norms tells which"):
        checked(tree)[0].throw()
