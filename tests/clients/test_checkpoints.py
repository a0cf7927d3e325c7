"""States through pickle, Flax and Orbax, with and without a target, and back."""

import functools
import pickle

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from optax_globalclip import (
    ClipByGlobalNormState,
    clip_by_global_norm,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = [pytest.mark.slow, *oracle.RUNS_OPTAX]

PARAMS = {"w": jnp.array([1.0, 0.5]), "b": jnp.array([-0.3])}
clip = functools.partial(clip_by_global_norm, nonfinite="zero")
QUANTILE = quantile_threshold(0.5, window=4, warmup_steps=2)
OPTIMIZERS = {
    "number": lambda: optax.chain(clip(1.0), optax.adamw(0.1)),
    "schedule": lambda: optax.chain(clip(optax.linear_schedule(1.0, 2.0, 9))),
    "None": lambda: clip_by_global_norm(None),
    "z-score": lambda: clip(zscore_threshold(warmup_steps=2)),
    "quantile": lambda: optax.chain(clip(QUANTILE), optax.trace(0.9)),
    "two clips": lambda: optax.chain(clip(1.0), optax.adam(0.1), clip(0.1)),
    "skip": lambda: skip_by_global_norm(optax.scale_by_adam(), 6.0),
    "clip in a skip": lambda: skip_by_global_norm(
        optax.chain(clip(1.0), optax.trace(0.9)),
        zscore_threshold(6.0, warmup_steps=2),
        max_consecutive_skips=3,
    ),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def train(tx, state, scales, params=PARAMS):
    """All updates, with gradients scaled so, and the last state."""
    step, found = jax.jit(tx.update), []
    for scale in np.float32(scales):
        grads = jax.tree.map(lambda p, s=scale: 5 * s * jnp.sin(p), params)
        updates, state = step(grads, state, params)
        found.append(updates)
    return found, state


def assert_equal(found, expected, tolerance=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for pair in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(*pair, tolerance)


# --- Each way: (the state, one like it, a path) to the state that is read back.


def by_pickle(state, like, path):
    path.write_bytes(pickle.dumps(jax.device_get(state)))
    return pickle.loads(path.read_bytes())


def by_bytes(state, like, path):
    path.write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(like, path.read_bytes())


def by_flat_dict(state, like, path, sep=None):
    """As converters do that know dictionaries of arrays only: they lose empty ones."""
    nested = flax.serialization.to_state_dict(state)
    flat = flax.traverse_util.flatten_dict(nested, sep=sep)
    read = flax.traverse_util.unflatten_dict(flat, sep=sep)
    return flax.serialization.from_state_dict(like, with_empty(read, nested))


def with_empty(read, nested):
    """What was read, with what is no entry of a flat dictionary where it was."""
    if not isinstance(nested, dict):
        return nested if read is None else read
    return {name: with_empty((read or {}).get(name), x) for name, x in nested.items()}


def by_nnx(state, like, path):
    """Through the state of Flax NNX, as conversions from Linen to NNX go."""
    nested = flax.serialization.to_state_dict(state)
    nnx_state = nnx.State(jax.tree.map(nnx.Variable, nested))
    flat = dict(nnx.to_flat_state(nnx_state))
    pure = nnx.to_pure_dict(nnx.from_flat_state(flat))
    return flax.serialization.from_state_dict(like, with_empty(pure, nested))


def by_orbax(state, like, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


def by_nothing(state, like, path):
    return state


WAYS = [by_pickle, by_bytes, by_flat_dict, by_nnx, by_orbax]
WAYS.append(functools.partial(by_flat_dict, sep="/"))


@each_optimizer
@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_bit_for_bit(make, way, tmp_path):
    tx = make()
    _, state = train(tx, tx.init(PARAMS), [1, 1.1, 0.9, 100, 1.2])
    restored = way(state, tx.init(PARAMS), tmp_path / "state")
    assert_equal(restored, state)
    scales = [1.3, np.nan, 50, 0.7]
    assert_equal(train(tx, restored, scales), train(tx, state, scales))


@each_optimizer
def test_skip_and_metrics_take_what_is_restored_without_a_target(make, tmp_path):
    tx = make()
    _, state = train(tx, tx.init(PARAMS), [1, 2])
    msgpack = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    restored = by_orbax(state, None, tmp_path / "state")
    expected = metrics(state)
    for found in (flax.serialization.to_state_dict(state), msgpack, restored):
        assert_equal(sorted(metrics(found).values()), sorted(expected.values()))
        if hasattr(state, "inner_state"):
            scales = [1.3, np.nan, 0.7]
            assert_equal(train(tx, found, scales), train(tx, state, scales))
    train_state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    found = metrics(train_state).values()
    assert_equal(sorted(found), sorted(metrics(tx.init(PARAMS)).values()))


@each_optimizer
def test_metrics_of_every_form_of_an_nnx_state(make, tmp_path):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    grads = nnx.grad(lambda model: 100 * jnp.sum(model(jnp.ones((1, 2)))))(model)
    optimizer.update(model, grads)
    expected = metrics(optimizer.opt_state)
    state = nnx.state(optimizer)
    restored = by_orbax(state, None, tmp_path / "state")
    for found in (
        state,
        nnx.to_pure_dict(state),
        nnx.split(optimizer)[1],
        nnx.state(optimizer, nnx.optimizer.OptState),
        restored,
    ):
        assert_equal(sorted(metrics(found).values()), sorted(expected.values()))
    assert_equal(jax.jit(metrics)(state), metrics(state))


# --- Checkpoints written with Optax's clip.


def is_ours(node):
    return isinstance(node, ClipByGlobalNormState)


def adopted(new, old):
    """The recipe of the documentation: an Optax state with our clips in it."""
    return jax.tree.map(lambda n, o: n if is_ours(n) else o, new, old, is_leaf=is_ours)


def returned(ours, optaxs):
    """The way back: our state without our clips."""
    return jax.tree.map(
        lambda our, optax: optax if is_ours(our) else our, ours, optaxs, is_leaf=is_ours
    )


WRAPS = {
    "nested": lambda clip: optax.chain(
        optax.chain(clip(1.0)), optax.sgd(0.1, 0.9), clip(0.1)
    ),
    "MultiSteps": lambda clip: optax.MultiSteps(
        optax.chain(clip(1.0), optax.adam(0.1)), 2
    ),
    "masked": lambda clip: optax.masked(
        optax.chain(clip(1.0), optax.sgd(0.1, 0.9)), {"w": True, "b": False}
    ),
    "partition": lambda clip: optax.partition(
        {"one": optax.chain(clip(1.0), optax.adam(0.1)), "other": clip(0.5)},
        {"w": "one", "b": "other"},
    ),
    "inject_hyperparams": lambda clip: optax.inject_hyperparams(
        lambda rate: optax.chain(clip(1.0), optax.adam(rate))
    )(0.1),
    # Flax writes no OrderedDict, Orbax no state that is nothing but empty.
    "clip alone": lambda clip: clip(1.0),
    "named_chain": lambda clip: optax.named_chain(
        ("clip", clip(1.0)), ("adam", optax.adam(0.1))
    ),
}


@pytest.mark.parametrize("way", [by_nothing, by_bytes, by_orbax])
@pytest.mark.parametrize("name", WRAPS)
def test_optax_checkpoint_goes_on_with_ours_and_back(name, way, tmp_path):
    way = by_nothing if name in ("clip alone", "named_chain") else way
    wrap = WRAPS[name]
    optaxs, ours = wrap(optax.clip_by_global_norm), wrap(clip_by_global_norm)
    _, old = train(optaxs, optaxs.init(PARAMS), [1.0, 0.1, 2.0])
    old = way(old, optaxs.init(PARAMS), tmp_path / "old")

    state = adopted(ours.init(PARAMS), old)
    assert jax.tree.structure(state) == jax.tree.structure(ours.init(PARAMS))
    found, state = train(ours, state, [1.5, 0.05, 3.0])
    expected, expected_state = train(optaxs, old, [1.5, 0.05, 3.0])
    assert_equal(found, expected, 1e-5)

    state = way(state, ours.init(PARAMS), tmp_path / "new")
    state = returned(state, optaxs.init(PARAMS))
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    found, _ = train(optaxs, state, [0.7, 2.0])
    assert_equal(found, train(optaxs, expected_state, [0.7, 2.0])[0], 1e-5)
