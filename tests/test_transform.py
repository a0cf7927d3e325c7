"""clip_by_global_norm: its state, from init on, and what update makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify

from optax_globalclip import ClipByGlobalNormState, clip_by_global_norm

GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}


def scaled(scale):
    return jax.tree.map(lambda g: g * scale, GRADS)


def test_state_before_the_first_update():
    state = clip_by_global_norm(1.0).init(GRADS)
    assert state == ClipByGlobalNormState(0, 1, jnp.inf, 0, 0, 0, None)  # pyright: ignore
    dtypes = [leaf.dtype.name for leaf in jax.tree.leaves(state)]
    assert dtypes == ["float32"] * 3 + ["int32"] * 3
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_state_after_updates():
    tx = clip_by_global_norm(1.0)
    state = tx.init(GRADS)
    for scale in (1, 0.1, np.inf, 2):
        updates, state = tx.update(scaled(scale), state)
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-6)
    expected = (10, 0.1, 1, 4, 2, 1)
    np.testing.assert_allclose(state[:-1], expected, 1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_updates_are_counted_whatever_becomes_of_them(bad):
    for options in ({"max_norm": None}, {"max_norm": 1.0, "nonfinite": "zero"}):
        tx = clip_by_global_norm(**options)
        updates, state = tx.update(scaled(bad), None)
        assert (state.num_nonfinite, state.num_clipped, state.num_updates) == (1, 0, 1)
        assert not np.isfinite(state.global_norm)
        if options["max_norm"] is None:
            np.testing.assert_array_equal(updates["b"], GRADS["b"] * bad)
        else:
            assert not updates["b"].any()


def test_error_policy_raises_and_names_what_to_do():
    tx = clip_by_global_norm(1.0, nonfinite="error")
    step = checkify.checkify(jax.jit(tx.update))
    error, _ = step(scaled(np.nan), tx.init(GRADS))
    with pytest.raises(checkify.JaxRuntimeError, match="leaf_norms tells which"):
        error.throw()
    error, (updates, _) = step(GRADS, tx.init(GRADS))
    error.throw()
    np.testing.assert_allclose(updates["b"], 0.8, 1e-6)


@pytest.mark.parametrize("state", [None, optax.EmptyState()])
@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_no_state_stands_for_the_one_before_any_update(state, compile):
    tx = clip_by_global_norm(1.0)
    _, expected = tx.update(GRADS, tx.init(GRADS))
    _, found = compile(tx.update)(GRADS, state)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)


def test_counters_saturate():
    tx = clip_by_global_norm(1.0)
    last = jnp.int32(2**31 - 1)
    state = tx.init(GRADS)._replace(num_updates=last, num_clipped=last)
    _, state = tx.update(GRADS, state)
    assert (state.num_updates, state.num_clipped) == (last, last)


def test_use_norm_is_an_extra_argument_through_a_chain():
    tx = optax.chain(clip_by_global_norm(1.0), optax.scale(1.0))
    updates, state = tx.update(GRADS, tx.init(GRADS), use_norm=jnp.float32(10))
    np.testing.assert_allclose(updates["b"], 0.4, 1e-6)
    assert optax.tree.get(state, "global_norm") == 10


def test_state_is_float32_where_the_norm_is_float64():
    with jax.enable_x64(True):
        tx = clip_by_global_norm(0.3)
        tree = [np.array([0.1, 0.2, 0.9])]
        updates, state = tx.update(tree, tx.init(tree))
        np.testing.assert_allclose(updates[0], oracle.clipped(tree, 0.3)[0], 1e-15)
        assert state.global_norm.dtype == jnp.float32


def test_drop_in_for_optax():
    ours, theirs = clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    tree = oracle.normals([(50,), (3, 4)])
    expected, _ = theirs.update(tree, theirs.init(tree))
    found, _ = ours.update(tree, ours.init(tree))
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, 1e-6)


def test_one_program_outside_jit_and_none_on_later_calls():
    tree = oracle.normals([(11,), (3, 5), (2,)])
    tx = clip_by_global_norm(1.0)
    state = tx.init(tree)
    with oracle.compilations() as first:
        updates, state = tx.update(tree, state)
    assert len(first) == 1
    with oracle.compilations() as later:
        tx.update(updates, state)
        clip_by_global_norm(2.0).update(tree, state)
    assert not later
