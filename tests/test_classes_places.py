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

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental.sparse import BCOO, BCSR
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
each_setting = pytest.mark.parametrize("is_set", [False, True], ids=["", "set_mesh"])


def setting(mesh, is_set):
    return jax.set_mesh(mesh) if is_set else contextlib.nullcontext()


# --- vmap, with and without names, of batches sharded in every way.

BATCH = np.linspace(0.1, 2, 8 * 8 * 4, dtype=np.float32).reshape(8, 8, 4)
BATCHES = {"batch": P("x"), "both": P("x", "y"), "entries": P(None, "x", "y")}
# The names of each vmap, and which of them are given.
LEVELS = {
    "one": ("a", ()),
    "one, named": ("a", "a"),
    "two": ("ab", ()),
    "two, outer named": ("ab", "a"),
    "two, inner named": ("ab", "b"),
    "two, both named": ("ab", "ab"),
}


@each_setting
@each_mesh
@pytest.mark.parametrize("spec", BATCHES)
@pytest.mark.parametrize("levels", LEVELS)
def test_vmap_takes_a_norm_for_each_example_or_of_all_by_name(
    levels, spec, types, is_set
):
    mesh, (names, given) = oracle.mesh(*MESHES[types]), LEVELS[levels]
    batch = jax.device_put(BATCH, NamedSharding(mesh, BATCHES[spec]))

    def mapped(function):
        for name in reversed(names):
            function = jax.vmap(function, axis_name=name)
        with setting(mesh, is_set):
            return jax.jit(function)(batch)

    def step(leaf, ord):
        options = {"ord": ord, "axis_name": tuple(given) or None}
        tx = skip_by_global_norm(clip_by_global_norm(2.0, **options), **options)
        clipped, state = tx.update([leaf], tx.init(None))
        return global_norm(clipped, **options), state.global_norm

    if given:
        try:
            mapped(lambda leaf: jax.lax.psum(jnp.sum(leaf), tuple(given)))
        except (AssertionError, ValueError):
            pytest.skip("JAX sums not even scalars over these axes")
    reduced = tuple(i for i in range(3) if i >= len(names) or names[i] in given)
    for ord in (2, 3, math.inf):
        found, norms = mapped(functools.partial(step, ord=ord))
        expected = np.linalg.vector_norm(
            np.float64(BATCH), axis=reduced, ord=ord, keepdims=True
        )
        expected = np.broadcast_to(
            np.squeeze(expected, tuple(range(len(names), 3))), norms.shape
        )
        np.testing.assert_allclose(norms, expected, 1e-6)
        np.testing.assert_allclose(found, np.minimum(expected, 2), 2e-6)


TRANSFORMATIONS = {
    "number": lambda: clip_by_global_norm(1.0),
    "None": lambda: clip_by_global_norm(None, ord=3),
    "schedule": lambda: clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 9)),
    "z-score": lambda: clip_by_global_norm(zscore_threshold(warmup_steps=2)),
    "quantile": lambda: clip_by_global_norm(quantile_threshold(0.5, window=3)),
    "skip, z-score": lambda: skip_by_global_norm(
        optax.chain(clip_by_global_norm(1.0), optax.trace(0.9)), zscore_threshold()
    ),
    "skip, quantile": lambda: skip_by_global_norm(
        optax.trace(0.9), quantile_threshold(0.9, window=3)
    ),
}


@each_mesh
@pytest.mark.parametrize("spec", ["batch", "both"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_vmap_of_three_steps_keeps_a_state_for_each_example(name, spec, types):
    if jax.__version_info__ < (0, 10) and EXPLICIT in MESHES[types]:
        pytest.skip("JAX 0.9 cannot map a selection over an explicit axis")
    mesh, tx = oracle.mesh(*MESHES[types]), TRANSFORMATIONS[name]()
    batch = jax.device_put(BATCH, NamedSharding(mesh, BATCHES[spec]))

    def steps(leaf):
        state = tx.init(leaf)
        for factor in (1.0, 1.1, 8.0):
            updates, state = tx.update(leaf * factor, state, leaf)
        return updates, state

    expected = [jax.jit(steps)(example) for example in BATCH]
    for is_set in (False, True):
        with setting(mesh, is_set):
            found = jax.jit(jax.vmap(steps))(batch)
            if is_set:  # and outside jit, where JAX lets a batch lie on a mesh
                jax.vmap(tx.update)(batch, jax.vmap(tx.init)(batch), batch)
        for i, example in enumerate(expected):
            own = jax.tree.map(lambda x, i=i: np.asarray(x)[i], found)
            chex.assert_trees_all_close(own, example, rtol=2e-6)


@each_setting
@each_mesh
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("format", [BCOO, BCSR])
def test_sparse_matrices_over_axes_have_the_norm_of_the_dense(
    format, unique, types, is_set
):
    mesh = oracle.mesh(*MESHES[types])
    dense = np.zeros((4, 8), np.float32)
    dense[:2] = np.arange(1.0, 17).reshape(2, 8)

    def put(part):
        spec = P("x") if len(part) % 4 == 0 else P()
        return jax.device_put(part, NamedSharding(mesh, spec))

    matrix = jax.tree.map(put, format.fromdense(dense))
    matrix.unique_indices = unique
    with setting(mesh, is_set):
        for ord in (2, 3, math.inf):
            (clipped,), norm = jax.jit(clip_updates, static_argnames="ord")(
                [matrix], 1.0, ord=ord
            )
            expected = np.linalg.vector_norm(np.float64(dense), ord=ord)
            np.testing.assert_allclose(norm, expected, 1e-6)
            np.testing.assert_allclose(clipped.data, matrix.data / expected, 2e-6)


@each_mesh
@pytest.mark.parametrize("size", [3e38, 5e19, 1.0, 2e-22, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_leaves_that_are_constants_over_axes(dtype, size, types):
    """XLA computes with the one number that a captured array, or a sum's slope, is."""
    sharding = NamedSharding(oracle.mesh(*MESHES[types]), P("x"))
    entry = size * np.exp(0.8j) if dtype == "complex64" else size
    captured = jax.device_put(jnp.full(64, entry, dtype), sharding)
    beside = jax.device_put(np.zeros(8, np.float32), sharding)
    norm = 8 * np.abs(np.complex128(captured)[0])
    for leaf in (lambda: captured, lambda: jnp.full(64, entry, dtype)):
        clip = jax.jit(lambda b, leaf=leaf: clip_updates([leaf(), b], 1.0))
        (clipped, _), found = clip(beside)
        # Above the largest float32 it is inf.
        np.testing.assert_allclose(found, math.inf if norm > 3.4e38 else norm, 1e-6)
        scaled = min(size, 0.125) if math.isfinite(size) else math.nan
        np.testing.assert_allclose(np.abs(np.complex64(clipped)), scaled, 4e-3)


@each_mesh
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_states_that_lie_on_no_mesh_are_taken_outside_jit(name, types):
    mesh, tx = oracle.mesh(*MESHES[types]), TRANSFORMATIONS[name]()
    leaf = jax.device_put(BATCH[0], NamedSharding(mesh, P("x")))
    for elsewhere in (np.asarray, lambda x: jnp.asarray(np.asarray(x))):
        state = jax.tree.map(elsewhere, tx.init(leaf))
        for _ in range(2):
            _, state = tx.update(leaf, state, leaf)
        norm = np.linalg.vector_norm(
            np.float64(BATCH[0]), ord=3 if name == "None" else 2
        )
        np.testing.assert_allclose(state.global_norm, norm, 1e-6)


# --- Leaves without entries, and leaves whose sum is pending.


def of_state(tx, tree):
    tree, state = tx.update(tree, tx.init(None))
    return tree, state.global_norm


MEASURES = {
    "norm": lambda tree, ord: (tree, global_norm(tree, ord=ord)),
    "leaves": lambda tree, ord: (tree, leaf_norms(tree, ord=ord)[0]),
    "zero": lambda tree, ord: clip_updates(tree, 1.0, ord=ord, nonfinite="zero"),
    "z-score": lambda tree, ord: of_state(
        clip_by_global_norm(zscore_threshold(), ord=ord), tree
    ),
    "skip": lambda tree, ord: of_state(
        skip_by_global_norm(clip_by_global_norm(1.0, ord=ord), ord=ord), tree
    ),
}
each_measure = pytest.mark.parametrize("measure", MEASURES)
each_ord = pytest.mark.parametrize("ord", [1, 2, 3, math.inf])


@each_setting
@each_mesh
@each_measure
def test_sharded_leaves_without_entries_have_norm_0(measure, types, is_set):
    mesh = oracle.mesh(*MESHES[types])
    leaves = {P(): (0,), P(None, "x"): (0, 8), P("x", None, "y"): (8, 0, 8)}
    run = jax.jit(MEASURES[measure], static_argnums=1)
    for dtype, ord in itertools.product(["bfloat16", "complex64"], [2, 3, math.inf]):
        tree = [
            jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, spec))
            for spec, shape in leaves.items()
        ]
        with setting(mesh, is_set):
            for part in (tree, tree[1:2]):
                found, norm = run(part, ord)
                assert norm == 0
                # JAX 0.9 itself cannot return these where all axes are explicit.
                same = jax.jit(lambda x: x)(part) if oracle.RECENT_JAX else found
                assert list(map(jax.typeof, found)) == list(map(jax.typeof, same))


X, Y = np.float32([[1.0, 2], [3, 4], [5, 6], [7, 8]]), np.full((4, 2), 0.5, np.float32)
OTHER = np.ones(3, np.float32)


def on_explicit_mesh(measure, is_set=False):
    mesh = oracle.mesh(EXPLICIT)
    of = functools.partial(NamedSharding, mesh)

    def step(x, y):
        product = jnp.einsum("ni,nj->ij", x, y, out_sharding=of(P(unreduced={"x"})))
        (found, other), norm = measure([product, OTHER])
        return [jax.sharding.reshard(found, of(P())), other], norm

    def run(*arrays):
        with setting(mesh, is_set):
            return jax.jit(step)(*(jax.device_put(x, of(P("x"))) for x in arrays))

    return run


def in_shard_map(measure):
    def step(x, y):
        product = jax.lax.pcast(jnp.einsum("ni,nj->ij", x, y), "x", to="unreduced")
        (found, other), norm = measure([product, OTHER])
        return [jax.lax.psum(found, "x"), other], norm

    specs = {"in_specs": P("x"), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=oracle.mesh(), **specs))


PENDING = {
    "explicit": on_explicit_mesh,
    "explicit, set_mesh": functools.partial(on_explicit_mesh, is_set=True),
    "shard_map": in_shard_map,
}


@pytest.mark.skipif(
    not oracle.RECENT_JAX, reason="JAX could not select among unreduced arrays"
)
@each_ord
@each_measure
@pytest.mark.parametrize("place", PENDING)
def test_leaves_whose_sum_is_pending_count_as_summed(place, measure, ord):
    run = PENDING[place](functools.partial(MEASURES[measure], ord=ord))
    for bad in (0.0, math.nan, math.inf):
        y = Y.copy()
        y[0, 0] += bad
        found, norm = run(X, y)
        with np.errstate(invalid="ignore"):
            whole = [X.T @ y, OTHER]
        if bad == 0:
            counted = whole[:1] if measure == "leaves" else whole
            np.testing.assert_allclose(norm, oracle.norm(counted, ord), 2e-6)
            limit = 1.0 if measure in ("zero", "skip") else math.inf
            oracle.assert_clipped(found, whole, limit, ord)
        else:
            np.testing.assert_equal(np.asarray(norm), bad)
            if measure in ("zero", "skip"):
                assert not any(map(np.any, found))
            if measure == "z-score":
                assert all(np.isnan(leaf).all() for leaf in found)


# --- A skip around states that lie otherwise than the gradients, as restored.

LAID_OUT = {  # Gradients, moments.
    "replicated": (P("x"), P()),
    "split further": (P("x"), P("x", "y")),
    "split less": (P("x", "y"), P("x")),
    "gradients replicated": (P(), P("x")),
}
INNER = {
    "adam": lambda: optax.adam(0.1),
    "clip and sgd": lambda: optax.chain(
        clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
}


@each_mesh
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("case", LAID_OUT)
@pytest.mark.usefixtures("optax_promotes")
def test_skip_takes_states_laid_out_otherwise(case, inner, types):
    mesh, bare = oracle.mesh(*MESHES[types]), INNER[inner]()
    of_grads, of_moments = (NamedSharding(mesh, spec) for spec in LAID_OUT[case])
    grads = jax.device_put(
        [np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)], of_grads
    )
    tx = skip_by_global_norm(bare, 1e3)
    state = tx.init(grads)
    expected = jax.tree.map(
        lambda x: jax.device_put(x, of_moments) if x.ndim else x, state.inner_state
    )
    state = state._replace(inner_state=expected)
    for scale in (1.0, math.nan, 0.5):
        scaled = [grads[0] * np.float32(scale)]
        found, state = jax.jit(tx.update)(scaled, state, grads)
        if scale == scale:
            right, expected = jax.jit(bare.update)(scaled, expected, grads)
            np.testing.assert_allclose(found[0], right[0], 1e-6)
        else:
            assert not np.any(found[0])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
        jax.tree.map(close, state.inner_state, expected)
    assert state.num_skipped == 1


@each_mesh
@each_ord
def test_no_more_reductions_over_devices_than_in_optax(types, ord):
    mesh = oracle.mesh(*MESHES[types])
    specs = [NamedSharding(mesh, s) for s in (P("x"), P("x", "y"), P("y"))] * 4
    tree = [jax.device_put(np.ones((8, 8), np.float32), spec) for spec in specs]

    def reductions(tx):
        compiled = jax.jit(lambda tree: tx.update(tree, tx.init(None))[0])
        return compiled.lower(tree).compile().as_text().count(" all-reduce(")

    ours = reductions(clip_by_global_norm(1.0, ord=ord))
    # Orders but 2 and inf ask for the largest entry first.
    several = 1 if ord in (2, math.inf) else 2
    assert ours <= several * reductions(optax.clip_by_global_norm(1.0))


# --- States lie where the parameters lie.


def on(types, spec, devices=None):
    shape, names = (
        ((2, 2), ("x", "y")) if devices is None else ((len(devices),), ("x",))
    )
    devices = jax.devices()[:4] if devices is None else devices
    types = (types * 2)[: len(names)]
    return NamedSharding(jax.make_mesh(shape, names, types, devices=devices), spec)


PLACES = {
    "default": lambda: None,
    "another device": lambda: jax.devices()[3],
    "its sharding": lambda: jax.sharding.SingleDeviceSharding(jax.devices()[5]),
    "auto": lambda: on((AUTO,), P("x")),
    "explicit": lambda: on((EXPLICIT,), P(None, "y")),
    "mixed": lambda: on((AUTO, EXPLICIT), P("x")),
    "other devices": lambda: on((AUTO,), P("x"), jax.devices()[4:]),
    "other devices, explicit": lambda: on((EXPLICIT,), P(), jax.devices()[4:]),
    "one device of a mesh": lambda: on((EXPLICIT,), P("x"), jax.devices()[6:7]),
}
SETTINGS = [(place, False) for place in PLACES]
SETTINGS += [(place, True) for place in ("auto", "explicit", "mixed")]


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize(("place", "is_set"), SETTINGS)
@pytest.mark.usefixtures("optax_promotes")
def test_states_lie_where_the_parameters_lie(place, is_set, name):
    params, tx = {"w": jnp.ones((4, 4)), "b": jnp.ones((4, 2))}, TRANSFORMATIONS[name]()
    if where := PLACES[place]():
        params = jax.device_put(params, where)

    def type_of(leaf):
        return str(jax.typeof(leaf)), leaf.sharding, leaf.weak_type

    def own(state):
        return (
            state._replace(inner_state=None)
            if "inner_state" in state._fields
            else state
        )

    def update(grads, state):
        return tx.update(grads, state, grads)

    with setting(getattr(where, "mesh", None), is_set):
        first, state = tx.init(params), tx.init(params)
        for leaf in jax.tree.leaves(own(state)):
            assert leaf.sharding.device_set == params["w"].sharding.device_set
        # Ahead of time too: such a program takes no other placement.
        step = jax.jit(update).lower(params, first).compile()
        with oracle.compilations() as compiled, jax.transfer_guard("disallow"):
            traced = jax.jit(lambda grads, state: update(grads, state))
            for _ in range(3):
                _, first = step(params, first)
                _, state = traced(params, state)
        assert len(compiled) == 1
        ours = [own(each) for each in (first, state, tx.init(params))]
        types = [jax.tree.map(type_of, each) for each in ours]
        assert types[0] == types[1] == types[2]


PROCESS = """
import sys
import jax, numpy as np
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
