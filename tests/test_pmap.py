"""What data-parallel loops in pmap, and in shard_map, say about axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    metrics,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = oracle.RUNS_OPTAX

DEVICES = 4
MEAN = np.float32([3, 4])


def pmapped(function):
    return jax.pmap(function, axis_name="data", devices=jax.devices()[:DEVICES])


def with_mean(mean, seed=0):
    """Gradients of each device, whose mean is the one given."""
    noise = np.random.default_rng(seed).standard_normal((DEVICES, *mean.shape))
    return np.float32(mean + noise - noise.mean(0))


NORMS = {
    "global_norm": global_norm,
    "clip_updates": lambda grads, **names: clip_updates(grads, 1.0, **names)[1],
    "leaf_norms": lambda grads, **names: leaf_norms(grads, **names)["w"],
    "clip_by_global_norm": lambda grads, **names: (
        clip_by_global_norm(1.0, **names).update(grads, None)[1].global_norm
    ),
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@pytest.fixture
def mesh():
    """Four devices in one axis, of automatic sharding outside shard_map."""
    return jax.make_mesh(
        (DEVICES,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:DEVICES],
    )


# --- Gradients averaged over the devices: each device holds the whole of them.


@each_norm
def test_mean_gradients_in_pmap_need_no_axis_name(norm):
    found = pmapped(lambda g: norm({"w": jax.lax.pmean(g, "data")}))(with_mean(MEAN))
    np.testing.assert_allclose(found, [5] * DEVICES, 1e-6)


@pytest.mark.parametrize("reduce", [jax.lax.pmean, jax.lax.psum])
@pytest.mark.parametrize("dtype", oracle.FLOATS)
def test_reduced_trees_in_pmap_need_no_axis_name(reduce, dtype):
    rng = np.random.default_rng(0)
    tree = {
        "w": jnp.asarray(rng.standard_normal((DEVICES, 2, 3)), dtype),
        "b": jnp.asarray(rng.standard_normal((DEVICES, 4)), dtype),
    }

    def norm(tree):
        reduced = reduce(tree, "data")
        return reduced, global_norm(reduced)

    reduced, found = pmapped(norm)(tree)
    expected = oracle.norm(jax.tree.map(lambda leaf: leaf[0], reduced))
    np.testing.assert_allclose(found, [expected] * DEVICES, 1e-5)


def loss_of(params, batch):
    return jnp.mean((batch @ params["w"] - 30.0) ** 2)


OPTIMIZERS = {
    "clip": lambda: optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1)),
    "z-score": lambda: optax.chain(
        clip_by_global_norm(zscore_threshold(warmup_steps=2)), optax.sgd(0.1)
    ),
    "skip": lambda: skip_by_global_norm(
        optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1)), 1e6
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_data_parallel_loop_is_that_of_one_device_on_the_whole_batch(make):
    tx = make()
    batches = np.float32(np.random.default_rng(0).standard_normal((5, DEVICES, 8, 2)))

    def step(params, state, batch, mean):
        grads = mean(jax.grad(loss_of)(params, batch))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics(state)

    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    replicate = functools.partial(jax.tree.map, lambda leaf: jnp.stack([leaf] * 4))
    many = replicate(params), replicate(state)
    average = functools.partial(jax.lax.pmean, axis_name="data")
    parallel = pmapped(functools.partial(step, mean=average))
    alone = jax.jit(functools.partial(step, mean=lambda grads: grads))
    for batch in batches:
        params, state, expected = alone(params, state, batch.reshape(-1, 2))
        *many, found = parallel(*many, batch)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], [value] * DEVICES, 1e-4)
    np.testing.assert_allclose(many[0]["w"][0], params["w"], 1e-5)


# --- Leaves that are sharded over the devices: each device holds a part.


@each_norm
@pytest.mark.parametrize("names", ["data", ("data",), {"w": "data"}], ids=str)
def test_sharded_leaves_in_pmap_take_an_axis_name(norm, names):
    shards = np.float32([[3, 0], [0, 4], [0, 0], [0, 12]])
    found = pmapped(lambda w: norm({"w": w}, axis_name=names))(shards)
    np.testing.assert_allclose(found, [13] * DEVICES, 1e-6)


def test_sharded_beside_averaged_leaves_in_pmap():
    names = {"sharded": "data", "mean": ()}

    def clip(sharded, grads):
        tree = {"sharded": sharded, "mean": jax.lax.pmean(grads, "data")}
        return clip_updates(tree, 1.0, axis_name=names)

    shards = np.float32([[0, 0], [6, 0], [0, 0], [0, 6]]) * np.sqrt(2, dtype="f4")
    clipped, norm = pmapped(clip)(shards, with_mean(MEAN))
    np.testing.assert_allclose(norm, [13] * DEVICES, 1e-6)
    whole = {"sharded": clipped["sharded"], "mean": clipped["mean"][0]}
    np.testing.assert_allclose(oracle.norm(whole), 1, 1e-6)


# --- An axis name after the mean.


@each_norm
def test_axis_name_after_the_mean_counts_once_where_types_tell(norm, mesh):
    """The types of shard_map tell that a mean is the same on all devices."""

    def of_mean(grads):
        return norm({"w": jax.lax.pmean(grads[0], "data")}, axis_name="data")

    sharded = jax.shard_map(
        of_mean, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=True
    )
    np.testing.assert_allclose(sharded(with_mean(MEAN)), 5, 1e-6)


def test_axis_name_counts_shards_in_full_where_types_tell(mesh):
    sharded = jax.shard_map(
        functools.partial(global_norm, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    np.testing.assert_allclose(sharded(np.float32([3, 4, 0, 12])), 13, 1e-6)


def test_mean_beside_shards_where_types_tell(mesh):
    def of_both(shard, grads):
        tree = {"shard": shard, "mean": jax.lax.pmean(grads[0], "data")}
        return global_norm(tree), global_norm(tree, axis_name="data")

    sharded = jax.shard_map(
        of_both, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()
    )
    found = sharded(np.float32([0, 12, 0, 0]), with_mean(MEAN))
    np.testing.assert_allclose(found, [13, 13], 1e-6)


@each_norm
def test_documented_axis_name_after_the_mean_in_pmap_counts_each_device(norm):
    """A limitation: pmap has no types, so 4 devices give sqrt(4) times the norm."""

    def of_mean(grads):
        return norm({"w": jax.lax.pmean(grads, "data")}, axis_name="data")

    found = pmapped(of_mean)(with_mean(MEAN))
    np.testing.assert_allclose(found, [10] * DEVICES, 1e-6)


def test_documented_axis_name_after_the_mean_without_check_vma(mesh):
    """As in pmap: with check_vma=False there are no types to tell."""

    def of_mean(grads):
        return global_norm(jax.lax.pmean(grads[0], "data"), axis_name="data")

    sharded = jax.shard_map(
        of_mean, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False
    )
    np.testing.assert_allclose(sharded(with_mean(MEAN)), 10, 1e-6)
