"""Thresholds that follow the norms free themselves, whatever the norms did before."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from optax_globalclip import (
    clip_by_global_norm,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

RECORDED = np.load(
    pathlib.Path(__file__).parent.parent / "studies/results/spikes-norms.npy"
)


# --- The oracle: ZClip in float64, and the two departures from it.


def patience(decay, warmup_steps):
    """How many norms must be spikes in a row to begin the warm-up again."""
    # As in float32: at a count of 21, it matters if 2 / 0.1 is 20 or a little more.
    span = float(np.float32(2) / np.float32(1 - decay))
    return max(warmup_steps, 1) + min(span, 2_000)


def zclip(norms, z, decay, warmup_steps, *, departs):
    """Yields each norm's threshold, and whether the warm-up then starts again.

    Algorithm 1 of ZClip (arXiv 2504.02507) with the reciprocal threshold. With
    ``departs``: (1) no norm is a spike if the variance is zero; (2) each spike adds
    1 to a count, each other norm takes ``1 / z**2`` off it, and at ``patience`` all is
    forgotten.
    """
    warmup = max(warmup_steps, 1)
    limit = patience(decay, warmup_steps)
    relief = 1 / z**2 if z else math.inf
    first, mean, variance, count = [], None, None, 0.0
    for norm in map(float, norms):
        finite = math.isfinite(norm)
        if mean is None:
            yield math.inf, False
            first += [norm] if finite else []
            if len(first) == warmup:
                mean, variance = np.mean(first), np.var(first)
            continue
        threshold, std = mean + z * math.sqrt(variance), math.sqrt(variance)
        spike = finite and norm > threshold
        if std == 0 and spike and departs:
            threshold, spike = math.inf, False
        elif spike:
            threshold = mean + z**2 / ((norm - mean) / std) * std if std else mean
        if finite and departs:
            count = count + 1 if spike else max(count - relief, 0)
        restarts = departs and count >= limit
        yield threshold, restarts
        if restarts:
            first, mean, variance, count = [], None, None, 0.0
        elif finite:
            norm = min(norm, threshold)
            mean = decay * mean + (1 - decay) * norm
            variance = decay * variance + (1 - decay) * (norm - mean) ** 2


def oracle_thresholds(norms, z, decay, warmup_steps, *, departs=True):
    steps = zclip(norms, z, decay, warmup_steps, departs=departs)
    return np.array([threshold for threshold, _ in steps])


def oracle_restarts(norms, z, decay, warmup_steps):
    steps = zclip(norms, z, decay, warmup_steps, departs=True)
    return [i for i, (_, restarts) in enumerate(steps) if restarts]


@functools.lru_cache
def scanned(z, decay, warmup_steps):
    """A compiled function from norms of shape [steps] to thresholds."""
    threshold = zscore_threshold(z, decay=decay, warmup_steps=warmup_steps)

    def step(state, norm):
        found, state = threshold.update(norm, state, jnp.int32(0))
        return state, found

    return jax.jit(lambda norms: jax.lax.scan(step, threshold.init(), norms)[1])


def thresholds_of(norms, z, decay, warmup_steps):
    return np.asarray(scanned(z, decay, warmup_steps)(np.float32(norms)))


def noisy(level, steps, noise=0.05, seed=0):
    """Norms around a level, normally distributed."""
    rng = np.random.default_rng(seed)
    return np.float32(level * np.abs(1 + noise * rng.standard_normal(steps)))


# --- The oracle itself, and where nothing departs.

ORDINARY = [(2.5, 0.97, 25), (6.0, 0.99, 300), (2.5, 0.999, 25), (4.0, 0.9, 50)]


@pytest.mark.parametrize("parameters", ORDINARY, ids=str)
def test_recorded_norms_are_judged_as_by_the_oracle(parameters):
    expected = oracle_thresholds(RECORDED, *parameters)
    np.testing.assert_allclose(thresholds_of(RECORDED, *parameters), expected, 1e-5)


@pytest.mark.parametrize("parameters", ORDINARY, ids=str)
def test_recorded_norms_are_judged_as_by_zclip(parameters):
    plain = oracle_thresholds(RECORDED, *parameters, departs=False)
    np.testing.assert_allclose(thresholds_of(RECORDED, *parameters), plain, 1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_isolated_spikes_never_start_the_warmup_again(share, seed):
    rng = np.random.default_rng(seed)
    norms = noisy(1.0, 5_000, noise=0.1, seed=seed)
    spikes = (rng.random(5_000) < share) & (np.arange(5_000) >= 25)
    norms = np.where(spikes, norms * 10 ** rng.uniform(0.5, 4, 5_000), norms)
    norms = norms.astype(np.float32)
    assert oracle_restarts(norms, 2.5, 0.97, 25) == []
    plain = oracle_thresholds(norms, 2.5, 0.97, 25, departs=False)
    found = thresholds_of(norms, 2.5, 0.97, 25)
    np.testing.assert_allclose(found, plain, 1e-5)
    assert (found[25:] < norms[25:])[spikes[25:]].all()


# --- Zero variance.

LATER = {
    "noise": noisy(1.0, 400),
    "a level above": noisy(1.001, 400, noise=1e-4),
    "a level far above": noisy(1e6, 400),
    "a level below": noisy(0.1, 400),
    "equal norms": np.full(400, 3.0, np.float32),
    "a ramp": np.linspace(1, 2, 400, dtype=np.float32),
    "zeros": np.zeros(400, np.float32),
}


@pytest.mark.parametrize("later", LATER.values(), ids=LATER)
@pytest.mark.parametrize("first", [0.0, 0.1, 1.0, 1e-30])
@pytest.mark.parametrize(
    "parameters", [(2.5, 0.97, 25), (1.0, 0.5, 1), (6.0, 0.99, 10)], ids=str
)
def test_equal_norms_lock_nothing(parameters, first, later):
    norms = np.concatenate([np.full(100, first, np.float32), later])
    found = thresholds_of(norms, *parameters)
    # All were equal, up to and with the first of the later ones.
    warmup = parameters[2]
    np.testing.assert_array_equal(found[:warmup], np.inf)
    np.testing.assert_allclose(found[warmup:100], first, 1e-5)
    assert found[100] == (np.inf if later[0] > first else found[99])
    wait = math.ceil(patience(*parameters[1:])) + parameters[2]
    freed = found[101 + wait :]
    level = later[1 + wait :]
    assert (freed >= 0.8 * level).mean() >= 0.95


def test_plain_zclip_locks_after_equal_norms():
    """What the first departure is for."""
    norms = np.concatenate([np.zeros(25), noisy(1.0, 400)])
    plain = oracle_thresholds(norms, 2.5, 0.97, 25, departs=False)
    np.testing.assert_array_equal(plain[25:], 0)
    departed = oracle_thresholds(norms, 2.5, 0.97, 25)
    assert (departed[25 + 120 :] >= 0.8).all()


# --- A level that changes for good.

FACTORS = np.float32([1.5, 2, 3, 10, 1e3, 1e6])
STEPS_BEFORE, STEPS_AFTER = 200, 600


def risen(factor, seed=0):
    before = noisy(1.0, STEPS_BEFORE, seed=seed)
    return np.concatenate([before, noisy(factor, STEPS_AFTER, seed=seed + 1)])


def assert_freed(found, level, decay, warmup_steps):
    """After the patience and a warm-up the threshold is at the new level for good."""
    after = found[STEPS_BEFORE:]
    wait = math.ceil(patience(decay, warmup_steps)) + max(warmup_steps, 1) + 2
    assert after[:wait].max() >= 0.8 * level
    assert (after[wait:] >= 0.8 * level).mean() >= 0.9


@pytest.mark.parametrize("warmup_steps", [1, 2, 5, 25, 50])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("z", [0.5, 1.0, 2.5, 6.0])
def test_threshold_follows_a_level_that_rises_for_good(z, decay, warmup_steps):
    for factor in FACTORS:
        found = thresholds_of(risen(factor), z, decay, warmup_steps)
        assert_freed(found, factor, decay, warmup_steps)


def test_plain_zclip_stays_at_the_level_before():
    """What the second departure is for."""
    plain = oracle_thresholds(risen(10.0), 2.5, 0.97, 25, departs=False)
    assert plain[-1] < 3
    assert_freed(oracle_thresholds(risen(10.0), 2.5, 0.97, 25), 10.0, 0.97, 25)


@pytest.mark.parametrize("warmup_steps", [1, 25, 50])
@pytest.mark.parametrize("z", [0.5, 1.0, 2.5, 6.0])
def test_threshold_follows_a_level_that_falls_for_good(z, warmup_steps):
    for factor in 1 / FACTORS[:-1]:
        found = thresholds_of(risen(factor), z, 0.9, warmup_steps)
        assert_freed(found, factor, 0.9, warmup_steps)
        # The least of the last: with a low z the warm-up may be on at the end.
        assert found[-150:].min() < (1 + z) * factor


@pytest.mark.parametrize("z", [2.0, 2.5, 6.0])
@pytest.mark.parametrize("period", [1, 3, 20])
def test_threshold_follows_levels_that_alternate(z, period):
    high = (np.arange(3_000) // period) % 2 == 1
    levels = np.where(high, noisy(10.0, 3_000), noisy(1.0, 3_000, seed=1))
    norms = np.concatenate([noisy(1.0, 100, seed=2), levels.astype(np.float32)])
    found = thresholds_of(norms, z, 0.97, 25)
    clipped = (found < 0.8 * norms)[-1_000:]
    # Cantelli's inequality: no more than this share of any norms lies so far out.
    assert clipped.mean() <= 1 / (1 + z**2)


@pytest.mark.parametrize("factor", [1.2, 2.0, 10.0])
def test_threshold_follows_a_level_that_rises_again_and_again(factor):
    levels = [noisy(factor**i, 250, seed=i) for i in range(12)]
    found = thresholds_of(np.concatenate(levels), 2.5, 0.97, 25)
    for i in range(12):
        late = found[250 * i + 125 : 250 * (i + 1)]
        assert (late >= 0.8 * factor**i).mean() >= 0.9


# --- Any history, against the oracle.

# Powers of two, whose inverse squares add up without rounding.
ZS = st.sampled_from([0.5, 1.0, 2.0, 4.0])
PIECES = st.lists(
    st.tuples(
        st.floats(-3, 3).map(lambda exponent: 10**exponent),
        st.sampled_from([0.01, 0.05, 0.3]),
        st.integers(1, 150),
    ),
    min_size=1,
    max_size=6,
)


@given(
    PIECES,
    ZS,
    st.sampled_from([0.5, 0.9, 0.97]),
    st.sampled_from([0, 1, 3, 25]),
    st.integers(0, 9),
)
def test_any_history_is_judged_as_by_the_oracle(pieces, z, decay, warmup_steps, seed):
    norms = [
        noisy(*piece[::2], noise=piece[1], seed=seed + i)
        for i, piece in enumerate(pieces)
    ]
    norms = np.concatenate(norms)
    # One shape for all, so that all share a program. NaNs change nothing.
    padded = np.pad(norms, (0, 900 - len(norms)), constant_values=np.nan)
    found = thresholds_of(padded, z, decay, warmup_steps)[: len(norms)]
    expected = oracle_thresholds(norms, z, decay, warmup_steps)
    # A float32 standard deviation of what lies far below the mean is its rounding.
    np.testing.assert_allclose(found, expected, 1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_norms_that_are_not_finite_never_count(bad, factor):
    norms = risen(factor)
    where = np.random.default_rng(0).integers(0, len(norms), 300)
    mixed = np.insert(norms, where, np.float32(bad))
    found = thresholds_of(mixed, 2.5, 0.97, 25)[np.isfinite(mixed)]
    np.testing.assert_array_equal(found, thresholds_of(norms, 2.5, 0.97, 25))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_norms_that_are_not_finite_leave_the_state(bad):
    threshold = zscore_threshold(warmup_steps=3)
    state = threshold.init()
    for norm in (1.0, 2.0, 1.5, 50.0, 50.0):
        _, same = threshold.update(jnp.float32(bad), state, jnp.int32(0))
        jax.tree.map(np.testing.assert_array_equal, same, state)
        _, state = threshold.update(jnp.float32(norm), state, jnp.int32(0))


# --- Clips and skips.


def run(tx, norms):
    """The states after each update with a gradient of each norm, stacked."""

    def step(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, (updates[0], state)

    return jax.jit(lambda norms: jax.lax.scan(step, tx.init(None), norms))(norms)[1]


HISTORIES = {
    "zeros first": np.concatenate([np.zeros(25, np.float32), noisy(1.0, 600)]),
    "equal norms first": np.concatenate([np.ones(25, np.float32), noisy(1.1, 600)]),
    "rises by 1.5": risen(1.5),
    "rises by 10": risen(10.0),
    "rises by 1e6": risen(1e6),
    "falls": risen(0.01),
    "equal norms at last": np.concatenate(
        [noisy(1.0, 50), np.full(3_000, 1.05, np.float32)]
    ),
}
each_history = pytest.mark.parametrize("norms", HISTORIES.values(), ids=HISTORIES)


@each_history
@pytest.mark.parametrize("z", [2.5, 6.0])
def test_skip_by_zscore_takes_steps_again(norms, z):
    tx = skip_by_global_norm(optax.identity(), zscore_threshold(z))
    updates, states = run(tx, norms)
    longest = math.ceil(patience(0.97, 25))
    outliers = 0.05 * len(norms)
    assert int(states.num_skipped[-1]) <= longest + outliers
    assert states.num_consecutive_skips.max() <= longest
    assert (np.asarray(updates)[-100:] > 0).mean() >= 0.9


@each_history
def test_clip_by_zscore_passes_norms_again(norms):
    updates, states = run(clip_by_global_norm(zscore_threshold()), norms)
    late = slice(len(norms) - 100, None)
    assert (np.asarray(updates)[late] >= 0.8 * norms[late]).mean() >= 0.9
    assert np.isfinite(updates).all()


@each_history
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 1.0])
def test_clip_by_quantile_follows_the_level(norms, q):
    """The window holds norms as they are: no departure is needed."""
    tx = clip_by_global_norm(quantile_threshold(q, window=100))
    updates, states = run(tx, norms)
    late = slice(len(norms) - 100, None)
    expected = np.quantile(norms[late].astype(np.float64), q)
    np.testing.assert_allclose(states.threshold[-1], expected, 1e-5)
    assert (np.asarray(updates)[late] > 0.5 * norms[late]).mean() >= 0.8
