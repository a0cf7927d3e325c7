"""skip_by_global_norm: what is skipped, and that nothing knows of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    skip_by_global_norm,
    zscore_threshold,
)

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(4)}
GRADS = oracle.normals({"w": (2, 3), "b": (4,)})
NORM = oracle.norm(GRADS)


def scaled(scale):
    return jax.tree.map(lambda g: g * jnp.float32(scale), GRADS)


def assert_same(found, expected, tolerance=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for leaves in pairs:
        is_key = jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key)
        leaves = map(jax.random.key_data, leaves) if is_key else leaves
        np.testing.assert_allclose(*leaves, tolerance)


def run(tx, scales, state=None):
    """Updates and states after each step, with gradients scaled so."""
    state = tx.init(PARAMS) if state is None else state
    history = []
    for scale in scales:
        updates, state = tx.update(scaled(scale), state, PARAMS)
        history.append((updates, state))
    return history


def skips(tx, scales):
    return [bool(state.num_consecutive_skips) for _, state in run(tx, scales)]


INNERS = {
    "adamw": lambda: optax.adamw(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "clip and adam": lambda: optax.chain(clip_by_global_norm(1.0), optax.adam(0.1)),
    "schedule": lambda: optax.sgd(optax.linear_schedule(1.0, 0.1, 3)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "adafactor": lambda: optax.adafactor(0.1),
    "accumulation": lambda: optax.MultiSteps(
        optax.adam(0.1), 2
    ).gradient_transformation(),
}


@pytest.mark.parametrize(
    "inner",
    ["clip and adam", "noise", "accumulation"]
    + [
        pytest.param(inner, marks=pytest.mark.slow)
        for inner in ("adamw", "momentum", "schedule", "adafactor")
    ],
)
@pytest.mark.parametrize(
    "bad",
    [100.0, np.nan]
    + [pytest.param(bad, marks=pytest.mark.slow) for bad in (1e38, np.inf)],
)
@pytest.mark.usefixtures("optax_promotes")
def test_skipped_step_leaves_no_trace(inner, bad):
    tx = skip_by_global_norm(INNERS[inner](), 3 * NORM)
    plain = jax.jit(INNERS[inner]().update)
    (updates, state), *_ = run(tx, [1])
    zeros, skipped = run(tx, [bad], state)[-1]
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zeros))
    assert_same(skipped.inner_state, state.inner_state)
    assert (skipped.num_updates, skipped.num_skipped) == (2, 1)

    inner_state = INNERS[inner]().init(PARAMS)
    for scale, i in ((1, 0), (2, 3)):
        expected, inner_state = plain(scaled(scale), inner_state, PARAMS)
        updates, state = run(tx, [1, bad, bad, 2])[i]
        assert_same((updates, state.inner_state), (expected, inner_state), 1e-6)


@pytest.mark.usefixtures("optax_promotes")
def test_step_taken_is_that_of_the_inner_bit_for_bit():
    inner = optax.adamw(0.1)
    tx = skip_by_global_norm(inner, 2 * NORM)
    expected = inner.update(GRADS, inner.init(PARAMS), PARAMS)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert_same((updates, state.inner_state), expected)


def test_norm_at_the_threshold_is_taken():
    tx = skip_by_global_norm(optax.sgd(1.0), 5.0)
    for grads, taken in (
        ([3.0, 4.0], True),
        ([3.0, np.nextafter(4, 5, dtype="f4")], False),
    ):
        updates, state = tx.update(jnp.array(grads), tx.init(None))
        assert bool(updates.any()) == taken
        assert bool(state.num_skipped) == (not taken)


def test_none_skips_what_is_not_finite_only():
    tx = skip_by_global_norm(optax.sgd(1.0))
    assert skips(tx, [1, 1e30, np.nan, np.inf, 1]) == [False, False, True, True, False]
    assert run(tx, [1])[-1][1].threshold == np.inf


def test_finite_entries_whose_norm_overflows():
    big = {"w": jnp.full((2, 3), 3e38), "b": jnp.full(4, 3e38)}
    for max_norm, taken in ((1e38, False), (None, True)):
        tx = skip_by_global_norm(optax.scale(0.5), max_norm)
        updates, _ = tx.update(big, tx.init(PARAMS))
        assert bool(updates["w"].all()) == taken


@pytest.mark.usefixtures("optax_promotes")
def test_schedule_counts_skipped_steps_too():
    schedule = optax.piecewise_constant_schedule(2 * NORM, {2: 10.0})
    tx = skip_by_global_norm(optax.sgd(1.0), schedule)
    assert skips(tx, [5, 5, 5, 5]) == [True, True, False, False]


def test_threshold_sees_the_norms_of_skipped_steps_but_no_nan():
    last = Threshold(
        init=lambda: jnp.float32(np.inf),
        update=lambda norm, last, count: (2 * last, norm),
    )
    tx = skip_by_global_norm(optax.sgd(1.0), last)
    found = [float(s.threshold) for _, s in run(tx, [1, 10, np.nan, np.inf, 1])]
    expected = np.array([np.inf, 2, 20, 20, 20]) * NORM
    np.testing.assert_allclose(found, expected, 1e-6)


@pytest.mark.parametrize(
    ("limit", "scales", "expected"),
    [
        (None, [9] * 5, "sssss"),
        (2, [9] * 7, "sstssts"),
        (0, [9, 9, np.nan, 9], "ttst"),
        (2, [np.nan] * 5, "sssss"),
        # However many were skipped before it, one that is finite is let through.
        (2, [np.nan, np.nan, np.nan, 9, 9], "sssts"),
        (2, [9, 1, 9, 9, 9], "stsst"),
    ],
)
def test_max_consecutive_skips(limit, scales, expected):
    tx = skip_by_global_norm(optax.sgd(1.0), 2 * NORM, max_consecutive_skips=limit)
    assert "".join("ts"[skip] for skip in skips(tx, scales)) == expected


@pytest.mark.parametrize("threshold", [-1.0, np.nan])
def test_traced_threshold_that_is_no_norm_skips(threshold):
    @jax.jit
    def update(max_norm):
        tx = skip_by_global_norm(optax.sgd(1.0), max_norm)
        return tx.update(GRADS, tx.init(PARAMS))

    updates, state = update(threshold)
    assert not updates["w"].any()
    assert state.num_skipped == 1


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"inner": 1.0}, TypeError, "inner=1.0 .*optimizer first"),
        ({"max_norm": -1.0}, ValueError, "max_norm=-1.0"),
        ({"max_norm": "1"}, TypeError, "max_norm='1'"),
        ({"ord": 0.5}, ValueError, "ord=0.5"),
        ({"max_consecutive_skips": -1}, ValueError, "max_consecutive_skips=-1"),
        ({"max_consecutive_skips": 1.5}, ValueError, "max_consecutive_skips=1.5"),
    ],
)
def test_errors(options, error, match):
    with pytest.raises(error, match=match):
        skip_by_global_norm(**{"inner": optax.sgd(1.0)} | options)


def test_extra_args_reach_the_inner():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = skip_by_global_norm(optax.chain(inner, optax.scale(1.0)), 2 * NORM)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=2.0)
    np.testing.assert_array_equal(updates["b"], 2 * GRADS["b"])


def test_norm_given_is_used_here_and_inside():
    tx = skip_by_global_norm(clip_by_global_norm(1.0), 100.0)
    updates, state = tx.update(GRADS, tx.init(PARAMS), use_norm=50.0)
    np.testing.assert_allclose(updates["b"], GRADS["b"] / 50, 1e-6)
    assert state.global_norm == state.inner_state.global_norm == 50
    _, state = tx.update(GRADS, state, use_norm=150.0)
    assert (state.num_skipped, state.inner_state.num_updates) == (1, 1)


def test_trees_with_none_masked_and_float0():
    grads = {
        "w": np.float32([3, 4]),
        "frozen": None,
        "masked": optax.MaskedNode(),
        "steps": np.zeros((), jax.dtypes.float0),
        "scalar": 0.0,
    }
    tx = skip_by_global_norm(clip_by_global_norm(1.0), 6.0)
    for scale, expected in ((1, [0.6, 0.8]), (2, [0, 0])):
        updates, _ = tx.update(grads | {"w": scale * grads["w"]}, tx.init(grads))
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        np.testing.assert_allclose(updates["w"], expected, 1e-6)
        assert updates["steps"].dtype == jax.dtypes.float0


def test_typed_keys_in_the_inner_state():
    def update(updates, key, params=None):
        key, own = jax.random.split(key)
        return updates + jax.random.normal(own, updates.shape), key

    inner = optax.GradientTransformation(lambda _: jax.random.key(0), update)
    tx = skip_by_global_norm(inner, 10.0)
    state = tx.init(None)
    _, skipped = tx.update(jnp.full(3, 99.0), state)
    _, taken = tx.update(jnp.ones(3), state)
    assert skipped.inner_state == state.inner_state
    assert taken.inner_state != state.inner_state


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0.5), (9.0, 0.0)])
def test_gradient_is_that_of_the_inner_or_zero(scale, expected):
    tx = skip_by_global_norm(optax.scale(0.5), 2 * NORM)

    def total(grads):
        updates, _ = tx.update(grads, tx.init(PARAMS))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates))

    slopes = jax.grad(total)(scaled(scale))
    np.testing.assert_array_equal(slopes["w"], np.full((2, 3), expected))


def test_state_may_hold_python_numbers():
    count = optax.GradientTransformation(
        lambda params: {"steps": 0}, lambda g, state, p: (g, {"steps": 5})
    )
    tx = skip_by_global_norm(count, 1e3 * NORM)
    state = tx.init(PARAMS)._replace(num_updates=7)
    taken, skipped = (tx.update(scaled(s), state)[1] for s in (1.0, np.nan))
    assert (taken.num_updates, taken.inner_state["steps"]) == (8, 5)
    assert (skipped.num_updates, skipped.inner_state["steps"]) == (8, 0)


def test_vmap_skips_each_example_by_itself():
    tx = skip_by_global_norm(clip_by_global_norm(1.0), 2 * NORM)
    batch = jax.tree.map(lambda g: jnp.stack([g, 9 * g, g * jnp.nan]), GRADS)
    states = jax.vmap(tx.init)(batch)
    updates, states = jax.vmap(tx.update)(batch, states)
    np.testing.assert_array_equal(states.num_skipped, [0, 1, 1])
    np.testing.assert_array_equal(states.inner_state.num_updates, [1, 0, 0])
    np.testing.assert_allclose(updates["b"][0], GRADS["b"] / NORM, 1e-6)
    assert not updates["b"][1:].any()


# --- The norm is measured once.


def num_measured(tx, grads=GRADS):
    """How many reductions over a leaf there are in the traced update."""
    jaxpr = jax.make_jaxpr(tx.update)(grads, tx.init(grads), grads)
    sums = [
        e for e in oracle.equations(jaxpr.jaxpr) if e.primitive.name == "reduce_sum"
    ]
    return len(sums)


def guarded(*inner):
    return skip_by_global_norm(optax.chain(*inner), zscore_threshold(6.0))


def test_norm_is_measured_once():
    clip = clip_by_global_norm(1.0)
    once = num_measured(clip)
    assert once > 0
    assert num_measured(guarded(clip, optax.sgd(1.0))) == once
    assert (
        num_measured(guarded(optax.chain(optax.masked(clip, {"w": True, "b": True}))))
        == once
    )
    assert num_measured(skip_by_global_norm(guarded(clip), 1.0)) == once


def test_norm_is_measured_again_where_it_is_another():
    clip = clip_by_global_norm(1.0)
    once = num_measured(clip)
    assert num_measured(guarded(optax.scale(2.0), clip)) == 2 * once
    assert num_measured(guarded(clip_by_global_norm(1.0, ord=1))) > once
    chain = optax.chain(optax.scale(2.0), clip)
    tx = skip_by_global_norm(chain, 100.0)
    updates, state = tx.update(GRADS, tx.init(PARAMS))
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-6)
    np.testing.assert_allclose(state.inner_state[1].global_norm, 2 * NORM, 1e-6)
    masked = skip_by_global_norm(optax.masked(clip, {"w": True, "b": False}), 100.0)
    updates, _ = masked.update(GRADS, masked.init(PARAMS))
    np.testing.assert_allclose(oracle.norm(updates["w"]), 1, 1e-6)


@pytest.mark.usefixtures("optax_promotes")
def test_compiled_step_reduces_no_more_than_the_clip_alone():
    def reductions(tx):
        step = jax.jit(tx.update)
        text = step.lower(GRADS, tx.init(PARAMS), PARAMS).compile().as_text()
        return len(re.findall(r" reduce\(", text))

    clip = clip_by_global_norm(1.0)
    plain = optax.chain(clip, optax.adamw(1e-3))
    assert reductions(guarded(clip, optax.adamw(1e-3))) == reductions(plain) > 0
