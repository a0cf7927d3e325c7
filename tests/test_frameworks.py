"""Inside training loops of Flax NNX, Flax Linen, Equinox, and over nested dicts."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec as P

from optax_globalclip import clip_by_global_norm, metrics, skip_by_global_norm
from optax_globalclip._demo import HIDDEN, Network, draw_batches, load_sequences

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotes")]

X = oracle.normals((16, 4))
Y = oracle.normals((16, 2), seed=1)


def transform():
    return optax.chain(clip_by_global_norm(0.5), optax.sgd(0.1))


def loss_of(predicted):
    return jnp.mean((predicted - Y) ** 2)


# --- The demo's model, in each of three libraries, from the same weights.


class LinenNetwork(nn.Module):
    """The demo's network in Flax Linen."""

    @nn.compact
    def __call__(self, images):
        recur = self.param("recur", nn.initializers.orthogonal(), (HIDDEN, HIDDEN))

        def step(hidden, pixel):
            return jnp.tanh(pixel + hidden @ recur), None

        pixels = nn.Dense(HIDDEN, name="read")(images).swapaxes(0, 1)
        hidden, _ = jax.lax.scan(step, jnp.zeros(pixels.shape[1:]), pixels)
        return nn.Dense(10, name="classify")(hidden)


class EquinoxNetwork(eqx.Module):
    """The demo's network in Equinox."""

    read: eqx.nn.Linear
    recur: eqx.nn.Linear
    classify: eqx.nn.Linear

    def __init__(self, key):
        self.read = eqx.nn.Linear(1, HIDDEN, key=key)
        self.recur = eqx.nn.Linear(HIDDEN, HIDDEN, use_bias=False, key=key)
        self.classify = eqx.nn.Linear(HIDDEN, 10, key=key)

    def __call__(self, images):
        def step(hidden, pixel):
            return jnp.tanh(pixel + jax.vmap(self.recur)(hidden)), None

        pixels = jax.vmap(jax.vmap(self.read))(images).swapaxes(0, 1)
        hidden, _ = jax.lax.scan(step, jnp.zeros(pixels.shape[1:]), pixels)
        return jax.vmap(self.classify)(hidden)


def entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_nnx(network, tx, batches):
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer, batch):
        grads = nnx.grad(lambda n: entropy(n(batch.images), batch.labels))(network)
        optimizer.update(network, grads)
        return metrics(optimizer.opt_state)["global_norm"]

    return [step(network, optimizer, batch) for batch in batches]


def train_linen(network, tx, batches):
    params = {
        "read": {"kernel": network.read.kernel[...], "bias": network.read.bias[...]},
        "recur": network.recur.kernel[...],
        "classify": {
            "kernel": network.classify.kernel[...],
            "bias": network.classify.bias[...],
        },
    }
    state = TrainState.create(apply_fn=LinenNetwork().apply, params=params, tx=tx)

    @jax.jit
    def step(state, batch):
        def loss(params):
            logits = state.apply_fn({"params": params}, batch.images)
            return entropy(logits, batch.labels)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    norms = []
    for batch in batches:
        state = step(state, batch)
        norms.append(metrics(state.opt_state)["global_norm"])
    return norms


def train_equinox(network, tx, batches):
    model = eqx.tree_at(
        lambda m: (
            m.read.weight,
            m.read.bias,
            m.recur.weight,
            m.classify.weight,
            m.classify.bias,
        ),
        EquinoxNetwork(jax.random.key(0)),
        (
            network.read.kernel[...].T,
            network.read.bias[...],
            network.recur.kernel[...].T,
            network.classify.kernel[...].T,
            network.classify.bias[...],
        ),
    )
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state, batch):
        def loss(model):
            return entropy(model(batch.images), batch.labels)

        grads = eqx.filter_grad(loss)(model)
        updates, opt_state = tx.update(
            grads, opt_state, eqx.filter(model, eqx.is_inexact_array)
        )
        return eqx.apply_updates(model, updates), opt_state

    norms = []
    for batch in batches:
        model, opt_state = step(model, opt_state, batch)
        norms.append(metrics(opt_state)["global_norm"])
    return norms


@pytest.fixture(scope="module")
def demo_batches():
    train_set, _ = load_sequences(0)
    return list(draw_batches(train_set, 4, 0))


@pytest.mark.parametrize("train", [train_linen, train_equinox])
def test_the_demo_has_the_norms_that_it_has_in_nnx(train, demo_batches):
    tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
    expected = train_nnx(Network(nnx.Rngs(0)), tx, demo_batches)
    assert max(expected) > 1
    found = train(Network(nnx.Rngs(0)), tx, demo_batches)
    np.testing.assert_allclose(found, expected, 1e-4)


# --- Flax NNX.


class Adapted(nnx.Module):
    """A frozen matrix with a trainable one of low rank beside it."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        self.lora = nnx.LoRA(4, 3, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(x) + self.lora(x)


def nnx_step(model, optimizer, wrt):
    @nnx.jit
    def step(model, optimizer):
        diff = nnx.DiffState(0, wrt)
        grads = nnx.grad(lambda m: loss_of(m(X)), argnums=diff)(model)
        optimizer.update(model, grads)
        return grads, metrics(optimizer.opt_state)

    return step(model, optimizer)


def test_nnx_frozen_parameters_do_not_count():
    model = Adapted(nnx.Rngs(0))
    frozen = np.asarray(model.dense.kernel[...])
    optimizer = nnx.Optimizer(model, transform(), wrt=nnx.LoRAParam)
    for _ in range(3):
        grads, found = nnx_step(model, optimizer, nnx.LoRAParam)
        np.testing.assert_allclose(found["global_norm"], oracle.norm(grads), 1e-6)
        assert found["global_norm"] > 0
    np.testing.assert_array_equal(model.dense.kernel[...], frozen)


def test_nnx_with_a_skip_in_its_optimizer():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    tx = skip_by_global_norm(optax.adam(0.1), 1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.kernel[...])
    _, found = nnx_step(model, optimizer, nnx.Param)
    np.testing.assert_array_equal(model.kernel[...], before)
    assert found["skip_fraction"] == 1


def test_nnx_partitioned_parameters():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):

        @nnx.jit
        def create():
            init = nnx.with_partitioning(
                nnx.initializers.lecun_normal(), ("data", "model")
            )
            model = nnx.Linear(4, 2, kernel_init=init, rngs=nnx.Rngs(0))
            state = nnx.state(model)
            sharded = jax.lax.with_sharding_constraint(
                state, nnx.get_partition_spec(state)
            )
            nnx.update(model, sharded)
            return model

        model = create()
        optimizer = nnx.Optimizer(model, transform(), wrt=nnx.Param)
        grads, found = nnx_step(model, optimizer, nnx.Param)
        assert model.kernel.sharding.spec == P("data", "model")
        np.testing.assert_allclose(found["global_norm"], oracle.norm(grads), 1e-6)


def test_nnx_half_precision_beside_full_precision_parameters():
    model = nnx.Linear(4, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transform(), wrt=nnx.Param)
    grads, found = nnx_step(model, optimizer, nnx.Param)
    np.testing.assert_allclose(found["global_norm"], oracle.norm(grads), 1e-6)
    assert model.kernel.dtype == jnp.float32
    cast = jax.tree.map(lambda g: g.astype(jnp.bfloat16), nnx.to_pure_dict(grads))
    updates, state = transform().update(cast, transform().init(None))
    np.testing.assert_allclose(metrics(state)["global_norm"], oracle.norm(cast), 1e-6)
    assert updates["kernel"].dtype == jnp.bfloat16


# --- Flax Linen.


def test_linen_boxed_parameters():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
    model = nn.Dense(2, kernel_init=init)
    params = model.init(jax.random.key(0), X)["params"]
    assert isinstance(params["kernel"], nn.Partitioned)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=transform())

    @jax.jit
    def step(state):
        def loss(params):
            return loss_of(state.apply_fn({"params": params}, X))

        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads), grads

    for _ in range(3):
        state, grads = step(state)
        found = metrics(state.opt_state)["global_norm"]
        np.testing.assert_allclose(found, oracle.norm(grads), 1e-6)
    assert state.params["kernel"].names == ("data", "model")


# --- Others.


def test_equinox_module_with_frozen_and_static_fields():
    class Model(eqx.Module):
        dense: eqx.nn.Linear
        table: jax.Array
        activation: object

        def __call__(self, x):
            table = jax.lax.stop_gradient(self.table)
            return self.activation(self.dense(x)) + table[0]

    model = Model(eqx.nn.Linear(4, 2, key=jax.random.key(0)), jnp.arange(3), jnp.tanh)
    trainable, rest = eqx.partition(model, eqx.is_inexact_array)
    assert trainable.table is trainable.activation is None
    tx, opt_state = transform(), transform().init(trainable)

    @jax.jit
    def step(trainable, opt_state):
        def loss(trainable):
            return loss_of(jax.vmap(eqx.combine(trainable, rest))(X))

        grads = jax.grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return eqx.apply_updates(trainable, updates), opt_state, grads

    for _ in range(3):
        trainable, opt_state, grads = step(trainable, opt_state)
        found = metrics(opt_state)["global_norm"]
        np.testing.assert_allclose(found, oracle.norm(grads), 1e-6)


def test_nested_dictionaries_as_in_haiku():
    params = {
        "mlp/~/linear_0": {"w": oracle.normals((4, 3)), "b": jnp.zeros(3)},
        "mlp/~/linear_1": {"w": oracle.normals((3, 2)), "b": jnp.zeros(2)},
    }
    frozen = {
        module: dict.fromkeys(leaves, module.endswith("1"))
        for module, leaves in params.items()
    }
    tx = optax.masked(transform(), frozen)
    opt_state = tx.init(params)

    def loss(params):
        hidden = X
        for layer in params.values():
            hidden = jnp.tanh(hidden @ layer["w"] + layer["b"][None])
        return loss_of(hidden)

    grads = jax.jit(jax.grad(loss))(params)
    updates, opt_state = jax.jit(tx.update)(grads, opt_state, params)
    expected = oracle.norm(grads["mlp/~/linear_1"])
    np.testing.assert_allclose(metrics(opt_state)["global_norm"], expected, 1e-6)
    np.testing.assert_array_equal(
        updates["mlp/~/linear_0"]["w"], grads["mlp/~/linear_0"]["w"]
    )
