"""Inside training steps of Flax NNX, Flax Linen, Equinox and chex."""

import chex
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

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    metrics,
    skip_by_global_norm,
)

pytestmark = [pytest.mark.slow, *oracle.RUNS_OPTAX]

X = oracle.normals((16, 4))
Y = oracle.normals((16, 2), seed=1)


def transform():
    return optax.chain(clip_by_global_norm(0.5), optax.sgd(0.1))


def loss_of(predicted):
    return jnp.mean((predicted - Y) ** 2)


def assert_measured(opt_state, grads):
    """The state has the norm of the gradients, which is clipped."""
    found = metrics(opt_state)
    np.testing.assert_allclose(found["global_norm"], oracle.norm(grads), 1e-6)
    assert found["global_norm"] > 0


# --- Flax NNX.


class Adapted(nnx.Module):
    """A frozen matrix with a trainable one of low rank beside it."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        self.lora = nnx.LoRA(4, 3, 2, rngs=rngs)

    def __call__(self, x):
        return self.dense(x) + self.lora(x)


@nnx.jit(static_argnames="wrt")
def nnx_step(model, optimizer, wrt=nnx.Param):
    diff = nnx.DiffState(0, wrt)
    grads = nnx.grad(lambda model: loss_of(model(X)), argnums=diff)(model)
    optimizer.update(model, grads)
    return grads


def test_nnx_frozen_parameters_do_not_count():
    model = Adapted(nnx.Rngs(0))
    frozen = np.asarray(model.dense.kernel[...])
    optimizer = nnx.Optimizer(model, transform(), wrt=nnx.LoRAParam)
    for _ in range(3):
        grads = nnx_step(model, optimizer, nnx.LoRAParam)
        assert_measured(optimizer.opt_state, grads)
    np.testing.assert_array_equal(model.dense.kernel[...], frozen)


def test_nnx_with_a_skip_in_its_optimizer():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    tx = skip_by_global_norm(optax.adam(0.1), 1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.kernel[...])
    nnx_step(model, optimizer)
    np.testing.assert_array_equal(model.kernel[...], before)
    assert metrics(optimizer.opt_state)["skip_fraction"] == 1


def test_nnx_partitioned_parameters():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))

    @nnx.jit
    def create():
        model = nnx.Linear(4, 2, kernel_init=init, rngs=nnx.Rngs(0))
        state = nnx.state(model)
        specs = nnx.get_partition_spec(state)
        nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
        return model

    with jax.set_mesh(mesh):
        model = create()
        optimizer = nnx.Optimizer(model, transform(), wrt=nnx.Param)
        grads = nnx_step(model, optimizer)
        assert model.kernel.sharding.spec == P("data", "model")
        assert_measured(optimizer.opt_state, grads)


def test_nnx_half_precision_beside_full_precision_parameters():
    model = nnx.Linear(4, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, transform(), wrt=nnx.Param)
    grads = nnx_step(model, optimizer)
    assert_measured(optimizer.opt_state, grads)
    assert model.kernel.dtype == jnp.float32
    cast = jax.tree.map(lambda g: g.astype(jnp.bfloat16), nnx.to_pure_dict(grads))
    updates, state = transform().update(cast, transform().init(None))
    assert_measured(state, cast)
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
        grads = jax.grad(lambda p: loss_of(state.apply_fn({"params": p}, X)))(
            state.params
        )
        return state.apply_gradients(grads=grads), grads

    for _ in range(3):
        state, grads = step(state)
        assert_measured(state.opt_state, grads)
    assert state.params["kernel"].names == ("data", "model")


# --- Equinox.


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
        grads = jax.grad(lambda t: loss_of(jax.vmap(eqx.combine(t, rest))(X)))(
            trainable
        )
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return eqx.apply_updates(trainable, updates), opt_state, grads

    for _ in range(3):
        trainable, opt_state, grads = step(trainable, opt_state)
        assert_measured(opt_state, grads)


# --- Others.


def test_nested_dictionaries_as_in_haiku():
    params = {
        "mlp/~/linear_0": {"w": oracle.normals((4, 3)), "b": jnp.zeros(3)},
        "mlp/~/linear_1": {"w": oracle.normals((3, 2)), "b": jnp.zeros(2)},
    }
    trained = {name: dict.fromkeys(params[name], name[-1] == "1") for name in params}
    tx = optax.masked(transform(), trained)

    def loss(params):
        hidden = X
        for layer in params.values():
            hidden = jnp.tanh(hidden @ layer["w"] + layer["b"][None])
        return loss_of(hidden)

    grads = jax.jit(jax.grad(loss))(params)
    updates, opt_state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_measured(opt_state, grads["mlp/~/linear_1"])
    frozen = "mlp/~/linear_0"
    np.testing.assert_array_equal(updates[frozen]["w"], grads[frozen]["w"])


@chex.dataclass
class Params:
    """A tree as users of chex have it."""

    w: chex.Array
    b: chex.Array


GRADS = Params(w=jnp.array([3.0, 0.0]), b=jnp.array([4.0]))


def test_chex_dataclass_stays_one_in_a_step_that_is_traced_once():
    clipped, norm = clip_updates(GRADS, 1.0)
    assert norm == 5
    expected = Params(w=np.float32([0.6, 0]), b=np.float32([0.8]))
    chex.assert_trees_all_close(clipped, expected, rtol=1e-6)
    tx = optax.chain(clip_by_global_norm(1.0), optax.adam(0.1))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = GRADS, tx.init(GRADS)
    for _ in range(3):
        params, state = step(params, state)
    assert metrics(state)["clip_fraction"] == 1


def test_chexify_raises_for_what_is_not_finite():
    @chex.chexify
    @jax.jit
    def clip(grads):
        return clip_updates(grads, 1.0, nonfinite="error")

    clipped, _ = clip(GRADS)
    np.testing.assert_allclose(clipped.b, [0.8], 1e-6)
    clip(GRADS.replace(b=jnp.array([jnp.nan])))
    with pytest.raises(Exception, match="an entry is inf or NaN"):
        clip.wait_checks()  # pyright: ignore[reportFunctionMemberAccess]
