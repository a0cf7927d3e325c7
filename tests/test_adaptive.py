"""Adaptive thresholds, against recurrences written from the papers, in float64."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_globalclip import clip_by_global_norm, quantile_threshold, zscore_threshold

RECORDED = np.load(
    pathlib.Path(__file__).parent.parent / "studies/results/spikes-norms.npy"
)


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


def zclip(norms, z, decay, warmup_steps):
    """Algorithm 1 of ZClip, which gives the norm that each gradient is clipped to."""
    first, mean, variance = [], None, None
    for norm in map(float, norms):
        if mean is None:
            yield math.inf
            if math.isfinite(norm):
                first.append(norm)
            if len(first) == warmup_steps:
                mean, variance = np.mean(first), np.var(first)
            continue
        threshold = mean + z * math.sqrt(variance)
        if math.isfinite(norm) and norm > threshold:
            score = (norm - mean) / math.sqrt(variance) if variance else math.inf
            threshold = norm = mean + z**2 / score * math.sqrt(variance)
        yield threshold
        if math.isfinite(norm):
            mean = decay * mean + (1 - decay) * norm
            variance = decay * variance + (1 - decay) * (norm - mean) ** 2


def autoclip(norms, q, window, warmup_steps):
    """Algorithm 1 of AutoClip, over the last norms, and after some of them."""
    history = []
    for norm in map(float, norms):
        warming_up = len(history) < warmup_steps
        if math.isfinite(norm):
            history.append(norm)
        yield math.inf if warming_up else np.quantile(history[-window:], q)


@functools.partial(jax.jit, static_argnums=0)
def thresholds_of(threshold, norms):
    def step(state, norm):
        judged, state = threshold.update(norm, state, jnp.int32(0))
        return state, judged

    return jax.lax.scan(step, threshold.init(), norms)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("z", "decay", "warmup_steps"),
    [(2.5, 0.97, 25), (6.0, 0.99, 300), (2.5, 0.999, 25)],
)
def test_zscore_is_that_of_the_paper(stream, z, decay, warmup_steps):
    norms = STREAMS[stream]
    threshold = zscore_threshold(z, decay=decay, warmup_steps=warmup_steps)
    _, found = thresholds_of(threshold, norms)
    expected = list(zclip(norms, z, decay, warmup_steps))
    np.testing.assert_allclose(found, expected, 1e-5)


@pytest.mark.parametrize("stream", ["recorded", "bad at first"])
@pytest.mark.parametrize(
    ("q", "window", "warmup_steps"),
    [(0.1, 1000, 25), (0.987, 1000, 300), (0.5, 10, 25), (0, 7, 1), (1, 100, 25)],
)
def test_quantile_is_that_of_the_paper(stream, q, window, warmup_steps):
    norms = STREAMS[stream]
    threshold = quantile_threshold(q, window=window, warmup_steps=warmup_steps)
    _, found = thresholds_of(threshold, norms)
    expected = list(autoclip(norms, q, window, warmup_steps))
    np.testing.assert_allclose(found, expected, 1e-5)


THRESHOLDS = {
    "z-score": zscore_threshold(warmup_steps=10),
    "quantile": quantile_threshold(0.9, window=100, warmup_steps=10),
}
each_threshold = pytest.mark.parametrize(
    "threshold", THRESHOLDS.values(), ids=THRESHOLDS
)


@each_threshold
def test_recorded_stream_has_what_poisons(threshold):
    assert len(RECORDED) == 2_000
    assert np.isnan(RECORDED).any()
    finite = RECORDED[np.isfinite(RECORDED)]
    assert finite.max() > 100 * np.median(finite)
    state, found = thresholds_of(threshold, RECORDED)
    assert np.isinf(found[:10]).all()
    assert np.isfinite(found[10:]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@each_threshold
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_norms_change_nothing(threshold, bad):
    state, _ = thresholds_of(threshold, np.float32([1, 2] * 9))
    judged, same = threshold.update(jnp.float32(bad), state, jnp.int32(0))
    assert np.isfinite(judged)
    jax.tree.map(np.testing.assert_array_equal, same, state)


@each_threshold
def test_never_clips_before_enough_finite_norms(threshold):
    tx = clip_by_global_norm(threshold, nonfinite="zero")
    state = tx.init(None)
    norms = [1.0, 1e9, np.nan, 1.1, np.inf, 0.9, 1e9, 1.2, 1e-9, 1.0, 1.1, 1.0]
    for norm in norms:
        updates, state = tx.update(jnp.array([norm]), state)
        assert state.threshold == np.inf
        assert updates[0] == (norm if np.isfinite(norm) else 0)
    _, state = tx.update(jnp.array([1.0]), state)
    assert np.isfinite(state.threshold)


@each_threshold
def test_spike_is_clipped_and_the_next_one_too(threshold):
    tx = clip_by_global_norm(threshold)
    state = tx.init(None)
    for norm in [1.0, 1.1, 0.9, 1.05, 0.95] * 40:
        _, state = tx.update(jnp.array([norm]), state)
    for _ in range(2):
        updates, state = tx.update(jnp.array([1e6]), state)
        assert 0.9 < updates[0] < 1.2


@each_threshold
def test_constant_norms(threshold):
    """No variance: 0/0, the square root of less than 0, or a threshold below them."""
    norms = np.full(200, 0.1, np.float32)
    _, found = thresholds_of(threshold, norms)
    np.testing.assert_allclose(found[10:], 0.1, 1e-6)
    _, found = thresholds_of(threshold, 0 * norms)
    np.testing.assert_array_equal(found[10:], 0)


@each_threshold
def test_counts_saturate(threshold):
    state, _ = thresholds_of(threshold, np.ones(200, "f4"))
    state = state._replace(num_norms=jnp.int32(2**31 - 1))
    judged, state = threshold.update(jnp.float32(1), state, jnp.int32(0))
    assert state.num_norms == 2**31 - 1
    assert np.isfinite(judged)


@pytest.mark.parametrize(
    "make",
    [
        lambda: zscore_threshold(warmup_steps=0),
        lambda: quantile_threshold(0.5, warmup_steps=0),
    ],
)
def test_no_warmup_waits_for_one_norm(make):
    threshold = make()
    judged, state = threshold.update(
        jnp.float32(np.nan), threshold.init(), jnp.int32(0)
    )
    assert judged == np.inf
    _, state = threshold.update(jnp.float32(3), state, jnp.int32(0))
    judged, _ = threshold.update(jnp.float32(3), state, jnp.int32(0))
    assert judged == 3


def test_quantile_without_warmup_is_the_first_norm_itself():
    threshold = quantile_threshold(0.5, warmup_steps=0)
    judged, _ = threshold.update(jnp.float32(3), threshold.init(), jnp.int32(0))
    assert judged == 3


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: zscore_threshold(-1.0), "z=-1.0"),
        (lambda: zscore_threshold(math.inf), "z=inf"),
        (lambda: zscore_threshold("2"), "z='2'"),
        (lambda: zscore_threshold(decay=1.1), "decay=1.1"),
        (lambda: zscore_threshold(decay=math.nan), "decay=nan"),
        (lambda: zscore_threshold(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: zscore_threshold(warmup_steps=2.5), "warmup_steps=2.5"),
        (lambda: quantile_threshold(1.5), "q=1.5"),
        (lambda: quantile_threshold(90), "q=90"),
        (lambda: quantile_threshold(0.5, window=0), "window=0"),
        (lambda: quantile_threshold(0.5, warmup_steps=None), "warmup_steps=None"),
    ],
)
def test_errors_name_the_argument(make, named):
    with pytest.raises(ValueError, match=named.replace("'", ".")):
        make()
