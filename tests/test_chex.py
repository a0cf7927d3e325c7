"""chex, where it helps: traces counted, checks raised, dataclasses clipped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_globalclip import clip_by_global_norm, clip_updates, metrics


@chex.dataclass
class Params:
    """A tree as users of chex have it."""

    w: chex.Array
    b: chex.Array


GRADS = Params(w=jnp.array([3.0, 0.0]), b=jnp.array([4.0]))


def test_dataclass_stays_one():
    clipped, norm = clip_updates(GRADS, 1.0)
    assert norm == 5
    chex.assert_trees_all_close(
        clipped, Params(w=np.float32([0.6, 0]), b=np.float32([0.8])), rtol=1e-6
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, GRADS)


@pytest.mark.usefixtures("optax_promotes")
def test_training_step_is_traced_once():
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
