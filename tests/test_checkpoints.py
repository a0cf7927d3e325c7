"""All states survive a checkpoint, and training goes on bit for bit."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint
import pytest

from optax_globalclip import (
    clip_by_global_norm,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = pytest.mark.slow

clip = functools.partial(clip_by_global_norm, nonfinite="zero")
OPTIMIZERS = {
    "number": lambda: optax.chain(clip(1.0), optax.adamw(0.1)),
    "z-score": lambda: optax.chain(
        clip(zscore_threshold(warmup_steps=2)), optax.adamw(0.1)
    ),
    "quantile": lambda: optax.chain(
        clip(quantile_threshold(0.5, window=4, warmup_steps=2)),
        optax.adamw(0.1),
    ),
    "skip": lambda: skip_by_global_norm(
        optax.chain(clip(1.0), optax.adamw(0.1)),
        zscore_threshold(6.0, warmup_steps=2),
        max_consecutive_skips=3,
    ),
}


def by_pickle(state, like, path):
    path.write_bytes(pickle.dumps(jax.device_get(state)))
    return pickle.loads(path.read_bytes())


def by_flax(state, like, path):
    path.write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(like, path.read_bytes())


def by_orbax(state, like, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


@pytest.mark.parametrize(
    "optimizer",
    ["quantile", "skip"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("number", "z-score")],
)
@pytest.mark.parametrize("restored_by", [by_pickle, by_flax, by_orbax])
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_goes_on_bit_for_bit(optimizer, restored_by, tmp_path):
    tx = OPTIMIZERS[optimizer]()
    params = oracle.normals({"w": (3, 4), "b": (4,)})

    @jax.jit
    def step(params, state, scale):
        grads = jax.tree.map(lambda p: scale * jnp.sin(p), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(params, state, scales):
        for scale in np.float32(scales):
            params, state = step(params, state, scale)
        return params, state

    params, state = train(params, tx.init(params), [1, 1.1, 0.9, 100, 1.2])
    restored = restored_by(state, tx.init(params), tmp_path / "state")
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)

    scales = [1.3, np.nan, 50, 0.7]
    expected, found = (train(params, each, scales) for each in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.isfinite(found[0]["w"]).all()
