"""One norm and one clip, however the leaves lie on the devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import example, given, strategies as st
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
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
    "one": (16, 5),
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
FEW = ("both", "one", "whole")


def part_of(axis, keys):
    """What of each spec concerns one axis."""

    def own(entry):
        return axis if axis == entry or axis in (entry or ()) else None

    return {key: P(*map(own, SPECS[key])) for key in keys}


def laid_out(tree, mesh):
    return jax.device_put(tree, {key: NamedSharding(mesh, SPECS[key]) for key in tree})


# Each takes a function of a tree and of axis_name to a like tree and scalars, and the
# keys of the tree, to what applies it to a tree of NumPy arrays.


def by_jit(function, keys, *axis_types):
    mesh, jitted = oracle.mesh(*axis_types), jax.jit(function)
    return lambda tree: jitted(laid_out(tree, mesh))


def by_shard_map(function, keys, **options):
    specs = {key: SPECS[key] for key in keys}
    specs = {"in_specs": (specs,), "out_specs": (specs, P())}
    return jax.jit(jax.shard_map(function, mesh=oracle.mesh(), **specs, **options))


def by_unchecked_shard_map(function, keys):
    names = {key: NAMES[key] for key in keys}
    named = functools.partial(function, axis_name=names)
    return by_shard_map(named, keys, check_vma=False)


def by_partly_manual_shard_map(function, keys, manual="x", other=AxisType.Auto):
    types = {"x": other, "y": other, manual: AxisType.Auto}
    mesh, specs = oracle.mesh(*types.values()), part_of(manual, keys)
    specs = {"in_specs": (specs,), "out_specs": (specs, P())}
    mapped = jax.jit(jax.shard_map(function, mesh=mesh, axis_names={manual}, **specs))
    return lambda tree: mapped(laid_out(tree, mesh))


def by_nested_shard_maps(function, keys):
    for axis, options in [("y", {}), ("x", {"mesh": oracle.mesh()})]:
        specs = part_of(axis, keys)
        specs = {"in_specs": (specs,), "out_specs": (specs, P())}
        function = jax.shard_map(function, axis_names={axis}, **specs, **options)
    return jax.jit(function)


def by_pmap(function, keys):
    """Of all but the whole leaf, each device holds an eighth."""
    axes = {key: None if key == "whole" else 0 for key in keys}
    names = {key: () if key == "whole" else "data" for key in keys}
    mapped = jax.pmap(
        functools.partial(function, axis_name=names),
        axis_name="data",
        in_axes=(axes,),
        out_axes=(axes, None),
    )

    def apply(tree):
        shards = {k: x if k == "whole" else x.reshape(8, -1) for k, x in tree.items()}
        clipped, scalars = mapped(shards)
        return {k: x.reshape(tree[k].shape) for k, x in clipped.items()}, scalars

    return apply


EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
partly = by_partly_manual_shard_map
LAYOUTS = {
    "auto": by_jit,
    "explicit": lambda *args: by_jit(*args, EXPLICIT),
    "auto and explicit": lambda *args: by_jit(*args, AUTO, EXPLICIT),
    "shard_map": by_shard_map,
    "unchecked": by_unchecked_shard_map,
    "y auto": partly,
    "x auto": functools.partial(partly, manual="y"),
    "y explicit": functools.partial(partly, other=EXPLICIT),
    "nested": by_nested_shard_maps,
    "pmap": by_pmap,
}
# Without types JAX cannot tell how to differentiate a sum over devices inside, and
# one ``shard_map`` in another it cannot differentiate from outside (0.10.2).
CHECKED = [name for name in LAYOUTS if name not in ("unchecked", "pmap")]
DIFFERENTIABLE = [name for name in LAYOUTS if name != "nested"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def draw(dtype="float32", keys=tuple(SHAPES)):
    tree = oracle.normals({key: SHAPES[key] for key in keys}, dtype)
    return jax.tree.map(np.array, tree)


# --- The features, on each layout.


def types(tree):
    return jax.tree.map(jax.typeof, tree)


CASES = [
    (2, "nan", "float32"),
    (2, "zero", "bfloat16"),
    (2, "nan", "float16"),
    (2, "zero", "complex64"),
    (2, "nan", "float64"),
    (1, "nan", "float32"),
    (3.5, "zero", "float32"),
    (math.inf, "nan", "float32"),
    (math.inf, "zero", "bfloat16"),
]


@every_layout
@pytest.mark.parametrize(("ord", "nonfinite", "dtype"), CASES)
def test_norm_and_updates(layout, ord, nonfinite, dtype):
    """Of shards of any magnitudes, and with one entry of one device that is bad."""

    def clip(tree, axis_name=None):
        options = {"ord": ord, "axis_name": axis_name}
        clipped, norm = clip_updates(tree, 1.0, nonfinite=nonfinite, **options)
        assert types(clipped) == types(tree)
        return clipped, (norm, leaf_norms(tree, **options))

    apply, info = LAYOUTS[layout](clip, SHAPES), jnp.finfo(dtype)
    limit, tolerance = float(info.max), 1e-14 if info.bits == 64 else 2e-6

    @given(st.lists(st.integers(-60, 127), min_size=16, max_size=16))
    @example([0] * 16)
    @example([127] + [-60] * 15)
    @example([-60] * 16)
    @example([-75] * 16)
    @example([100] * 16)
    def check(exponents):
        def moved(leaf):
            """Rows of other magnitudes, and so shards of other magnitudes."""
            powers = np.multiply(exponents, 8 if info.bits == 64 else 1)
            powers = powers.clip(int(info.minexp) + 24, int(info.maxexp))
            powers = np.resize(powers, len(leaf))[:, None]
            parts = [np.ldexp(np.float64(x), powers) for x in (leaf.real, leaf.imag)]
            parts = [x.clip(-limit, limit) for x in parts]
            wide = parts[0] + 1j * parts[1] if np.iscomplexobj(leaf) else parts[0]
            return wide.astype(leaf.dtype)

        tree = jax.tree.map(moved, normal)
        clipped, (norm, each) = apply(tree)
        oracle.assert_norm(norm, tree, ord, tolerance, on_one_cpu=False)
        for key, leaf in tree.items():
            oracle.assert_norm(each[key], leaf, ord, tolerance, on_one_cpu=False)
        oracle.assert_clipped(clipped, tree, 1.0, ord, 2 * tolerance)
        if norm < 0.9:
            for key, leaf in tree.items():
                np.testing.assert_array_equal(clipped[key], leaf)

    with jax.enable_x64(dtype == "float64"):
        normal = draw(dtype)
        check()
        for key, bad in [("both", math.nan), ("whole", math.inf), ("large", math.nan)]:
            tree = normal | {key: normal[key].copy()}
            tree[key][-1, -1] = bad
            clipped, (norm, each) = apply(tree)
            np.testing.assert_equal(float(norm), bad)
            assert [key] == [k for k, norm in each.items() if not math.isfinite(norm)]
            for leaf in map(np.asarray, clipped.values()):
                assert np.isnan(leaf).all() if nonfinite == "nan" else not leaf.any()


@every_layout
@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_skip_with_adaptive_thresholds(layout, ord):
    """A spike and a NaN are skipped, and the norm of the clip inside is the same."""
    tree = draw(keys=FEW)
    norm = oracle.norm(tree, ord)
    scales = np.float32([1, 1.1, 0.9, 100, np.nan, 1.05])

    def train(tree, axis_name=None):
        options = {"ord": ord, "axis_name": axis_name}
        quantile = quantile_threshold(0.5, window=4, warmup_steps=3)
        clip = clip_by_global_norm(quantile, **options)
        zscore = zscore_threshold(6.0, warmup_steps=3)
        tx = skip_by_global_norm(clip, zscore, **options)

        def step(state, scale):
            # One entry of one device is NaN, where the scale is.
            updates = jax.tree.map(lambda leaf: leaf * jnp.nan_to_num(scale), tree)
            bad = jnp.where(updates["both"] == updates["both"].max(), scale, 1)
            updates["both"] = updates["both"] * jnp.where(jnp.isnan(scale), bad, 1)
            updates, state = tx.update(updates, state)
            return state, state.threshold

        state, thresholds = jax.lax.scan(step, tx.init(tree), scales[:-1])
        updates = jax.tree.map(lambda leaf: leaf * scales[-1], tree)
        updates, state = tx.update(updates, state)
        return updates, (state, thresholds)

    updates, (state, thresholds) = LAYOUTS[layout](train, FEW)(tree)
    assert (state.num_updates, state.num_skipped) == (6, 2)
    assert state.inner_state.num_updates == 4
    np.testing.assert_allclose(state.inner_state.threshold, 1.025 * norm, 1e-5)
    np.testing.assert_allclose(oracle.norm(updates, ord), 1.025 * norm, 1e-5)
    # Mean 1 and standard deviation of 1, 1.1 and 0.9; at the spike, pulled to the mean.
    margin = 6 * np.std([1, 1.1, 0.9])
    expected = [np.inf] * 3 + [(1 + margin**2 / 99) * norm]
    np.testing.assert_allclose(thresholds[:4], expected, 1e-5)


def slopes(tree, ord):
    flat = oracle.slope(np.concatenate([x.ravel() for x in tree.values()]), ord)
    ends = np.cumsum([x.size for x in tree.values()])[:-1]
    parts = np.split(flat.astype(np.float64), ends)
    return {k: part.reshape(tree[k].shape) for k, part in zip(tree, parts, strict=True)}


@pytest.mark.parametrize("layout", DIFFERENTIABLE)
@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_gradient_through_the_clip(layout, ord):
    tree = draw(keys=FEW)
    weights = jax.tree.map(np.asarray, oracle.normals(SHAPES, seed=1))
    norm = oracle.norm(tree, ord)

    def clip(tree, axis_name=None):
        return clip_updates(tree, norm / 3, ord=ord, axis_name=axis_name)

    apply = LAYOUTS[layout](clip, FEW)

    def loss(tree):
        return sum(jnp.sum(weights[key] * x) for key, x in apply(tree)[0].items())

    found = jax.jit(jax.grad(loss))(tree)
    along = sum(np.vdot(weights[key], leaf.astype(float)) for key, leaf in tree.items())
    for key, slope_of_norm in slopes(tree, ord).items():
        expected = (weights[key] - along / norm * slope_of_norm) / 3
        np.testing.assert_allclose(found[key], expected, 1e-4, 1e-6)


@pytest.mark.parametrize("layout", CHECKED)
@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_gradient_of_the_norm_inside(layout, ord):
    def gradient(tree):
        return jax.grad(functools.partial(global_norm, ord=ord))(tree), ()

    tree = draw(keys=FEW)
    found, _ = LAYOUTS[layout](gradient, FEW)(tree)
    for key, expected in slopes(tree, ord).items():
        np.testing.assert_allclose(found[key], expected, 1e-4, 1e-7)


# --- Types: what comes in comes out, and the state stays as it began.


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jit_keeps_types_and_shardings_and_compiles_once(axis_type, dtype):
    tree = laid_out(draw(dtype), oracle.mesh(axis_type))
    tx = clip_by_global_norm(zscore_threshold(warmup_steps=1))
    state = tx.init(tree)
    update = jax.jit(tx.update)
    with oracle.compilations() as compiled:
        updates, new_state = update(tree, state)
        assert types((updates, new_state)) == types((tree, state))
        update(updates, new_state)
    assert len(compiled) == 1
    for key, leaf in tree.items():
        assert updates[key].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def test_error_policy_in_shard_map():
    def clip(tree):
        return clip_updates(tree, 1.0, nonfinite="error")

    tree = draw(keys=("both", "whole"))
    checked = checkify.checkify(by_shard_map(clip, tree))
    error, (_, norm) = checked(tree)
    error.throw()
    np.testing.assert_allclose(norm, oracle.norm(tree), 1e-6)
    tree["both"][-1, -1] = math.nan
    with pytest.raises(checkify.JaxRuntimeError, match="leaf_norms tells which"):
        checked(tree)[0].throw()


# --- Steps as users write them, on many devices, beside the step on one.


def network(params, x):
    hidden = jnp.tanh(x @ params["up"] + params["bias"][None])
    return hidden @ params["down"]


def mean_square(params, x, y):
    return jnp.mean((network(params, x) - y) ** 2)


PARAMS = oracle.normals({"up": (8, 16), "bias": (16,), "down": (16, 4)})
PARAMS = jax.tree.map(np.array, PARAMS)
X, Y = (np.array(leaf) for leaf in oracle.normals([(32, 8), (32, 4)], seed=1))
TX = optax.chain(clip_by_global_norm(0.1), optax.sgd(0.5, momentum=0.9))


def step(params, opt_state, x, y, loss=mean_square):
    grads = jax.grad(loss)(params, x, y)
    updates, opt_state = TX.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


def train(step):
    params, opt_state, norms = PARAMS, TX.init(PARAMS), []
    for _ in range(4):
        params, opt_state = step(params, opt_state, X, Y)
        norms.append(optax.tree.get(opt_state, "global_norm"))
    return params, norms


def assert_trained_alike(params, norms):
    expected_params, expected_norms = train(jax.jit(step))
    assert min(expected_norms) > 0.1  # So that every step is clipped.
    np.testing.assert_allclose(norms, expected_norms, 1e-5)
    for key, leaf in expected_params.items():
        np.testing.assert_allclose(params[key], leaf, 1e-5, 1e-6)


def gathered(params, *args):
    return jax.tree.map(lambda x: jax.lax.all_gather(x, *args, tiled=True), params)


def tensor_parallel(params, x, y):
    parts = jax.lax.psum(network(params, x), "y")
    return jax.lax.pmean(jnp.mean((parts - y) ** 2), "x")


STEPS = {
    "data parallel": (
        dict.fromkeys(PARAMS, P()),
        lambda p, x, y: jax.lax.pmean(mean_square(p, x, y), "x"),
    ),
    "fully sharded": (
        dict.fromkeys(PARAMS, P(("x", "y"))),
        lambda p, x, y: jax.lax.pmean(
            mean_square(gathered(p, ("x", "y")), x, y), ("x", "y")
        ),
    ),
    "tensor parallel": (
        {"up": P(None, "y"), "bias": P("y"), "down": P("y", None)},
        tensor_parallel,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_step_in_shard_map_is_that_of_one_device(case):
    """The same lines of code, whatever the shards: the types say what they are."""
    specs, loss = STEPS[case]
    opt_state = TX.init(PARAMS)
    state_specs = optax.tree.map_params(
        TX, lambda _, spec: spec, opt_state, specs, transform_non_params=lambda _: P()
    )
    mapped = jax.shard_map(
        functools.partial(step, loss=loss),
        mesh=oracle.mesh(),
        in_specs=(specs, state_specs, P("x"), P("x")),
        out_specs=(specs, state_specs),
    )
    assert_trained_alike(*train(jax.jit(mapped)))
