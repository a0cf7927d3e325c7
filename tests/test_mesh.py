"""Mesh axes: names where leaves have no types, maps around maps, and explicit axes."""

import contextlib
import functools
import math
from typing import Any, NamedTuple

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

recent = pytest.mark.skipif(
    not oracle.RECENT_JAX,
    reason="JAX could not vmap shard_map over a mesh axis, nor select unreduced arrays",
)
NORMS = {
    "global_norm": global_norm,
    "clip_updates": lambda tree, **names: clip_updates(tree, 1.0, **names)[1],
    "leaf_norms": lambda tree, **names: leaf_norms({"w": tree["w"]}, **names)["w"],
    "clip_by_global_norm": lambda tree, **names: (
        clip_by_global_norm(1.0, **names).update(tree, None)[1].global_norm
    ),
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)

# --- Names in pmap, vmap and shard_map.


class Params(NamedTuple):
    """A tree of updates that looks like a tuple of names."""

    a: Any
    b: Any


SHARDS = np.arange(32.0, dtype=np.float32).reshape(8, 4)


@pytest.mark.parametrize(
    "names",
    ["x", ("x",), Params("x", {"c": ("x",), "d": ()}), Params(("x",), "x")],
    ids=str,
)
@pytest.mark.parametrize("mode", ["pmap", "vmap"])
def test_names_may_be_a_prefix_of_the_tree(names, mode):
    tangent = np.zeros(2, jax.dtypes.float0)  # Holds no number, and needs no name.

    def norm(shard):
        tree = Params(shard[:2], {"c": [tangent, shard[2:]], "d": None})
        return global_norm(tree, axis_name=names)

    mapped = getattr(jax, mode)(norm, axis_name="x")
    np.testing.assert_allclose(mapped(SHARDS), [oracle.norm(SHARDS)] * 8, 1e-6)


@each_norm
def test_leaves_without_a_name_are_local(norm):
    expected = [oracle.norm(shard) for shard in SHARDS]
    for names in ((), {"w": ()}, None):
        local = lambda w, n=names: norm({"w": w}, axis_name=n)  # noqa: E731
        mapped = jax.pmap(local, axis_name="x")
        np.testing.assert_allclose(mapped(SHARDS), expected, 1e-6)
    # Given as (), in spite of the types.
    local = jax.shard_map(
        lambda w: norm({"w": w}, axis_name=())[None],
        mesh=oracle.mesh(),
        in_specs=P(("x", "y")),
        out_specs=P(("x", "y")),
    )
    np.testing.assert_allclose(jax.jit(local)(SHARDS), expected, 1e-6)


def sharded_beside_mean(norm, names, **options):
    """A norm of shards, and of a mean over the devices, which each of them holds."""

    def of_both(shards, grads):
        mean = jax.lax.pmean(grads, ("x", "y"))
        return norm({"w": shards, "mean": mean}, axis_name=names)

    specs = (P(("x", "y")), P(("x", "y")))
    return jax.shard_map(
        of_both, mesh=oracle.mesh(), in_specs=specs, out_specs=P(), **options
    )


@each_norm
@pytest.mark.parametrize("names", [None, ("x", "y"), {"w": ("x", "y"), "mean": ()}])
def test_names_do_not_count_repeatedly_what_has_a_type(norm, names):
    if norm is NORMS["leaf_norms"] and isinstance(names, dict):
        names = {"w": names["w"]}
    shards = np.float32([0, 0, 4, 0, 0, 0, 0, 3])
    grads = np.full((8, 1), 12, np.float32) + np.arange(-3.5, 4)[:, None]
    found = sharded_beside_mean(norm, names)(shards, np.float32(grads))
    expected = 5 if norm is NORMS["leaf_norms"] else 13
    np.testing.assert_allclose(found, expected, 1e-6)


def test_documented_names_of_a_mean_without_types_count_each_device():
    """A limitation: of 8 devices they make sqrt(8) times the norm."""
    shards, grads = np.zeros(8, np.float32), np.full((8, 1), 12, np.float32)
    unchecked = sharded_beside_mean(global_norm, ("x", "y"), check_vma=False)
    np.testing.assert_allclose(unchecked(shards, grads), 12 * math.sqrt(8), 1e-6)


@pytest.mark.parametrize(
    "names",
    [
        {"a": "x"},
        {"a": "x", "b": {"d": "x"}},
        {"a": "x", "b": "x", "absent": "x"},
        {"a": "x", "b": {"c": "x", "absent": "x"}},
        [("x",)],
        {"a": "x", "b": P("x")},
        Params("x", "x"),
        3,
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [global_norm, leaf_norms, "update"])
def test_names_that_do_not_fit_the_tree(names, function):
    def measure(x):
        tree = {"a": x, "b": {"c": x}}
        if function == "update":
            return clip_by_global_norm(1.0, axis_name=names).update(tree, None)
        return function(tree, axis_name=names)

    with pytest.raises(ValueError, match="axis_name.*tree prefix|no name"):
        jax.pmap(measure, axis_name="x", out_axes=None)(jnp.ones((8, 2)))


def test_name_that_is_not_bound():
    clip = clip_by_global_norm(1.0, axis_name="data")
    with pytest.raises(NameError, match=r"'data' is not bound here.*\['x', 'y'\]"):
        jax.shard_map(
            lambda tree: clip.update(tree, None),
            mesh=oracle.mesh(),
            in_specs=P("x"),
            out_specs=P("x"),
            check_vma=False,
        )(jnp.ones(8))
    with pytest.raises(NameError, match="under plain jit the norm is global already"):
        jax.jit(clip.update)(jnp.ones(8), None)


# --- Maps around maps.


@pytest.mark.parametrize("ord", [2, 3, math.inf])
@pytest.mark.parametrize("axis", [None, pytest.param("y", marks=recent)])
def test_vmap_over_shard_map(axis, ord):
    """Examples lie along y, or anywhere, and entries along x."""
    scales = np.float32([1, 1e25, 1e-18, 0])[:, None, None]
    batch = np.asarray(oracle.normals((4, 16, 3))) * scales
    clip = functools.partial(clip_updates, max_norm=1.0, ord=ord)
    mapped = jax.shard_map(
        clip, mesh=oracle.mesh(), in_specs=P("x"), out_specs=(P("x"), P())
    )
    clipped, norms = jax.jit(jax.vmap(mapped, spmd_axis_name=axis))(batch)
    for i, leaf in enumerate(batch):
        oracle.assert_norm(norms[i], leaf, ord, 5e-6)
        oracle.assert_clipped(clipped[i], leaf, 1.0, ord, 1e-5)


@recent
@pytest.mark.parametrize("threshold", [zscore_threshold, quantile_threshold])
def test_transformation_under_vmap_over_shard_map_with_a_mapped_mesh_axis(threshold):
    batch = oracle.normals((4, 16))
    tx = clip_by_global_norm(threshold(0.5))

    def step(leaf):
        updates, state = tx.update([leaf], tx.init([leaf]))
        return updates[0], state.global_norm

    mapped = jax.shard_map(
        step, mesh=oracle.mesh(), in_specs=P("x"), out_specs=(P("x"), P())
    )
    updates, norms = jax.jit(jax.vmap(mapped, spmd_axis_name="y"))(batch)
    np.testing.assert_array_equal(updates, batch)
    np.testing.assert_allclose(norms, [oracle.norm(row) for row in batch], 1e-6)


# --- Explicit axes.


def sums_by_name(batch):
    """Whether JAX does: 0.10 not over a sharded batch, 0.12 over no explicit mesh."""
    total = jax.vmap(lambda x: jax.lax.psum(jnp.sum(x), "batch"), axis_name="batch")
    try:
        jax.jit(total)(batch)
    except (AssertionError, ValueError):
        return False
    return True


def on_explicit_mesh(array, *spec):
    sharding = NamedSharding(oracle.mesh(AxisType.Explicit), P(*spec))
    return jax.device_put(array, sharding)


@recent
@pytest.mark.parametrize("ord", [2, 3, math.inf])
@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize("spec", [(), ("x",), (None, "x"), ("y", "x")])
def test_vmap_over_explicit_axes(spec, in_context, ord):
    """A norm for each example, or with a name one for all; with and without a mesh."""
    batch = np.asarray(oracle.normals((8, 4)))
    clip = functools.partial(clip_updates, max_norm=1.0, ord=ord)
    named = functools.partial(clip, axis_name="batch")
    leaf = on_explicit_mesh(batch, *spec)
    with jax.set_mesh(leaf.sharding.mesh) if in_context else contextlib.nullcontext():
        found = jax.jit(jax.vmap(clip))(leaf)
        clipped, norms = map(np.asarray, found)
        for i, row in enumerate(batch):
            oracle.assert_norm(norms[i], row, ord)
            oracle.assert_clipped(clipped[i], row, 1.0, ord)
        if sums_by_name(leaf):
            clipped, norms = jax.jit(jax.vmap(named, axis_name="batch"))(leaf)
            np.testing.assert_allclose(norms, [oracle.norm(batch, ord)] * 8, 1e-6)
            oracle.assert_clipped(clipped, batch, 1.0, ord)


@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_empty_sharded_leaves(ord):
    empty = on_explicit_mesh(np.zeros((8, 0), np.float32), "x")
    (clipped,), norm = clip_updates([empty], 1.0, ord=ord)
    assert (norm, clipped.shape) == (0, (8, 0))
    _, norm = clip_updates([empty, jnp.array([3.0])], 1.0, ord=ord)
    assert norm == 3


def test_numpy_array_in_an_explicit_mesh_context():
    with jax.set_mesh(oracle.mesh(AxisType.Explicit)):
        assert jax.jit(global_norm)(np.float32([3, 4])) == 5
        assert jax.jit(global_norm)([np.float32([3]), jnp.ones(16)]) == 5


@pytest.mark.usefixtures("optax_promotes")
def test_skip_keeps_an_inner_state_that_is_laid_out_otherwise():
    grads = [on_explicit_mesh(np.ones((8, 4), np.float32), "x")]
    tx = skip_by_global_norm(optax.adam(1e-3), 100.0)
    state = jax.tree.map(on_explicit_mesh, tx.init(grads))
    for scale in (1, np.nan):
        bad = [grads[0] * np.float32(scale)]
        updates, state = jax.jit(tx.update)(bad, state)
        assert jax.typeof(updates[0]) == jax.typeof(grads[0])
    assert (state.num_updates, state.num_skipped) == (2, 1)
    assert jnp.isfinite(state.inner_state[0].mu[0]).all()


# --- Sums that were put off.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_unreduced_leaf_in_shard_map(dtype, ord):
    parts = oracle.normals((4, 300), dtype)
    whole = oracle.normals((7,), seed=1)

    def clip(parts, whole):
        put_off = jax.lax.pcast(parts[0], "x", to="unreduced")
        tree = {"put off": put_off, "whole": whole}
        if not oracle.RECENT_JAX:  # It cannot scale an unreduced leaf.
            return whole, global_norm(tree, ord=ord)
        clipped, norm = clip_updates(tree, 1.0, ord=ord)
        assert jax.typeof(clipped["put off"]) == jax.typeof(put_off)
        return {**clipped, "put off": jax.lax.psum(clipped["put off"], "x")}, norm

    mapped = jax.shard_map(
        clip, mesh=oracle.mesh(), in_specs=(P("x"), P()), out_specs=P()
    )
    clipped, norm = jax.jit(mapped)(parts, whole)
    total = np.sum(np.asarray(parts, np.complex128), axis=0)
    tree = {"put off": total, "whole": np.asarray(whole)}
    rounding = 4 * oracle.eps(parts)  # Of four parts, each clipped and rounded.
    np.testing.assert_allclose(norm, oracle.norm(tree, ord), rounding)
    if oracle.RECENT_JAX:
        expected = oracle.clipped(tree, 1.0, ord)["put off"]
        actual = np.asarray(clipped["put off"]).astype(np.complex128)
        np.testing.assert_allclose(actual, expected, rounding, rounding / 10)


@recent
@pytest.mark.parametrize("ord", [2, 3, math.inf])
@pytest.mark.parametrize("bad", [False, True])
def test_unreduced_and_reduced_leaves_under_explicit_jit(bad, ord):
    x, y = map(np.array, oracle.normals([(8, 6), (8, 5)]))
    x[-1, -1] = math.nan if bad else x[-1, -1]

    def clip(x, y):
        product = jnp.einsum("ni,nj->ij", x, y, out_sharding=P(unreduced={"x"}))
        marked = jax.sharding.reshard(jnp.ones(3), P(reduced={"x"}))
        tree = {"product": product, "x": x, "marked": marked}
        clipped, norm = clip_updates(tree, 1.0, ord=ord, nonfinite="zero")
        assert jax.tree.map(jax.typeof, clipped) == jax.tree.map(jax.typeof, tree)
        tx = skip_by_global_norm(optax.identity(), 1e6, ord=ord)
        _, state = tx.update(tree, tx.init(tree))
        return jax.sharding.reshard(clipped["product"], P()), norm, state.num_skipped

    x_, y_ = (on_explicit_mesh(leaf, "x") for leaf in (x, y))
    with jax.set_mesh(oracle.mesh(AxisType.Explicit)):
        clipped, norm, num_skipped = jax.jit(clip)(x_, y_)
    assert num_skipped == int(bad)
    if bad:
        assert math.isnan(norm)
        assert not clipped.any()
    else:
        tree = {"product": x.T.astype(np.float64) @ y, "x": x, "marked": np.ones(3)}
        np.testing.assert_allclose(norm, oracle.norm(tree, ord), 1e-6)
        expected = oracle.clipped(tree, 1.0, ord)["product"]
        np.testing.assert_allclose(clipped, expected, 1e-4, 1e-6)
