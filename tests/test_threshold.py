"""Thresholds: constants, schedules, and a user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_globalclip import Threshold, clip_by_global_norm, zscore_threshold

GRADS = {"w": jnp.array([3.0, 4.0])}

# Twice the norm of the step before: a threshold with a memory, which starts at inf.
LAST_NORM_TWICE = Threshold(
    init=lambda: jnp.float32(jnp.inf),
    update=lambda norm, last, count: (2 * last, norm),
)


def thresholds_of(tx, scales):
    state, thresholds = tx.init(GRADS), []
    for scale in scales:
        _, state = tx.update(jax.tree.map(lambda g, s=scale: g * s, GRADS), state)
        thresholds.append(float(state.threshold))
    return thresholds


def test_constant():
    assert thresholds_of(clip_by_global_norm(2.5), [1, 2, 3]) == [2.5] * 3
    assert thresholds_of(clip_by_global_norm(jnp.array(2)), [1, 2]) == [2, 2]


def test_schedule_is_called_with_the_number_of_updates_before():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    tx = clip_by_global_norm(schedule)
    assert thresholds_of(tx, [1] * 5) == [1, 0.75, 0.5, 0.25, 0]


def test_schedule_that_ends_at_zero_gives_zeros():
    tx = clip_by_global_norm(optax.linear_schedule(1.0, -1.0, 2))
    updates, state = GRADS, tx.init(GRADS)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(GRADS, state)
    np.testing.assert_array_equal(updates["w"], [0, 0])
    assert state.threshold == 0


def test_schedule_that_returns_a_negative_number_is_named():
    tx = clip_by_global_norm(lambda count: -1.0)
    with pytest.raises(ValueError, match="the threshold=-1.0"):
        tx.update(GRADS, None)


def test_none_never_clips():
    tx = clip_by_global_norm(None)
    updates, state = tx.update(GRADS, None)
    assert updates["w"] is not None
    np.testing.assert_array_equal(updates["w"], GRADS["w"])
    assert (state.global_norm, state.clip_scale, state.threshold) == (5, 1, jnp.inf)


def test_own_threshold_sees_the_norm_before_the_clip():
    tx = clip_by_global_norm(LAST_NORM_TWICE)
    assert thresholds_of(tx, [1, 1, 10, 1]) == [np.inf, 10, 10, 100]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_norms_do_not_enter_its_history(bad):
    tx = clip_by_global_norm(LAST_NORM_TWICE, nonfinite="zero")
    assert thresholds_of(tx, [1, bad, bad, 1]) == [np.inf, 10, 10, 10]


@pytest.mark.parametrize("bad", ["1.0", [1.0], 1j, object()])
def test_max_norm_of_the_wrong_type(bad):
    with pytest.raises(TypeError, match="max_norm=.*real number"):
        clip_by_global_norm(bad)


@pytest.mark.parametrize("bad", [-1, -0.5, np.nan, np.array(-1.0)])
def test_max_norm_out_of_range(bad):
    with pytest.raises(ValueError, match="max_norm=.*at least 0"):
        clip_by_global_norm(bad)


@pytest.mark.parametrize("nothing", [None, (), [], {}], ids=repr)
def test_threshold_state_without_leaves_is_that_before_the_first_update(nothing):
    """As a clip by a number keeps it, now (None) or in an older checkpoint."""
    tx = clip_by_global_norm(zscore_threshold())
    fresh = tx.init(None)
    updates = [jnp.array([3.0, 4.0])]
    _, expected = tx.update(updates, fresh)
    _, found = tx.update(updates, fresh._replace(threshold_state=nothing))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
