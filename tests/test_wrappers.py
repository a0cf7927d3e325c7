"""Inside and before each of Optax's wrappers: whose norm is clipped to 1."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from optax_globalclip import clip_by_global_norm, metrics, skip_by_global_norm

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "wrappers.md").read_text()

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotes")]

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
ONLY_W = {"w": True, "b": False}


def clip():
    return clip_by_global_norm(1.0)


def steps(tx, *scales, params=PARAMS, **extra):
    """The updates of each step, and the last state."""
    state, found = tx.init(params), []
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: g * s, GRADS)
        updates, state = tx.update(grads, state, params, **extra)
        found.append(updates)
    return found, state


def assert_updates(updates, w, b):
    np.testing.assert_allclose(updates["w"], [w, 0], 1e-6)
    np.testing.assert_allclose(updates["b"], [b], 1e-6)


def test_chain():
    for chain in (
        optax.chain,
        lambda *txs: optax.named_chain(*zip("ab", txs, strict=True)),
    ):
        # First: the gradients. Last: the step, with the learning rate in it.
        (updates,), _ = steps(chain(clip(), optax.scale(10.0)), 1)
        assert_updates(updates, 6, 8)
        (updates,), _ = steps(chain(optax.scale(10.0), clip()), 1)
        assert_updates(updates, 0.6, 0.8)


def test_masked():
    (updates,), state = steps(optax.masked(clip(), ONLY_W), 1)
    assert_updates(updates, 1, 4)
    assert metrics(state)["global_norm"] == 3
    (updates,), _ = steps(
        optax.chain(clip(), optax.masked(optax.scale(2.0), ONLY_W)), 1
    )
    assert_updates(updates, 1.2, 0.8)


def test_partition():
    groups = {"w": "one", "b": "other"}
    (updates,), _ = steps(optax.partition({"one": clip(), "other": clip()}, groups), 1)
    assert_updates(updates, 1, 1)
    transforms = {"one": optax.scale(2.0), "other": optax.set_to_zero()}
    (updates,), _ = steps(optax.chain(clip(), optax.partition(transforms, groups)), 1)
    assert_updates(updates, 1.2, 0)


def test_selective_transform():
    frozen = {"w": False, "b": True}
    (updates,), _ = steps(optax.selective_transform(clip(), freeze_mask=frozen), 1)
    assert_updates(updates, 1, 0)
    chain = optax.chain(
        clip(), optax.selective_transform(optax.identity(), freeze_mask=frozen)
    )
    (updates,), _ = steps(chain, 1)
    assert_updates(updates, 0.6, 0)


def test_multi_steps():
    (first, second), state = steps(optax.MultiSteps(clip(), 2), 1, 3)
    assert_updates(first, 0, 0)
    assert_updates(second, 0.6, 0.8)
    np.testing.assert_allclose(metrics(state)["global_norm"], 10)
    accumulate = optax.MultiSteps(optax.identity(), 2).gradient_transformation()
    (_, second), state = steps(optax.chain(clip(), accumulate), 0.1, 3)
    assert_updates(second, (0.3 + 0.6) / 2, (0.4 + 0.8) / 2)
    assert metrics(state)["clip_fraction"] == 0.5


def test_apply_every():
    (_, second), _ = steps(optax.chain(clip(), optax.apply_every(2)), 0.1, 3)
    assert_updates(second, 0.3 + 0.6, 0.4 + 0.8)
    (first, second), state = steps(optax.chain(optax.apply_every(2), clip()), 1, 3)
    assert_updates(first, 0, 0)
    assert_updates(second, 0.6, 0.8)
    np.testing.assert_allclose(metrics(state)["global_norm"], 20)


def test_apply_if_finite():
    (_, second), state = steps(optax.apply_if_finite(clip(), 3), np.nan, 1)
    assert_updates(second, 0.6, 0.8)
    assert metrics(state)["nonfinite_fraction"] == 0
    chain = optax.chain(clip(), optax.apply_if_finite(optax.identity(), 3))
    (first, _), state = steps(chain, np.nan, 1)
    assert_updates(first, 0, 0)
    assert metrics(state)["nonfinite_fraction"] == 0.5


def test_conditionally_transform():
    wrapped = optax.conditionally_transform(clip(), lambda step: step >= 1)
    (first, second), state = steps(wrapped, 1, 1)
    assert_updates(first, 3, 4)
    assert_updates(second, 0.6, 0.8)
    assert optax.tree.get(state, "num_updates") == 1
    wrapped = optax.conditionally_mask(clip(), lambda step: step >= 1)
    (first, second), _ = steps(wrapped, 1, 1)
    assert_updates(first, 0, 0)
    assert_updates(second, 0.6, 0.8)


def test_inject_hyperparams():
    tx = optax.inject_hyperparams(clip_by_global_norm)(1.0)
    _, state = steps(tx, 1)
    state.hyperparams["max_norm"] = jnp.float32(2.0)
    updates, _ = tx.update(GRADS, state, PARAMS)
    assert_updates(updates, 1.2, 1.6)


def test_lookahead():
    params = optax.LookaheadParams.init_synced(PARAMS)
    inside = optax.lookahead(optax.chain(clip(), optax.scale(-1.0)), 2, 0.5)
    before = optax.chain(clip(), optax.lookahead(optax.scale(-1.0), 2, 0.5))
    for tx in (inside, before):
        (updates, _), state = steps(tx, 1, 1, params=params)
        assert_updates(updates.fast, -0.6, -0.8)
        assert metrics(state)["global_norm"] == 5


def test_schedule_free():
    tx = optax.contrib.schedule_free(optax.chain(clip(), optax.sgd(1.0)), 1.0)
    (updates,), state = steps(tx, 1)
    assert metrics(state)["global_norm"] == 5
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-5)


@pytest.mark.parametrize(
    "search",
    [
        optax.scale_by_backtracking_linesearch(5),
        optax.scale_by_zoom_linesearch(5, initial_guess_strategy="one"),
    ],
)
def test_line_search(search):
    def loss(params):
        return sum(jnp.sum((p - 3) ** 2) for p in jax.tree.leaves(params))

    tx = optax.chain(clip(), optax.scale(-1.0), search)
    value, grad = jax.value_and_grad(loss)(PARAMS)
    state = tx.init(PARAMS)
    updates, state = tx.update(
        grad, state, PARAMS, value=value, grad=grad, value_fn=loss
    )
    np.testing.assert_allclose(metrics(state)["global_norm"], oracle.norm(grad), 1e-6)
    # The step is along the clipped direction, and as long as the search makes it.
    np.testing.assert_allclose(updates["w"] / updates["b"], [1, 1], 1e-6)
    assert loss(optax.apply_updates(PARAMS, updates)) < value


def test_reduce_on_plateau():
    tx = optax.chain(clip(), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    found, _ = steps(tx, *[1] * 6, value=1.0)
    assert_updates(found[0], 0.6, 0.8)
    assert oracle.norm(found[-1]) < 0.6


def test_mechanize():
    inside = optax.contrib.mechanize(optax.chain(clip(), optax.scale(-1.0)))
    _, state = steps(inside, 1, params=jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_allclose(metrics(state)["clipped_norm"], 1, 1e-6)


@pytest.mark.parametrize("opaque_mode", [True, False])
def test_sam(opaque_mode):
    tx = optax.contrib.sam(
        optax.chain(clip(), optax.scale(-1.0)),
        optax.chain(optax.contrib.normalize(), optax.scale(0.1)),
        sync_period=2,
        opaque_mode=opaque_mode,
    )
    ascended = jax.tree.map(lambda g: 2 * g, GRADS)
    scales = [1] if opaque_mode else [1, 1]
    found, state = steps(tx, *scales, grad_fn=lambda *_: ascended)
    assert_updates(found[-1], -0.6, -0.8)
    # The gradient of the descent, at the point that the ascent has led to.
    assert optax.tree.get(state, "global_norm") == (10 if opaque_mode else 5)
    # Selected by multiplying with 0, which of the threshold before it makes a NaN.
    assert np.isnan(metrics(state)["threshold"]) == (not opaque_mode)


def test_split_real_and_imaginary():
    tx = optax.contrib.split_real_and_imaginary(clip())
    grads = jnp.array([3.0 + 4.0j])
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, [0.6 + 0.8j], 1e-6)
    assert metrics(state)["global_norm"] == 5


def test_differentially_private_aggregate():
    # It clips each example itself; the clip after it, their noisy mean.
    grads = jax.tree.map(lambda g: jnp.stack([g, g]), GRADS)
    tx = optax.chain(
        optax.contrib.differentially_private_aggregate(10.0, 0.0, 0), clip()
    )
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert_updates(updates, 0.6, 0.8)
    assert metrics(state)["global_norm"] == 5


def test_skip_by_global_norm():
    (_, second), state = steps(skip_by_global_norm(clip(), 6.0), 9, 1)
    assert_updates(second, 0.6, 0.8)
    assert state.inner_state.num_updates == 1
    (first, second), state = steps(
        optax.chain(clip(), skip_by_global_norm(optax.identity(), 6.0)), 9, 1
    )
    assert_updates(first, 0.6, 0.8)
    assert state[1].num_skipped == 0


def test_every_row_of_the_page_is_a_test():
    section = PAGE.split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    rows = [re.findall(r"`(?:contrib\.)?(\w+)`", cell) for cell in cells]
    names = [name for row in rows for name in row]
    assert len(names) >= 20
    source = pathlib.Path(__file__).read_text()
    for name in names:
        assert name in source
