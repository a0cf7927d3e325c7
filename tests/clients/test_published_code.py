"""Ways in which published training code uses a clip, each of which works unchanged.

Every test names the code that it follows. What is tested is the pattern, written anew
and as small as it goes; models and data stand for the authors' own.
"""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import jax_utils
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
    ClipByGlobalNormState,
    clip_by_global_norm,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = [pytest.mark.slow, *oracle.RUNS_OPTAX]

X = oracle.normals((8, 4))
Y = oracle.normals((8, 2), seed=1)


def draw(seed=0):
    return oracle.normals({"dense": {"kernel": (4, 2), "bias": (2,)}}, seed=seed)


def predict(params, x):
    return x @ params["dense"]["kernel"] + params["dense"]["bias"][None]


def loss_of(params, x=X, y=Y):
    return jnp.mean((predict(params, x) - y) ** 2)


def gradients(params, x=X, y=Y):
    """The gradients of the loss, in float64."""
    kernel, bias = (np.float64(params["dense"][name]) for name in ("kernel", "bias"))
    x, y = np.float64(x), np.float64(y)
    slope = 2 * (x @ kernel + bias - y) / y.size
    return {"dense": {"kernel": x.T @ slope, "bias": slope.sum(0)}}


def assert_close(found, expected, tolerance=1e-5):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, tolerance, tolerance),
        found,
        expected,
    )


def test_seeds_of_ppo_are_trained_in_one_vmap():
    """PureJaxRL, make_train of purejaxrl/ppo.py.

    A whole training run (``TrainState.create``, then scans over updates, epochs and
    minibatches) is one function of a key, which ``jax.jit(jax.vmap(train))`` runs for
    many seeds. The optimizer is ``chain(clip_by_global_norm, adam(schedule))``.
    https://github.com/luchris429/purejaxrl/blob/main/purejaxrl/ppo.py
    """
    max_norm = 0.05

    class ActorCritic(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.tanh(nn.Dense(3)(x))
            return nn.Dense(2)(hidden), nn.Dense(1)(hidden)[..., 0]

    def train(key):
        key, init_key = jax.random.split(key)
        network = ActorCritic()
        tx = optax.chain(
            clip_by_global_norm(max_norm),
            optax.adam(optax.linear_schedule(1e-2, 0.0, 24), eps=1e-5),
        )
        params = network.init(init_key, X)
        state = TrainState.create(apply_fn=network.apply, params=params, tx=tx)

        def minibatch(state, batch):
            def loss(params):
                logits, value = state.apply_fn(params, batch["x"])
                policy = jax.nn.log_softmax(logits)[:, 0]
                return jnp.mean((value - batch["y"][:, 0]) ** 2 - policy)

            grads = jax.grad(loss)(state.params)
            state = state.apply_gradients(grads=grads)
            return state, (grads, metrics(state.opt_state))

        def epoch(carry, _):
            state, key = carry
            key, own = jax.random.split(key)
            order = jax.random.permutation(own, 8)
            batches = {"x": X[order].reshape(4, 2, 4), "y": Y[order].reshape(4, 2, 2)}
            state, logged = jax.lax.scan(minibatch, state, batches)
            return (state, key), logged

        (state, _), logged = jax.lax.scan(epoch, (state, key), length=3)
        return state, logged

    state, (grads, logged) = jax.jit(jax.vmap(train))(
        jax.random.split(jax.random.key(0), 5)
    )
    assert logged["global_norm"].shape == (5, 3, 4)
    for seed in range(5):
        for step in np.ndindex(3, 4):
            own = jax.tree.map(lambda g, at=(seed, *step): g[at], grads)
            np.testing.assert_allclose(
                logged["global_norm"][seed, *step], oracle.norm(own), 1e-5
            )
    clipped = np.sum(np.asarray(logged["global_norm"]) > max_norm, axis=(1, 2))
    np.testing.assert_array_equal(state.opt_state[0].num_clipped, clipped)
    assert clipped.min() > 0
    np.testing.assert_array_equal(state.opt_state[0].num_updates, [12] * 5)


FP8 = "_overwrite_with_gradient"


def apply_gradient_clipping(raw_grads, state, threshold):
    """As MaxText: the whole train state stands where Optax's clip ignores its own."""
    clip = clip_by_global_norm(threshold)
    if FP8 not in raw_grads:
        return clip.update(raw_grads, state, None)[0]
    scales = raw_grads[FP8]
    rest = {name: grads for name, grads in raw_grads.items() if name != FP8}
    return {**clip.update(rest, state, None)[0], FP8: scales}


@pytest.mark.parametrize("stats", [False, True], ids=["plain", "fp8"])
def test_train_state_stands_for_the_state_of_the_clip(stats):
    """MaxText, apply_gradient_clipping of maxtext_utils.py.

    A clip is made and used inside the step, with the whole ``TrainState`` as its state
    and its new state dropped. Statistics of fp8 layers are neither counted nor clipped.
    https://github.com/AI-Hypercomputer/maxtext/blob/main/src/maxtext/utils/maxtext_utils.py
    """
    params = draw()
    state = TrainState.create(apply_fn=predict, params=params, tx=optax.adamw(0.1))

    @jax.jit
    def step(state):
        raw_grads = jax.grad(loss_of)(state.params)
        if stats:
            raw_grads[FP8] = {"amax_history": jnp.full(16, 1e9)}
        grads = apply_gradient_clipping(raw_grads, state, 0.25)
        kept = grads.pop(FP8, None)
        return state.apply_gradients(grads=grads), grads, kept

    for _ in range(2):
        expected = oracle.clipped(gradients(state.params), 0.25)
        state, grads, kept = step(state)
        assert_close(grads, expected)
        np.testing.assert_allclose(oracle.norm(grads), 0.25, 1e-6)
        if stats:
            np.testing.assert_array_equal(kept["amax_history"], [1e9] * 16)


def test_averaged_gradients_are_clipped_in_pmap():
    """brax, gradient_update_fn of brax/training/gradients.py.

    Parameters and optimizer state are replicated, each device takes the gradients of
    its own part of the batch, ``pmean`` averages them, and every device then clips the
    average. No axis name is passed to the clip.
    https://github.com/google/brax/blob/main/brax/training/gradients.py
    """
    tx = optax.chain(clip_by_global_norm(0.1), optax.sgd(0.5))

    def gradient_update_fn(params, x, y, optimizer_state):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        grads = jax.lax.pmean(grads, axis_name="i")
        update, optimizer_state = tx.update(grads, optimizer_state)
        return loss, optax.apply_updates(params, update), optimizer_state

    step = jax.pmap(gradient_update_fn, axis_name="i")
    params, optimizer_state = jax_utils.replicate((draw(), tx.init(draw())))
    expected = draw()
    for _ in range(3):
        _, params, optimizer_state = step(
            params, X[:, None], Y[:, None], optimizer_state
        )
        grads = gradients(expected)
        update = oracle.clipped(grads, 0.1)
        expected = jax.tree.map(lambda p, u: p - 0.5 * u, expected, update)
        norms = optimizer_state[0].global_norm
        np.testing.assert_allclose(norms, [oracle.norm(grads)] * 8, 1e-5)
    assert_close(jax_utils.unreplicate(params), expected)
    found = metrics(jax_utils.unreplicate(optimizer_state))
    assert found["clip_fraction"] == 1


def match_partition_rules(rules, tree):
    """As EasyLM: scalars on every device, the rest by the first rule that is found."""

    def spec(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.size <= 1:
            return P()
        found = [spec for rule, spec in rules if re.search(rule, name)]
        if not found:
            raise ValueError(f"no rule for {name}")
        return found[0]

    return jax.tree.map_with_path(spec, tree)


# The window of a quantile is the one array of our states that is not a scalar: like
# those of EasyLM's models, the rules end with one that matches whatever is left.
MODELS_RULES = [("dense/kernel", P("fsdp", "mp")), ("dense/bias", P()), (".*", P(None))]


@pytest.mark.parametrize("max_norm", [0.25, quantile_threshold(0.5, warmup_steps=1)])
def test_rules_of_a_model_partition_the_whole_train_state(max_norm):
    """EasyLM, match_partition_rules of EasyLM/jax_utils.py.

    One list of regular expressions gives the sharding of each entry of a train state by
    its path: parameters, moments, and what else the optimizer keeps. The abstract state
    is matched before there is any other.
    https://github.com/young-geng/EasyLM/blob/main/EasyLM/jax_utils.py
    """
    mesh = jax.make_mesh((4, 2), ("fsdp", "mp"), axis_types=(AxisType.Auto,) * 2)
    tx = optax.chain(clip_by_global_norm(max_norm), optax.adamw(0.1))

    def create():
        return TrainState.create(apply_fn=predict, params=draw(), tx=tx)

    specs = match_partition_rules(MODELS_RULES, jax.eval_shape(create))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    assert specs.opt_state[0].global_norm == P()
    assert specs.opt_state[1][0].mu["dense"]["kernel"] == P("fsdp", "mp")

    def train_step(state):
        grads = jax.grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads)

    state = jax.jit(create, out_shardings=shardings)()
    step = jax.jit(train_step, in_shardings=(shardings,), out_shardings=shardings)
    for _ in range(2):
        expected = oracle.norm(gradients(state.params))
        state = step(state)
        np.testing.assert_allclose(state.opt_state[0].global_norm, expected, 1e-5)
    assert state.params["dense"]["kernel"].sharding.spec == P("fsdp", "mp")
    assert state.opt_state[0].num_updates == 2


def test_frozen_parameters_are_masked_out_of_the_clip():
    """big_vision, make and find_states of big_vision/optax.py.

    Regular expressions say which parameters are frozen. The clip is masked by them, so
    that their gradients do not count, and the updates of frozen ones are set to zero
    last. States are found by their class.
    https://github.com/google-research/big_vision/blob/main/big_vision/optax.py
    """
    params = {"head": draw()["dense"], "trunk": draw(1)["dense"]}
    frozen = jax.tree.map_with_path(
        lambda path, _: bool(re.search("trunk", jax.tree_util.keystr(path))), params
    )
    trained = jax.tree.map(lambda is_frozen: not is_frozen, frozen)
    tx = optax.chain(
        optax.masked(clip_by_global_norm(1.0), trained),
        optax.masked(optax.trace(0.9), trained),
        optax.scale(-0.1),
        optax.masked(optax.set_to_zero(), frozen),
    )
    grads = {"head": draw(2)["dense"], "trunk": draw(3)["dense"]}
    updates, opt_state = jax.jit(tx.update)(grads, tx.init(params), params)

    leaves = jax.tree.leaves(
        opt_state, is_leaf=lambda node: isinstance(node, ClipByGlobalNormState)
    )
    (found,) = [leaf for leaf in leaves if isinstance(leaf, ClipByGlobalNormState)]
    np.testing.assert_allclose(found.global_norm, oracle.norm(grads["head"]), 1e-6)
    clipped = oracle.clipped(grads["head"], 1.0)
    assert_close(updates["head"], jax.tree.map(lambda g: -0.1 * g, clipped))
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["trunk"]))


@pytest.mark.parametrize("donate", ["none", "all"])
def test_model_with_functions_in_it_is_trained_by_filters(donate):
    """Equinox, make_step of its MNIST and CNN examples.

    The model is a pytree with functions and integers in it; ``filter_grad`` puts None
    in place of their gradients, and ``init`` is given ``filter(model, is_array)``.
    https://github.com/patrick-kidger/equinox/blob/main/examples/mnist.ipynb
    """
    model = eqx.nn.MLP(4, 2, 3, 1, activation=jnp.tanh, key=jax.random.key(0))
    tx = skip_by_global_norm(
        optax.chain(clip_by_global_norm(0.1), optax.adamw(0.1)), zscore_threshold()
    )
    opt_state = tx.init(eqx.filter(model, eqx.is_array))

    def loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    @eqx.filter_jit(donate=donate)
    def make_step(model, opt_state, x, y):
        value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
        updates, opt_state = tx.update(
            grads, opt_state, eqx.filter(model, eqx.is_array)
        )
        return eqx.apply_updates(model, updates), opt_state, value, grads

    x, y = np.asarray(X), np.asarray(Y)
    losses = []
    for _ in range(5):
        model, opt_state, value, grads = make_step(model, opt_state, x, y)
        np.testing.assert_allclose(opt_state.global_norm, oracle.norm(grads), 1e-6)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert metrics(opt_state)["clip/clip_fraction"] == 1
