"""Long runs: a million steps, and ten thousand calls, leave everything as it should be.

The default suite runs the same tests for fewer steps.
"""

import collections
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    clip_updates,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = pytest.mark.slow

Z, DECAY, WARMUP, WINDOW, Q = 4.0, 0.97, 25, 50, 0.9
slow = pytest.mark.slow
steps = pytest.mark.parametrize("steps", [20_000, pytest.param(10**6, marks=slow)])


def stream(steps):
    """Norms near 1, of which one in 500 is a spike and one in 100 inf or NaN.

    None lies so near the threshold of the z-score that float32 could judge otherwise
    than float64.
    """
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.9, 1.1, steps).astype(np.float32)
    spikes, bad = rng.random(steps) < 0.002, rng.random(steps) < 0.01
    norms[spikes] *= rng.uniform(5, 500, spikes.sum()).astype(np.float32)
    norms[bad] = rng.choice([np.nan, np.inf], bad.sum())
    norms[:WARMUP] = 1 + 0.1 * np.float32((-1) ** np.arange(WARMUP))
    return norms


def run(tx, norms):
    """The state after one update for each norm, and the thresholds."""

    @jax.jit
    def scan(state, norms):
        def step(state, norm):
            _, state = tx.update({"w": norm}, state)
            return state, state.threshold

        return jax.lax.scan(step, state, norms)

    state = tx.init({"w": jnp.float32(0)})
    compiled = scan.lower(state, norms).compile()
    before = live_bytes()
    state, thresholds = jax.device_get(compiled(state, norms))
    gc.collect()
    assert live_bytes() <= before
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**16 + 2 * norms.nbytes
    return state, thresholds


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def zscore_thresholds(norms):
    """ZClip's recurrence in float64. The warm-up never begins again on such norms."""
    mean = square = std = 0.0
    seen, found = 0, []
    for norm in norms.astype(np.float64).tolist():
        threshold = mean + Z * std if seen >= WARMUP else np.inf
        if norm > threshold and norm < np.inf:
            threshold = mean + Z**2 / ((norm - mean) / std) * std
        # No finite norm is above the threshold otherwise; inf and NaN change nothing.
        found.append(threshold)
        if not np.isfinite(norm):
            continue
        seen += 1
        if seen <= WARMUP:
            mean += (norm - mean) / seen
            square += norm**2
            std = max(square / seen - mean**2, 0.0) ** 0.5
        else:
            kept = min(norm, threshold)
            mean = DECAY * mean + (1 - DECAY) * kept
            std = (DECAY * std**2 + (1 - DECAY) * (kept - mean) ** 2) ** 0.5
    return np.array(found)


def quantile_thresholds(norms):
    """The quantile of the last finite norms before and at each step, in float64."""
    finite = np.isfinite(norms)
    seen = np.cumsum(finite)
    padded = np.concatenate([np.full(WINDOW - 1, np.nan), norms[finite]])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
    of_window = np.concatenate(
        [
            np.nanquantile(windows[i : i + 10**4].astype(np.float64), Q, axis=1)
            for i in range(0, len(windows), 10**4)
        ]
    )
    judged = seen - finite >= WARMUP
    return np.where(judged, of_window[np.maximum(seen - 1, 0)], np.inf)


ADAPTIVE = {
    "z-score": (
        lambda: zscore_threshold(Z, decay=DECAY, warmup_steps=WARMUP),
        zscore_thresholds,
    ),
    "quantile": (
        lambda: quantile_threshold(Q, window=WINDOW, warmup_steps=WARMUP),
        quantile_thresholds,
    ),
}


@steps
@pytest.mark.parametrize("name", ADAPTIVE)
def test_thresholds_and_counters_of_a_clip(name, steps):
    make, recurrence = ADAPTIVE[name]
    norms = stream(steps)
    state, thresholds = run(clip_by_global_norm(make(), nonfinite="zero"), norms)
    expected = recurrence(norms)
    np.testing.assert_allclose(thresholds, expected, 2e-5)
    finite = np.isfinite(norms)
    assert state.num_updates == steps
    assert state.num_nonfinite == np.sum(~finite)
    assert state.num_clipped == np.sum(norms[finite] > thresholds[finite])
    assert state.threshold_state.num_norms == np.sum(finite)
    if name == "z-score":
        assert state.num_clipped == np.sum(norms[finite][WARMUP:] > 2)
        assert state.threshold_state.spike_sum < 10
    else:
        np.testing.assert_array_equal(
            state.threshold_state.recent_norms, norms[finite][-WINDOW:]
        )


@steps
def test_counters_and_moments_of_a_skip(steps):
    norms = stream(steps)
    norms[[-4, -1]] = np.nan, 100
    tx = skip_by_global_norm(optax.trace(0.5), ADAPTIVE["z-score"][0]())
    state, _ = run(tx, norms)
    taken = norms < 2
    assert state.num_updates == steps
    assert state.num_skipped == np.sum(~taken)
    last = np.float64(norms[taken][-60:])
    trace = np.sum(last * 0.5 ** np.arange(59, -1, -1))
    np.testing.assert_allclose(state.inner_state.trace["w"], trace, 1e-6)


def test_counters_saturate_and_all_goes_on():
    """As after 2^31 steps, of which nobody waits for the end."""
    tx = clip_by_global_norm(ADAPTIVE["z-score"][0](), nonfinite="zero")
    state, _ = run(tx, stream(1000))
    last = np.int32(2**31 - 1)
    own = state.threshold_state._replace(num_norms=last)
    state = state._replace(num_updates=last, num_clipped=last, threshold_state=own)
    for norm, clipped in ((1.0, 1.0), (100.0, None), (1.0, 1.0)):
        updates, state = tx.update({"w": jnp.float32(norm)}, state)
        expected = state.threshold if clipped is None else clipped
        np.testing.assert_allclose(updates["w"], expected, 1e-6)
        assert (state.num_updates, state.num_clipped) == (last, last)
        assert state.threshold_state.num_norms == last


# --- Calls outside jit, each with objects of its own.

SHAPES = {"a": (3, 4), "b": [(5,), ()]}


def fresh_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


class Base:
    """What a function of the user's closes over."""

    def __init__(self, value):
        self.value = value


def by_schedule(i, base):
    return clip_by_global_norm(lambda count: base.value + count)


def by_optax_schedule(i, base):
    del base
    return clip_by_global_norm(optax.linear_schedule(1.0, 2.0 + i, 10))


def by_threshold(i, base):
    return clip_by_global_norm(
        Threshold(
            lambda: jnp.float32(base.value),
            lambda norm, state, count: (2 * state, norm),
        )
    )


def by_number(i, base):
    return clip_by_global_norm(base.value)


def by_zscore(i, base):
    return clip_by_global_norm(zscore_threshold(base.value, decay=1 / (2 + i)))


def by_quantile(i, base):
    return clip_by_global_norm(quantile_threshold(1 / (1 + i), window=7))


def by_skip(i, base):
    return skip_by_global_norm(optax.trace(0.5), lambda count: base.value)


MAKERS = [
    by_schedule,
    by_optax_schedule,
    by_threshold,
    by_number,
    by_zscore,
    by_quantile,
    by_skip,
]


def call(i, bases):
    """One update and one clip of a fresh tree, with fresh functions and numbers."""
    base = Base(1.0 + i / 7)
    bases.append(weakref.ref(base))
    tree = fresh_tree(i)
    tx = MAKERS[i % len(MAKERS)](i, base)
    state = tx.init(tree)
    for _ in range(2):
        _, state = tx.update(tree, state)
    clipped, _ = clip_updates(tree, base.value, use_norm=2.0 + i)
    for found, wide in zip(*map(jax.tree.leaves, (clipped, tree)), strict=True):
        expected = np.float64(wide) * min(1, base.value / (2 + i))
        np.testing.assert_allclose(found, expected, 1e-5)


def objects():
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.parametrize("calls", [300, pytest.param(10_000, marks=slow)])
def test_calls_with_fresh_objects_keep_nothing(calls, optax_promotes):
    bases = collections.deque(maxlen=50)
    for i in range(10 * len(MAKERS)):
        call(i, bases)
    before, arrays = objects(), len(jax.live_arrays())
    with oracle.compilations() as compiled:
        for i in range(calls):
            call(i, bases)
    assert not compiled
    assert objects() - before < calls / 10
    assert len(jax.live_arrays()) <= arrays
    assert not [base for base in bases if base() is not None]
