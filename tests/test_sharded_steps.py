"""Steps as users write them, on many devices, beside the step on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import clip_by_global_norm

pytestmark = pytest.mark.slow


def network(params, x):
    hidden = jnp.tanh(x @ params["up"] + params["bias"][None])
    return hidden @ params["down"]


def mean_square(params, x, y):
    return jnp.mean((network(params, x) - y) ** 2)


PARAMS = {
    key: np.array(leaf)
    for key, leaf in oracle.normals(
        {"up": (8, 16), "bias": (16,), "down": (16, 4)}
    ).items()
}
X, Y = (np.array(leaf) for leaf in oracle.normals([(32, 8), (32, 4)], seed=1))
TX = optax.chain(clip_by_global_norm(0.1), optax.sgd(0.5, momentum=0.9))


def train(step, params, opt_state):
    norms = []
    for _ in range(4):
        params, opt_state = step(params, opt_state, X, Y)
        norms.append(float(optax.tree.get(opt_state, "global_norm")))
    return params, norms


@functools.cache
def trained_on_one_device():
    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(mean_square)(params, x, y)
        updates, opt_state = TX.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    return train(step, PARAMS, TX.init(PARAMS))


def assert_trained_alike(params, norms):
    expected_params, expected_norms = trained_on_one_device()
    assert min(expected_norms) > 0.1  # So that every step is clipped.
    np.testing.assert_allclose(norms, expected_norms, 1e-5)
    for key, leaf in expected_params.items():
        np.testing.assert_allclose(params[key], leaf, 1e-5, 1e-6)


def steps_in_shard_map(specs, loss, axis_type=AxisType.Auto):
    """The same lines of code, whatever the shards: the types say what they are."""
    opt_state = TX.init(PARAMS)
    state_specs = optax.tree.map_params(
        TX, lambda _, spec: spec, opt_state, specs, transform_non_params=lambda _: P()
    )

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=oracle.mesh(axis_type),
        in_specs=(specs, state_specs, P("x"), P("x")),
        out_specs=(specs, state_specs),
    )
    def step(params, opt_state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, opt_state = TX.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    return train(step, PARAMS, opt_state)


def test_data_parallel():
    def loss(params, x, y):
        return jax.lax.pmean(mean_square(params, x, y), "x")

    specs = dict.fromkeys(PARAMS, P())
    assert_trained_alike(*steps_in_shard_map(specs, loss))


def test_fully_sharded():
    def loss(params, x, y):
        params = {
            key: jax.lax.all_gather(leaf, ("x", "y"), tiled=True)
            for key, leaf in params.items()
        }
        return jax.lax.pmean(mean_square(params, x, y), ("x", "y"))

    specs = dict.fromkeys(PARAMS, P(("x", "y")))
    assert_trained_alike(*steps_in_shard_map(specs, loss))


def test_tensor_parallel():
    def loss(params, x, y):
        parts = network(params, x)
        return jax.lax.pmean(jnp.mean((jax.lax.psum(parts, "y") - y) ** 2), "x")

    specs = {"up": P(None, "y"), "bias": P("y"), "down": P("y", None)}
    assert_trained_alike(*steps_in_shard_map(specs, loss))


def test_some_leaves_sharded_and_some_not():
    def loss(params, x, y):
        up = jax.lax.all_gather(params["up"], "x", tiled=True)
        return jax.lax.pmean(mean_square({**params, "up": up}, x, y), "x")

    specs = {"up": P("x"), "bias": P(), "down": P()}
    assert_trained_alike(*steps_in_shard_map(specs, loss))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "specs",
    [
        dict.fromkeys(PARAMS, P()),
        {"up": P("y"), "bias": P(), "down": P("y")},
        {"up": P(None, "y"), "bias": P("y"), "down": P("y", None)},
    ],
    ids=["data parallel", "fully sharded", "tensor parallel"],
)
def test_plain_jit(axis_type, specs):
    mesh = oracle.mesh(axis_type)
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    batch_sharding = NamedSharding(mesh, P("x"))

    def loss(params, x, y):
        # In explicit mode a product must say how it is laid out; the others follow.
        gathered = {
            key: jax.sharding.reshard(leaf, P()) for key, leaf in params.items()
        }
        return mean_square(params if axis_type == AxisType.Auto else gathered, x, y)

    @jax.jit
    def step(params, opt_state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, opt_state = TX.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings)
        batch = jax.device_put((X, Y), batch_sharding)
        assert_trained_alike(
            *train(lambda p, s, x, y: step(p, s, *batch), params, TX.init(params))
        )


def test_pmap_of_mean_gradients():
    @functools.partial(jax.pmap, axis_name="data")
    def step(params, opt_state, x, y):
        grads = jax.lax.pmean(jax.grad(mean_square)(params, x, y), "data")
        updates, opt_state = TX.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def everywhere(tree):
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), tree)

    def split(batch):
        return batch.reshape(8, 4, -1)

    params, opt_state = everywhere(PARAMS), everywhere(TX.init(PARAMS))
    norms = []
    for _ in range(4):
        params, opt_state = step(params, opt_state, split(X), split(Y))
        norms.append(float(optax.tree.get(opt_state, "global_norm")[0]))
    assert_trained_alike(jax.tree.map(lambda leaf: leaf[0], params), norms)
