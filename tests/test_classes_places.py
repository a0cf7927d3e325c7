"""Classes of places: axes, layouts, devices and processes that leaves may lie on."""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
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

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "auto": (AUTO, AUTO),
    "explicit": (EXPLICIT, EXPLICIT),
    "x explicit": (EXPLICIT, AUTO),
    "y explicit": (AUTO, EXPLICIT),
}
each_mesh = pytest.mark.parametrize("types", MESHES)


def setting(mesh, is_set):
    return jax.set_mesh(mesh) if is_set else contextlib.nullcontext()


each_setting = pytest.mark.parametrize("is_set", [False, True], ids=["", "set_mesh"])

# --- vmap, with and without a name, of batches sharded in every way.


def clipped_norm(tree, **options):
    clipped, norm = clip_updates(tree, 2.0, **options)
    return global_norm(clipped, **options), norm


def stepped_norm(tree, **options):
    tx = skip_by_global_norm(clip_by_global_norm(2.0, **options), **options)
    clipped, state = tx.update(tree, tx.init(tree))
    return global_norm(clipped, **options), state.global_norm


BATCH = np.linspace(0.1, 2, 8 * 8 * 4, dtype=np.float32).reshape(8, 8, 4)
BATCHES = {
    "batch": P("x"),
    "both": P("x", "y"),
    "entries": P(None, "x", "y"),
    "batch over two": P(("x", "y")),
    "whole": P(),
}


@each_setting
@each_mesh
@pytest.mark.parametrize("spec", BATCHES)
@pytest.mark.parametrize("measure", [clipped_norm, stepped_norm])
def test_vmap_takes_a_norm_for_each_example_or_of_all_by_name(
    measure, spec, types, is_set
):
    mesh = oracle.mesh(*MESHES[types])
    tree = {"w": jax.device_put(BATCH, NamedSharding(mesh, BATCHES[spec]))}
    for ord, name in itertools.product([2, 3, math.inf], [None, "batch"]):

        def mapped(tree, ord=ord, name=name):
            one = lambda tree: measure(tree, ord=ord, axis_name=name)  # noqa: E731
            return jax.vmap(one, axis_name="batch")(tree)

        with setting(mesh, is_set):
            found, norms = jax.jit(mapped)(tree)
        whole = [oracle.norm(BATCH, ord)] * 8
        expected = whole if name else [oracle.norm(x, ord) for x in BATCH]
        np.testing.assert_allclose(norms, expected, 1e-6)
        np.testing.assert_allclose(found, np.minimum(expected, 2), 2e-6)


@each_setting
@each_mesh
@pytest.mark.parametrize("names", [(None, None), ("outer", None), ("outer", "inner")])
def test_vmap_of_vmap(names, types, is_set):
    mesh = oracle.mesh(*MESHES[types])
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("x", "y")))
    given = tuple(filter(None, names)) or None

    def one(leaf):
        return clipped_norm([leaf], axis_name=given)

    def of_all(one):
        mapped = jax.vmap(jax.vmap(one, axis_name="inner"), axis_name="outer")
        with setting(mesh, is_set):
            return jax.jit(mapped)(batch)

    if given:
        try:
            of_all(lambda leaf: jax.lax.psum(jnp.sum(leaf), given))
        except AssertionError:
            pytest.skip("JAX sums no scalars over this axis")
    found, norms = of_all(one)
    reduced = tuple(i for i in range(3) if i == 2 or names[i])
    expected = np.sqrt(np.sum(np.square(BATCH, dtype=float), reduced, keepdims=True))
    expected = np.broadcast_to(expected[..., 0], (8, 8))
    np.testing.assert_allclose(norms, expected, 1e-6)
    np.testing.assert_allclose(found, np.minimum(expected, 2), 2e-6)


# --- Leaves without entries, and leaves whose sum is pending.

MEASURES = {
    "norm": lambda tree, ord: (tree, global_norm(tree, ord=ord)),
    "leaves": lambda tree, ord: (
        tree,
        jax.tree.reduce(jnp.maximum, leaf_norms(tree, ord=ord)),
    ),
    "clip": lambda tree, ord: clip_updates(tree, 1.0, ord=ord),
    "zero": lambda tree, ord: clip_updates(tree, 1.0, ord=ord, nonfinite="zero"),
    "transformation": lambda tree, ord: of_state(
        clip_by_global_norm(1.0, ord=ord), tree
    ),
    "z-score": lambda tree, ord: of_state(
        clip_by_global_norm(zscore_threshold(), ord=ord), tree
    ),
    "skip": lambda tree, ord: of_state(
        skip_by_global_norm(optax.identity(), ord=ord), tree
    ),
    "skip a clip": lambda tree, ord: of_state(
        skip_by_global_norm(clip_by_global_norm(1.0, ord=ord), ord=ord), tree
    ),
}


def of_state(tx, tree):
    tree, state = tx.update(tree, tx.init(None))
    return tree, state.global_norm


@each_setting
@each_mesh
@pytest.mark.parametrize("measure", MEASURES)
def test_sharded_leaves_without_entries_have_norm_0(measure, types, is_set):
    mesh = oracle.mesh(*MESHES[types])
    for dtype, ord in itertools.product(
        ["float32", "bfloat16", "complex64"], [2, 3, math.inf]
    ):
        empty = {
            name: jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, spec))
            for name, shape, spec in [
                ("none", (0,), P()),
                ("rows", (0, 8), P(None, "x")),
                ("columns", (8, 0), P("y")),
                ("both", (8, 0, 8), P("x", None, "y")),
            ]
        }
        for tree in ({"rows": empty["rows"]}, empty):
            with setting(mesh, is_set):
                found, norm = jax.jit(MEASURES[measure], static_argnums=1)(tree, ord)
            assert norm == 0
            assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, tree)


pending = pytest.mark.skipif(
    not oracle.RECENT_JAX, reason="JAX could not select among unreduced arrays"
)
X, Y = np.float32([[1.0, 2], [3, 4], [5, 6], [7, 8]]), np.full((4, 2), 0.5, np.float32)


@pending
@each_setting
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("measure", MEASURES)
def test_leaves_whose_sum_is_pending_on_an_explicit_mesh(measure, ord, bad, is_set):
    mesh = oracle.mesh(EXPLICIT)
    of = functools.partial(NamedSharding, mesh)
    y = Y + np.float32([[bad, 0]] + [[0, 0]] * 3)
    x, y = (jax.device_put(a, NamedSharding(mesh, P("x"))) for a in (X, y))

    def step(x, y):
        leaf = jnp.einsum("ni,nj->ij", x, y, out_sharding=of(P(unreduced={"x"})))
        (found, whole), norm = MEASURES[measure]([leaf, jnp.ones(3)], ord)
        return jax.sharding.reshard(found, of(P())), whole, norm

    with setting(mesh, is_set):
        *found, norm = jax.jit(step)(x, y)
    assert_as_if_reduced(measure, found, norm, ord, bad)


@pending
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("measure", MEASURES)
def test_leaves_whose_sum_is_pending_in_shard_map(measure, ord, bad):
    def step(x, y):
        leaf = jax.lax.pcast(jnp.einsum("ni,nj->ij", x, y), "x", to="unreduced")
        (found, whole), norm = MEASURES[measure]([leaf, jnp.ones(3)], ord)
        return jax.lax.psum(found, "x"), whole, norm

    y = Y + np.float32([[bad, 0]] + [[0, 0]] * 3)
    mapped = jax.shard_map(step, mesh=oracle.mesh(), in_specs=P("x"), out_specs=P())
    *found, norm = jax.jit(mapped)(X, y)
    assert_as_if_reduced(measure, found, norm, ord, bad)


def assert_as_if_reduced(measure, found, norm, ord, bad):
    whole = [X.T @ Y + np.float32([[bad, 0]] * 2), np.ones(3, np.float32)]
    if measure == "leaves":
        whole, found = whole[:1], found[:1]
    finite = math.isfinite(bad)
    np.testing.assert_allclose(
        norm, oracle.norm(whole, ord) if finite else abs(norm), 2e-6
    )
    assert bool(np.isfinite(norm)) == finite
    if not finite and measure not in ("norm", "leaves"):
        right = 0 if measure in ("zero", "skip", "skip a clip") else math.nan
        assert all(
            (leaf == right if right == 0 else np.isnan(leaf)).all() for leaf in found
        )
    elif finite and measure in ("clip", "zero", "transformation", "skip a clip"):
        oracle.assert_clipped(found, whole, 1.0, ord)


# --- A skip around states that lie otherwise than the gradients.

LAID_OUT = {
    "replicated": (P("x"), P(), P("x")),
    "moments split further": (P("x"), P("x", "y"), P("x")),
    "moments split less": (P("x", "y"), P("x"), P("x", "y")),
    "gradients replicated": (P(), P("x"), P("x")),
}
INNER = {
    "adam": lambda: optax.adam(0.1),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "clip and adamw": lambda: optax.chain(clip_by_global_norm(1.0), optax.adamw(0.1)),
    "multi": lambda: optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2),
}


@each_mesh
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("case", LAID_OUT)
@pytest.mark.usefixtures("optax_promotes")
def test_skip_takes_states_laid_out_otherwise(case, inner, types):
    """As a checkpoint restores them: the bare optimizer takes them as well."""
    mesh, bare = oracle.mesh(*MESHES[types]), INNER[inner]()
    of_grads, of_state, of_params = (NamedSharding(mesh, s) for s in LAID_OUT[case])
    leaf = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    grads, params = (jax.device_put([leaf], each) for each in (of_grads, of_params))

    def restored(state):
        moments = lambda x: jax.device_put(x, of_state) if x.ndim else x  # noqa: E731
        return jax.tree.map(moments, state)

    tx = skip_by_global_norm(bare, 1e3)
    expected = restored(bare.init(params))
    state = tx.init(params)
    state = state._replace(inner_state=restored(state.inner_state))
    for scale in (1.0, math.nan, 0.5):
        scaled = jax.tree.map(lambda g, s=scale: g * np.float32(s), grads)
        found, state = jax.jit(tx.update)(scaled, state, params)
        if scale == scale:
            right, expected = jax.jit(bare.update)(scaled, expected, params)
            jax.tree.map(
                lambda f, r: np.testing.assert_allclose(f, r, 1e-6), found, right
            )
        else:
            assert not np.any(found[0])
        jax.tree.map(
            lambda f, r: np.testing.assert_allclose(f, r, 1e-6, 1e-9),
            state.inner_state,
            expected,
        )
    assert state.num_skipped == 1


@each_mesh
@pytest.mark.parametrize("ord", [1, 2, 3])
def test_no_more_reductions_over_devices_than_in_optax(types, ord):
    mesh = oracle.mesh(*MESHES[types])
    tree = [
        jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, spec))
        for spec in (P("x"), P("x", "y"), P("y")) * 4
    ]

    def reductions(update):
        text = jax.jit(update).lower(tree).compile().as_text()
        return text.count(" all-reduce(") + text.count(" all-reduce-start(")

    theirs = reductions(
        lambda tree: optax.clip_by_global_norm(1.0).update(tree, None)[0]
    )
    ours = reductions(
        lambda tree: clip_by_global_norm(1.0, ord=ord).update(tree, None)[0]
    )
    assert ours <= theirs * (1 if ord == 2 else 2)  # Other orders ask for the largest.


# --- States lie where the parameters lie.

TRANSFORMATIONS = {
    "number": lambda: clip_by_global_norm(1.0),
    "None": lambda: clip_by_global_norm(None, ord=3),
    "schedule": lambda: clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 9)),
    "z-score": lambda: clip_by_global_norm(zscore_threshold(warmup_steps=2)),
    "quantile": lambda: clip_by_global_norm(quantile_threshold(0.5, window=3)),
    "skip": lambda: skip_by_global_norm(optax.adam(0.1), 9.0),
    "skip, z-score": lambda: skip_by_global_norm(
        optax.chain(clip_by_global_norm(1.0), optax.adam(0.1)), zscore_threshold()
    ),
    "skip, quantile": lambda: skip_by_global_norm(
        optax.trace(0.9), quantile_threshold(0.9, window=3)
    ),
}
each_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def half_mesh(type_):
    return jax.make_mesh((4,), ("x",), (type_,), devices=jax.devices()[4:])


PLACES = {
    "default": lambda: None,
    "another device": lambda: jax.devices()[3],
    "its sharding": lambda: jax.sharding.SingleDeviceSharding(jax.devices()[5]),
    "auto": lambda: NamedSharding(oracle.mesh(AUTO), P("x")),
    "explicit": lambda: NamedSharding(oracle.mesh(EXPLICIT), P(None, "y")),
    "mixed": lambda: NamedSharding(oracle.mesh(AUTO, EXPLICIT), P("x")),
    "other devices": lambda: NamedSharding(half_mesh(AUTO), P("x")),
    "other devices, explicit": lambda: NamedSharding(half_mesh(EXPLICIT), P()),
    "one device of a mesh": lambda: NamedSharding(
        jax.make_mesh((1,), ("x",), (EXPLICIT,), devices=jax.devices()[6:7]), P("x")
    ),
}


@each_transformation
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.usefixtures("optax_promotes")
def test_states_lie_where_the_parameters_lie(place, name):
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones((4, 2))}
    if where := PLACES[place]():
        params = jax.device_put(params, where)
    tx = TRANSFORMATIONS[name]()
    state = tx.init(params)
    first = jax.tree.map(type_of, state)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.device_set == params["w"].sharding.device_set

    # Ahead of time too: such a program takes no other placement.
    step = jax.jit(
        lambda grads, state: tx.update(grads, state, grads), donate_argnums=1
    )
    step = step.lower(params, state).compile()
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            _, state = step(params, state)
    assert jax.tree.map(type_of, state) == first

    traced = jax.jit(lambda grads, state: tx.update(grads, state, grads))
    state = tx.init(params)
    with oracle.compilations() as compiled, jax.transfer_guard("disallow"):
        for _ in range(3):
            _, state = traced(params, state)
    assert len(compiled) == 1


def type_of(leaf):
    return str(jax.typeof(leaf)), leaf.sharding, leaf.weak_type


@each_transformation
@each_mesh
@each_setting
@pytest.mark.usefixtures("optax_promotes")
def test_types_of_states_stay_on_a_mesh(name, types, is_set):
    mesh, tx = oracle.mesh(*MESHES[types]), TRANSFORMATIONS[name]()
    sharding = NamedSharding(mesh, P("x"))
    grads = jax.device_put({"w": np.ones((4, 4), np.float32)}, sharding)
    with setting(mesh, is_set):
        for init, update in (
            (tx.init, jax.jit(tx.update)),
            (jax.jit(tx.init), tx.update),
        ):
            state = init(grads)
            _, new = update(grads, state, grads)
            specs = [
                [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]
                for tree in (state, new)
            ]
            assert specs[0] == specs[1]


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, "tests")
from test_classes_places import TRANSFORMATIONS
for type_ in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(type_,))
    make = lambda index: np.ones(8, np.float32)[index]
    params = jax.make_array_from_callback((8,), NamedSharding(mesh, P("x")), make)
    with jax.set_mesh(mesh):
        for name, transformation in TRANSFORMATIONS.items():
            tx = transformation()
            state, step = tx.init(params), jax.jit(tx.update)
            for _ in range(2):
                _, state = step(params, state, params)
            right = 2 if "None" in name else 8**0.5
            np.testing.assert_allclose(state.global_norm, right, 1e-6)
            print(type_, name, flush=True)
"""


@pytest.mark.slow
def test_two_processes_begin_eagerly_under_a_mesh():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(process)],
            cwd=pathlib.Path(__file__).parent.parent,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs[0][-3000:]
