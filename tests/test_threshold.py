"""Thresholds: constants, schedules, a user's own, and those that follow the norms.

The latter are judged by recurrences written from the papers, in float64, and free
themselves whatever the norms did before.
"""

import functools
import gc
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

GRADS = {"w": jnp.array([3.0, 4.0])}
ROOT = pathlib.Path(__file__).parent.parent
(RECORDED,) = map(np.load, ROOT.glob("*/results/spikes-norms.npy"))

# Twice the norm of the step before: a threshold with a memory, which starts at inf.
LAST_NORM_TWICE = Threshold(
    init=lambda: jnp.float32(jnp.inf),
    update=lambda norm, last, count: (2 * last, norm),
)


# --- Those of the user.


@pytest.mark.parametrize(
    ("max_norm", "scales", "expected"),
    [
        (2.5, [1, 2, 3], [2.5] * 3),
        (jnp.array(2), [1, 2], [2, 2]),
        (None, [1, np.nan], [np.inf] * 2),
        # Called with the number of updates before; 0 at its end gives zeros.
        (optax.linear_schedule(1.0, 0.0, 4), [1] * 5, [1, 0.75, 0.5, 0.25, 0]),
        (optax.linear_schedule(1.0, -1.0, 2), [1] * 3, [1, 0, 0]),
        # It sees the norm before the clip, and none that is not finite.
        (LAST_NORM_TWICE, [1, 1, 10, 1], [np.inf, 10, 10, 100]),
        (LAST_NORM_TWICE, [1, np.nan, np.inf, 1], [np.inf, 10, 10, 10]),
    ],
    ids=["number", "array", "None", "schedule", "below 0", "own", "own, not finite"],
)
def test_threshold_of_each_step(max_norm, scales, expected):
    tx = clip_by_global_norm(max_norm)
    state, found = tx.init(GRADS), []
    for scale in np.float32(scales):
        updates, state = tx.update({"w": GRADS["w"] * scale}, state)
        found.append(float(state.threshold))
        if scale == 1:
            clipped = GRADS["w"] * min(1, found[-1] / 5)
            np.testing.assert_allclose(updates["w"], clipped, 1e-6)
    assert found == expected


# --- The oracles.


def patience(decay, warmup_steps):
    """How many norms must be spikes in a row to begin the warm-up again."""
    # As in float32: at a count of 21, it matters if 2 / 0.1 is 20 or a little more.
    span = float(np.float32(2) / np.float32(1 - decay))
    return max(warmup_steps, 1) + min(span, 2_000)


def zclip(norms, z, decay, warmup_steps, *, departs=True):
    """Yields each norm's threshold, and whether the warm-up then starts again.

    Algorithm 1 of ZClip (arXiv 2504.02507) with the reciprocal threshold. With
    ``departs``: (1) no norm is a spike if the variance is zero; (2) each spike adds
    1 to a count, each other norm takes ``1 / z**2`` off it, and at ``patience`` all is
    forgotten.
    """
    limit = patience(decay, warmup_steps)
    relief = 1 / z**2 if z else math.inf
    first, mean, variance, count = [], None, None, 0.0
    for norm in map(float, norms):
        finite = math.isfinite(norm)
        if mean is None:
            yield math.inf, False
            first += [norm] if finite else []
            if len(first) == max(warmup_steps, 1):
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


def by_zclip(norms, *parameters, departs=True):
    steps = zclip(norms, *parameters, departs=departs)
    return np.array([threshold for threshold, _ in steps])


def by_autoclip(norms, q, window, warmup_steps):
    """Algorithm 1 of AutoClip (arXiv 2007.14469), over the last norms, after some."""
    finite = np.isfinite(norms)
    kept = np.float64(norms[finite])
    rows = np.lib.stride_tricks.sliding_window_view(kept, window)
    quantiles = [np.quantile(kept[:n], q) for n in range(1, window)]
    for i in range(0, len(rows), 4_000):
        quantiles.extend(np.quantile(rows[i : i + 4_000], q, axis=1))
    seen = np.cumsum(finite)
    found = np.array(quantiles)[np.maximum(seen - 1, 0)]
    return np.where(seen - finite >= warmup_steps, found, np.inf)


@functools.lru_cache
def scanned(make, *arguments):
    """A compiled function from norms to the thresholds and the last state."""
    threshold = make(*arguments)

    def step(state, norm):
        found, state = threshold.update(norm, state, jnp.int32(0))
        return state, found

    return jax.jit(lambda norms: jax.lax.scan(step, threshold.init(), norms)[::-1])


def zscore(z, decay, warmup_steps):
    return zscore_threshold(z, decay=decay, warmup_steps=warmup_steps)


def quantile(q, window, warmup_steps):
    return quantile_threshold(q, window=window, warmup_steps=warmup_steps)


def zscores(norms, *parameters):
    return np.asarray(scanned(zscore, *parameters)(np.float32(norms))[0])


# --- As in the papers.


def drawn_norms(seed):
    """10,000 norms that drift, with spikes, infs and NaNs among them."""
    rng = np.random.default_rng(seed)
    norms = np.exp(0.3 * rng.standard_normal(10_000) + np.sin(np.arange(10_000) / 700))
    norms *= np.where(rng.random(10_000) < 0.01, 10 ** rng.uniform(1, 6, 10_000), 1)
    for bad in (np.inf, np.nan):
        norms[rng.random(10_000) < 0.01] = bad
    return norms.astype(np.float32)


STREAMS = {
    "recorded": RECORDED,
    "drawn": drawn_norms(0),
    "of 1e30": drawn_norms(1) * np.float32(1e28),
    "of 1e-30": drawn_norms(2) * np.float32(1e-30),
    "bad at first": np.concatenate([np.float32([np.nan, np.inf] * 20), drawn_norms(3)]),
}
ORDINARY = [(2.5, 0.97, 25), (6.0, 0.99, 300), (2.5, 0.999, 25), (4.0, 0.9, 50)]
QUANTILES = [(0.1, 1000, 25), (0.987, 1000, 300), (0.5, 10, 25), (0, 7, 1), (1, 9, 25)]


def test_recorded_stream_has_what_poisons():
    assert len(RECORDED) == 2_000
    assert np.isnan(RECORDED).any()
    finite = RECORDED[np.isfinite(RECORDED)]
    assert finite.max() > 100 * np.median(finite)


@pytest.mark.parametrize("norms", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("parameters", ORDINARY, ids=str)
def test_zscore_is_that_of_the_paper(norms, parameters):
    expected = by_zclip(norms, *parameters, departs=False)
    np.testing.assert_allclose(zscores(norms, *parameters), expected, 1e-5)


@pytest.mark.parametrize("norms", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("parameters", QUANTILES, ids=str)
def test_quantile_is_that_of_the_paper(norms, parameters):
    found, _ = scanned(quantile, *parameters)(norms)
    np.testing.assert_allclose(found, by_autoclip(norms, *parameters), 1e-5)


FOLLOWING = {"z-score": (zscore, 2.5, 0.97, 10), "quantile": (quantile, 0.9, 100, 10)}
each_kind = pytest.mark.parametrize("kind", FOLLOWING.values(), ids=FOLLOWING)


@each_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_norms_that_are_not_finite_change_nothing(kind, bad):
    threshold = kind[0](*kind[1:])
    state = threshold.init()
    for norm in np.float32([1, 2, 1.5, 50, 50] * 4):
        _, same = threshold.update(jnp.float32(bad), state, jnp.int32(0))
        jax.tree.map(np.testing.assert_array_equal, same, state)
        _, state = threshold.update(norm, state, jnp.int32(0))


@each_kind
def test_spikes_are_clipped_once_enough_finite_norms_were_seen(kind):
    tx = clip_by_global_norm(kind[0](*kind[1:]), nonfinite="zero")
    state = tx.init(None)
    norms = [1.0, 1e9, np.nan, 1.1, np.inf, 0.9, 1e9, 1.2, 1e-9, 1.0, 1.1, 1.0]
    for norm in norms:
        updates, state = tx.update(jnp.array([norm]), state)
        assert state.threshold == np.inf
        assert updates[0] == (norm if np.isfinite(norm) else 0)
    _, state = tx.update(jnp.array([1.0]), state)
    assert np.isfinite(state.threshold)

    state = tx.init(None)
    for norm in [1.0, 1.1, 0.9, 1.05, 0.95] * 40:
        _, state = tx.update(jnp.array([norm]), state)
    for _ in range(2):
        updates, state = tx.update(jnp.array([1e6]), state)
        assert 0.9 < updates[0] < 1.2


@each_kind
def test_constant_norms(kind):
    """No variance: 0/0, the square root of less than 0, or a threshold below them."""
    for norm in (0.1, 0.0):
        found, _ = scanned(*kind)(np.full(200, norm, np.float32))
        np.testing.assert_allclose(found[10:], norm, 1e-6)


@pytest.mark.parametrize("kind", [(zscore, 2.5, 0.97, 0), (quantile, 0.5, 9, 0)])
def test_no_warmup_waits_for_one_norm(kind):
    found, _ = scanned(*kind)(np.float32([np.nan, 3, 3]))
    # The quantile's window has the norm at hand in it.
    np.testing.assert_array_equal(found, [np.inf, (np.inf, 3)[kind[0] is quantile], 3])


# --- Nothing locks.


def noisy(level, steps, noise=0.05, seed=0):
    """Norms around a level, normally distributed."""
    rng = np.random.default_rng(seed)
    return np.float32(level * np.abs(1 + noise * rng.standard_normal(steps)))


def risen(factor, seed=0):
    """200 norms around 1, then 600 around the factor."""
    return np.append(noisy(1.0, 200, seed=seed), noisy(factor, 600, seed=seed + 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_isolated_spikes_never_start_the_warmup_again(share, seed):
    rng = np.random.default_rng(seed)
    norms = noisy(1.0, 5_000, noise=0.1, seed=seed)
    spikes = (rng.random(5_000) < share) & (np.arange(5_000) >= 25)
    norms[spikes] *= np.float32(10 ** rng.uniform(0.5, 4, spikes.sum()))
    found = zscores(norms, 2.5, 0.97, 25)
    plain = by_zclip(norms, 2.5, 0.97, 25, departs=False)
    np.testing.assert_allclose(found, plain, 1e-5)
    assert (found < norms)[spikes].all()


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
@pytest.mark.parametrize(
    "parameters", [(2.5, 0.97, 25), (1.0, 0.5, 1), (6.0, 0.99, 10)], ids=str
)
def test_equal_norms_lock_nothing(parameters, later):
    for first in (0.0, 0.1, 1.0, 1e-30):
        norms = np.concatenate([np.full(100, first, np.float32), later])
        found = zscores(norms, *parameters)
        warmup = parameters[2]
        np.testing.assert_array_equal(found[:warmup], np.inf)
        np.testing.assert_allclose(found[warmup:100], first, 1e-5)
        # All were equal, up to and with the first of the later ones.
        assert found[100] == (np.inf if later[0] > first else found[99])
        wait = math.ceil(patience(*parameters[1:])) + warmup
        assert (found[101 + wait :] >= 0.8 * later[1 + wait :]).mean() >= 0.95


def assert_freed(found, level, decay, warmup_steps):
    """After the patience and a warm-up the threshold is at the new level for good."""
    free = 202 + math.ceil(patience(decay, warmup_steps)) + max(warmup_steps, 1)
    assert found[200:free].max() >= 0.8 * level
    assert (found[free:] >= 0.8 * level).mean() >= 0.9


def test_plain_zclip_locks():
    """What the departures are for."""
    zeros, parameters = np.concatenate([np.zeros(25), noisy(1.0, 400)]), (2.5, 0.97, 25)
    assert not by_zclip(zeros, *parameters, departs=False)[25:].any()
    assert (by_zclip(zeros, *parameters)[145:] >= 0.8).all()
    assert by_zclip(risen(10.0), *parameters, departs=False)[-1] < 3
    assert_freed(by_zclip(risen(10.0), *parameters), 10.0, 0.97, 25)


@pytest.mark.parametrize("warmup_steps", [1, 2, 5, 25, 50])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("z", [0.5, 1.0, 2.5, 6.0])
def test_threshold_follows_a_level_that_changes_for_good(z, decay, warmup_steps):
    for factor in (1.5, 2, 3, 10, 1e3, 1e6):
        found = zscores(risen(factor), z, decay, warmup_steps)
        assert_freed(found, factor, decay, warmup_steps)
        if decay == 0.9 and factor < 1e6:
            found = zscores(risen(1 / factor), z, decay, warmup_steps)
            assert_freed(found, 1 / factor, decay, warmup_steps)
            # The least of the last: with a low z the warm-up may be on at the end.
            assert found[-150:].min() < (1 + z) / factor


def test_a_change_of_level_is_waited_for_over_2000_norms_at_most():
    norms = np.append(noisy(1.0, 100), noisy(10.0, 2_200))
    found, expected = (run(norms, 2.5, 0.9999, 25) for run in (zscores, by_zclip))
    np.testing.assert_allclose(found, expected, 1e-3)


@pytest.mark.parametrize("z", [2.0, 2.5, 6.0])
@pytest.mark.parametrize("period", [1, 3, 20])
def test_threshold_follows_levels_that_alternate(z, period):
    high = (np.arange(3_000) // period) % 2 == 1
    levels = np.where(high, noisy(10.0, 3_000), noisy(1.0, 3_000, seed=1))
    norms = np.concatenate([noisy(1.0, 100, seed=2), levels.astype(np.float32)])
    clipped = (zscores(norms, z, 0.97, 25) < 0.8 * norms)[-1_000:]
    # Cantelli's inequality: no more than this share of any norms lies so far out.
    assert clipped.mean() <= 1 / (1 + z**2)


@pytest.mark.parametrize("factor", [1.2, 2.0, 10.0])
def test_threshold_follows_a_level_that_rises_again_and_again(factor):
    levels = [noisy(factor**i, 250, seed=i) for i in range(12)]
    found = zscores(np.concatenate(levels), 2.5, 0.97, 25)
    for i in range(12):
        late = found[250 * i + 125 : 250 * (i + 1)]
        assert (late >= 0.8 * factor**i).mean() >= 0.9


# Powers of two as z, whose inverse squares add up without rounding.
PIECES = st.tuples(
    st.floats(-3, 3).map(lambda exponent: 10**exponent),
    st.integers(1, 150),
    st.sampled_from([0.01, 0.05, 0.3]),
    st.integers(0, 9),
)


@given(
    st.lists(PIECES, min_size=1, max_size=6),
    st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    st.sampled_from([0.5, 0.9, 0.97]),
    st.sampled_from([0, 1, 3, 25]),
)
def test_any_history_is_judged_as_by_the_oracle(pieces, z, decay, warmup_steps):
    norms = np.concatenate([noisy(*piece) for piece in pieces])
    # One shape for all, so that all share a program. NaNs change nothing.
    padded = np.pad(norms, (0, 900 - len(norms)), constant_values=np.nan)
    found = zscores(padded, z, decay, warmup_steps)[: len(norms)]
    # A float32 standard deviation of what lies far below the mean is its rounding.
    np.testing.assert_allclose(found, by_zclip(norms, z, decay, warmup_steps), 1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_norms_that_are_not_finite_never_count(bad, factor):
    norms = risen(factor)
    where = np.random.default_rng(0).integers(0, len(norms), 300)
    mixed = np.insert(norms, where, np.float32(bad))
    found = zscores(mixed, 2.5, 0.97, 25)[np.isfinite(mixed)]
    np.testing.assert_array_equal(found, zscores(norms, 2.5, 0.97, 25))


# --- In clips and skips.


def run(tx, norms):
    """The updates and the states after each update with a gradient of each norm."""

    def step(state, norm):
        updates, state = tx.update(norm[None], state)
        return state, (updates[0], state)

    scan = jax.jit(lambda norms: jax.lax.scan(step, tx.init(None), norms)[1])
    return jax.device_get(scan(norms))


HISTORIES = {
    "zeros first": np.concatenate([np.zeros(25, np.float32), noisy(1.0, 600)]),
    "equal norms first": np.concatenate([np.ones(25, np.float32), noisy(1.1, 600)]),
    "rises by 1.5": risen(1.5),
    "rises by 10": risen(10.0),
    "rises by 1e6": risen(1e6),
    "falls": risen(0.01),
    "equal at last": np.append(noisy(1.0, 50), np.full(3_000, 1.05, np.float32)),
}


each_history = pytest.mark.parametrize("norms", HISTORIES.values(), ids=HISTORIES)


@each_history
@pytest.mark.parametrize("z", [2.5, 6.0])
def test_skips_take_steps_again(norms, z):
    updates, states = run(
        skip_by_global_norm(optax.identity(), zscore_threshold(z)), norms
    )
    longest = math.ceil(patience(0.97, 25))
    assert states.num_skipped[-1] <= longest + 0.05 * len(norms)
    assert states.num_consecutive_skips.max() <= longest
    assert (updates[-100:] > 0).mean() >= 0.9


@each_history
@pytest.mark.parametrize("q", [None, 0.1, 0.5, 0.9, 1.0])
def test_clips_follow_the_level_again(norms, q):
    """By the z-score, or by a quantile: its window holds norms as they are."""
    following = zscore_threshold() if q is None else quantile_threshold(q, window=100)
    updates, states = run(clip_by_global_norm(following), norms)
    assert np.isfinite(updates).all()
    late = norms[-100:]
    if q is None:
        assert (updates[-100:] >= 0.8 * late).mean() >= 0.9
    else:
        expected = np.quantile(np.float64(late), q)
        np.testing.assert_allclose(states.threshold[-1], expected, 1e-5)
        assert (updates[-100:] > 0.5 * late).mean() >= 0.8


# --- Long runs.


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
    norms[:25] = 1 + 0.1 * np.float32((-1) ** np.arange(25))
    return norms


def run_long(tx, norms):
    """The last state and the thresholds; no memory grows with the steps."""

    def step(state, norm):
        _, state = tx.update({"w": norm}, state)
        return state, state.threshold

    def live_bytes():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    state = tx.init({"w": jnp.float32(0)})
    scan = jax.jit(lambda state, norms: jax.lax.scan(step, state, norms))
    compiled = scan.lower(state, norms).compile()
    before = live_bytes()
    found = jax.device_get(compiled(state, norms))
    assert live_bytes() <= before
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**16 + 2 * norms.nbytes
    return found


LONG = [
    (clip_by_global_norm, zscore, by_zclip, (4.0, 0.97, 25)),
    (clip_by_global_norm, quantile, by_autoclip, (0.9, 50, 25)),
    (
        functools.partial(skip_by_global_norm, optax.trace(0.5)),
        zscore,
        None,
        (4, 0.97, 25),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20_000, 10**6])
@pytest.mark.parametrize(("factory", "make", "oracle", "parameters"), LONG)
def test_long_run(factory, make, oracle, parameters, steps):
    norms = stream(steps)
    norms[[-4, -1]] = np.nan, 100
    state, thresholds = run_long(factory(make(*parameters)), norms)
    finite, taken = np.isfinite(norms), norms < 2
    assert state.num_updates == steps
    assert state.threshold_state.num_norms == np.sum(finite)
    if oracle is None:
        assert state.num_skipped == np.sum(~taken)
        weights = 0.5 ** np.arange(59, -1, -1)
        trace = np.sum(np.float64(norms[taken][-60:]) * weights)
        np.testing.assert_allclose(state.inner_state.trace["w"], trace, 1e-6)
        return
    np.testing.assert_allclose(thresholds, oracle(norms, *parameters), 2e-5)
    assert state.num_nonfinite == np.sum(~finite)
    assert state.num_clipped == np.sum(norms[finite] > thresholds[finite])
    if make is zscore:
        assert state.num_clipped == np.sum(norms[finite][25:] > 2)
