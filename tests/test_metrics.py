"""metrics: where the states are found, and what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_globalclip import (
    clip_by_global_norm,
    metrics,
    skip_by_global_norm,
    zscore_threshold,
)

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
NAMES = [
    "global_norm",
    "clipped_norm",
    "clip_scale",
    "threshold",
    "clip_fraction",
    "nonfinite_fraction",
]
SKIP_NAMES = ["global_norm", "threshold", "skip_fraction"]


def after(tx, *scales):
    state = tx.init(PARAMS)
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: jnp.where(g == 0, 0, g * s), GRADS)
        _, state = tx.update(grads, state, PARAMS)
    return metrics(state)


def test_before_the_first_update():
    assert after(clip_by_global_norm(1.0)) == {
        "global_norm": 0,
        "clipped_norm": 0,
        "clip_scale": 1,
        "threshold": np.inf,
        "clip_fraction": 0,
        "nonfinite_fraction": 0,
    }


def test_after_updates():
    found = after(clip_by_global_norm(1.0), 0.1, 1, 0.01, 1)
    assert list(found) == NAMES
    expected = [5, 1, 0.2, 1, 0.5, 0]
    np.testing.assert_allclose([float(found[name]) for name in NAMES], expected, 1e-6)
    assert {value.dtype for value in found.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "scale", "expected"),
    [
        ({"max_norm": 1.0}, np.inf, np.nan),
        ({"max_norm": 1.0, "nonfinite": "zero"}, np.inf, 0),
        ({"max_norm": 1.0, "nonfinite": "zero"}, np.nan, 0),
        ({"max_norm": 1.0}, 0, 0),
        ({"max_norm": 0.0}, 1, 0),
        ({"max_norm": 10.0}, 1, 5),
        ({"max_norm": None}, 1, 5),
        ({"max_norm": None}, np.inf, np.inf),
        ({"max_norm": 1.0}, 1e30, 1),
    ],
)
def test_clipped_norm(options, scale, expected):
    found = after(clip_by_global_norm(**options), scale)
    np.testing.assert_allclose(float(found["clipped_norm"]), expected, 1e-6)
    assert bool(found["nonfinite_fraction"]) == (not np.isfinite(scale))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda clip: optax.chain(clip, optax.adam(1.0)),
        lambda clip: optax.named_chain(("clip", clip), ("sgd", optax.sgd(1.0))),
        lambda clip: optax.masked(clip, {"w": True, "b": True}),
        lambda clip: optax.MultiSteps(clip, 1),
        lambda clip: optax.apply_if_finite(clip, 3),
        lambda clip: optax.chain(
            optax.chain(optax.masked(clip, lambda _: {"w": True, "b": True}))
        ),
        lambda clip: optax.inject_hyperparams(lambda c: clip)(c=1.0),
        lambda clip: optax.partition({"all": clip}, {"w": "all", "b": "all"}),
    ],
)
@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (clip_by_global_norm(1.0), NAMES),
        (skip_by_global_norm(optax.sgd(1.0), zscore_threshold()), SKIP_NAMES),
    ],
    ids=["clip", "skip"],
)
@pytest.mark.usefixtures("optax_promotes")
def test_found_through_wrappers_and_under_jit(wrap, tx, names):
    tx = wrap(tx)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for found in (metrics(state), jax.jit(metrics)(state)):
        assert sorted(found) == sorted(names)
        assert found["global_norm"] == 5


def test_several_states_are_told_apart_by_their_paths():
    transforms = {"big": clip_by_global_norm(1.0), "small": clip_by_global_norm(0.1)}
    tx = optax.partition(transforms, {"w": "big", "b": "small"})
    found = after(tx, 1)
    assert len(found) == 2 * len(NAMES)
    big = [key for key in found if "big" in key and key.endswith("/global_norm")]
    small = [key for key in found if "small" in key and key.endswith("/global_norm")]
    assert (found[big[0]], found[small[0]]) == (3, 4)


def test_skip_alone():
    tx = skip_by_global_norm(optax.sgd(1.0), 6.0)
    assert after(tx) == {"global_norm": 0, "threshold": np.inf, "skip_fraction": 0}
    found = after(tx, 1, 2, np.nan, 1)
    assert found == {"global_norm": 5, "threshold": 6, "skip_fraction": 0.5}
    assert list(found) == SKIP_NAMES
    assert {value.dtype for value in found.values()} == {jnp.dtype("float32")}


def test_clip_inside_a_skip_tells_of_the_last_step_taken():
    inner = optax.chain(clip_by_global_norm(1.0), optax.sgd(1.0))
    found = after(skip_by_global_norm(inner, 6.0), 1, 2)
    inside = [f"inner_state/0/{name}" for name in NAMES]
    assert list(found) == SKIP_NAMES + inside
    assert (found["global_norm"], found["inner_state/0/global_norm"]) == (10, 5)
    assert (found["skip_fraction"], found["inner_state/0/clip_fraction"]) == (0.5, 1)


def test_paths_of_skips_in_wrappers():
    skip = skip_by_global_norm(clip_by_global_norm(1.0), 6.0)
    tx = optax.chain(
        optax.masked(skip, {"w": True, "b": True}), clip_by_global_norm(None)
    )
    names = {name.rpartition("/")[0] for name in after(tx, 1)}
    outer, inner = "0/inner_state", "0/inner_state/inner_state"
    assert names == {outer, inner, "1"}


def test_none_found():
    assert metrics(optax.adam(1.0).init(PARAMS)) == {}
