"""Bugs seen in other libraries' clipping, one test each, with where it was seen.

Where nothing is cited, it is optax 0.2.8.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from optax_globalclip import Threshold, clip_by_global_norm, clip_updates, global_norm


@pytest.mark.parametrize(
    ("updates", "max_norm", "expected", "options"),
    [
        # NaN * 0 is NaN. pytorch/pytorch#46849: only infinite norms end as zeros there.
        ([math.nan, math.inf, 1.0], 1.0, [0, 0, 0], {"nonfinite": "zero"}),
        # tensorflow/tensorflow#27733: raised, or clipped.
        ([math.inf, 1.0], 1.0, [math.nan] * 2, {}),
        # google-deepmind/optax#1752: 0 / 0 * 0.
        ([0.0, 0.0], 0.0, [0, 0], {}),
        # facebookresearch/fairscale#263, tracel-ai/burn#5699: squares overflow.
        ([1e20, 1e20], 1.0, [0.5**0.5] * 2, {}),
        # TensorFlow multiplies by c * (1 / c), PyTorch by c / (norm + 1e-6).
        ([0.6, 0.8], 1.0, [np.float32(0.6), np.float32(0.8)], {}),
    ],
)
def test_updates(updates, max_norm, expected, options):
    clipped, _ = clip_updates([jnp.array(updates)], max_norm, **options)
    np.testing.assert_allclose(clipped[0], expected, 1e-6)


def test_history_holds_finite_norms_from_before_the_clip():
    mean = Threshold(
        init=lambda: jnp.float32(1),
        update=lambda norm, mean, count: (mean, 0.5 * mean + 0.5 * norm),
    )
    tx = clip_by_global_norm(mean, nonfinite="zero")
    _, state = tx.update([jnp.array([math.nan])], None)
    clipped, state = tx.update([jnp.array([30.0])], state)
    assert (clipped[0], state.threshold, state.threshold_state) == (1, 1, 15.5)


def test_donated_state_shares_nothing_with_another_or_with_the_user():
    shared = jnp.arange(3.0)
    twice = Threshold(lambda: (shared, shared), lambda norm, state, count: (1.0, state))
    tx = clip_by_global_norm(twice)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    other = tx.init(None)
    for state in (tx.init(None), jax.jit(tx.init)(None)):
        _, state = step(jnp.ones(3), state)
        step(jnp.ones(3), state)
    np.testing.assert_array_equal(shared, [0, 1, 2])
    np.testing.assert_array_equal(other.threshold_state, [shared, shared])


def test_infinite_norm_is_reported_as_such():
    # deepspeedai/DeepSpeed#8614: the norm is -1 there, and max_norm / -1 the scale.
    for clip in (clip_updates, jax.jit(clip_updates)):
        clipped, norm = clip(jnp.array([math.inf, 2.0]), 1.0)
        assert norm == math.inf
        assert jnp.isnan(clipped).all()


def test_max_norm_of_any_type_clips_half_precision_updates():
    for max_norm in (np.float32(1), jnp.float32(1), jnp.array(1), np.array(1.0)):
        tx = clip_by_global_norm(max_norm)
        updates, _ = tx.update([jnp.full(4, 2, jnp.bfloat16)], None)
        assert updates[0].dtype == jnp.bfloat16
        np.testing.assert_array_equal(updates[0].astype(jnp.float32), [0.5] * 4)


def test_state_begins_as_it_goes_on():
    # optax.monitor: a scan over its update raises. optax.snapshot: the first norm is
    # that of the parameters.
    tx = clip_by_global_norm(1.0)
    state = tx.init([jnp.full(3, 7.0)])
    assert state.global_norm == 0
    _, later = jax.jit(tx.update)([jnp.ones(3)], state)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, later)


def test_norm_under_shard_map_is_global_and_counts_replicated_leaves_once():
    # Optax clips by each shard's own norm. LBANN/lbann#2376: counted on each device.
    norm = jax.shard_map(
        lambda split, whole: global_norm([split, whole]),
        mesh=oracle.mesh(),
        in_specs=(P(("x", "y")), P()),
        out_specs=P(),
    )
    assert norm(jnp.ones(16), jnp.ones(9)) == 5


def test_integers_and_bools_are_refused():
    for leaf in (jnp.arange(3), jnp.ones(3, bool), jnp.int8(1)):
        with pytest.raises(TypeError, match=r"\['statistics'\]"):
            global_norm({"w": jnp.ones(3), "statistics": leaf})


def test_tensors_are_clipped_by_one_norm():
    # huggingface/transformers#614.
    clipped, _ = clip_updates([jnp.array([3.0]), jnp.array([4.0])], 1.0)
    np.testing.assert_allclose(jnp.concatenate(clipped), [0.6, 0.8], 1e-6)


def test_negative_threshold_keeps_the_sign():
    # torch.nn.utils.clip_grad_norm_ too.
    with pytest.raises(ValueError, match="max_norm"):
        clip_by_global_norm(-1.0)
    clipped = jax.jit(lambda c: clip_updates(jnp.ones(3), c)[0])(-1.0)
    np.testing.assert_array_equal(clipped, [0, 0, 0])


def test_gradient_at_zero_is_finite():
    # tensorflow/tensorflow#22048.
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(jax.grad(global_norm)(zero), zero)
    through = jax.grad(lambda x: clip_updates(x, 1.0)[0].sum())(zero)
    np.testing.assert_array_equal(through, [1, 1, 1])
