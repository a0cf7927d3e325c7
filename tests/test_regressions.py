"""Bugs seen in other libraries' clipping, one test each, with where it was seen."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    clip_updates,
    global_norm,
    metrics,
)


def eight_devices():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def test_non_finite_updates_are_zeroed_by_selection():
    # NaN * 0 is NaN. pytorch/pytorch#46849: only infinite norms end as zeros there.
    bad = [jnp.array([math.nan, math.inf, 1.0])]
    clipped, _ = clip_updates(bad, 1.0, nonfinite="zero")
    np.testing.assert_array_equal(clipped[0], [0, 0, 0])


def test_non_finite_norm_leaves_an_adaptive_threshold_on():
    mean = Threshold(
        init=lambda: jnp.float32(1),
        update=lambda norm, mean, count: (mean, 0.5 * mean + 0.5 * norm),
    )
    tx = clip_by_global_norm(mean, nonfinite="zero")
    _, state = tx.update([jnp.array([math.nan])], None)
    clipped, state = tx.update([jnp.array([30.0])], state)
    assert (clipped[0], state.threshold) == (1, 1)


def test_threshold_is_given_the_norm_before_the_clip():
    seen = Threshold(lambda: jnp.float32(1), lambda norm, state, count: (1.0, norm))
    _, state = clip_by_global_norm(seen).update([jnp.array([30.0])], None)
    assert (state.global_norm, state.threshold_state) == (30, 30)


def test_zero_norm_and_zero_threshold_give_zeros():
    # google-deepmind/optax#1752: 0 / 0 * 0.
    clipped, _ = clip_updates([jnp.zeros(3)], 0.0)
    np.testing.assert_array_equal(clipped[0], [0, 0, 0])


@pytest.mark.parametrize(
    ("entry", "dtype"), [(300, "float16"), (1e20, "float32"), (1e20, "bfloat16")]
)
def test_finite_updates_whose_squares_overflow_are_clipped(entry, dtype):
    # facebookresearch/fairscale#263, tracel-ai/burn#5699; optax 0.2.8 too.
    clipped, norm = clip_updates([jnp.full(3, entry, dtype)], 1.0)
    np.testing.assert_allclose(oracle.norm(clipped), 1, oracle.eps(clipped[0]))
    assert jnp.isfinite(norm)


@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_infinite_norm_is_reported_and_gives_nan(compile):
    # deepspeedai/DeepSpeed#8614: the norm is -1 there, and max_norm / -1 the scale.
    clipped, norm = compile(lambda x: clip_updates(x, 1.0))(jnp.array([math.inf, 2.0]))
    assert norm == math.inf
    assert jnp.isnan(clipped).all()


def test_strongly_typed_max_norm_keeps_every_dtype():
    tree = [jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float16), jnp.ones(3)]
    clipped, _ = clip_by_global_norm(jnp.float32(0.5)).update(tree, None)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, tree)


def test_max_norm_of_any_type_clips_half_precision_updates():
    # optax 0.2.8: lax.select takes no float32 beside bfloat16.
    for max_norm in (np.float32(1), jnp.float32(1), jnp.array(1), np.array(1.0)):
        updates, _ = clip_by_global_norm(max_norm).update(
            [jnp.full(4, 2, jnp.bfloat16)], None
        )
        np.testing.assert_array_equal(updates[0].astype(jnp.float32), [0.5] * 4)


@pytest.mark.parametrize("max_norm", [2.2, 3.3, 7.7, 100.3])
def test_unclipped_updates_keep_their_values(max_norm):
    # TensorFlow multiplies by c * (1 / c), PyTorch by c / (norm + 1e-6) at c = norm.
    tree = [jnp.array([0.1, 0.7, -2.0], jnp.float32)]
    for threshold in (max_norm, global_norm(tree)):
        clipped, _ = clip_updates(tree, threshold)
        np.testing.assert_array_equal(clipped[0], tree[0])


def test_state_keeps_its_structure():
    # optax.monitor: a scan over its update raises.
    tx = clip_by_global_norm(1.0)
    state = tx.init(None)
    _, later = jax.jit(tx.update)([jnp.ones(3)], state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, later)
    assert jax.tree.structure(state) == jax.tree.structure(later)


def test_norm_before_the_first_step_is_zero():
    # optax.snapshot.
    assert clip_by_global_norm(1.0).init([jnp.full(3, 7.0)]).global_norm == 0


def test_norm_under_shard_map_is_global():
    # optax 0.2.8: each device clips by the norm of its own shard, without a word.
    mesh = eight_devices()
    spec = PartitionSpec("data")

    def clip(leaf):
        return clip_updates(leaf, 1.0)

    leaf = jnp.arange(16.0)
    clipped, norm = jax.shard_map(
        clip, mesh=mesh, in_specs=spec, out_specs=(spec, PartitionSpec())
    )(leaf)
    np.testing.assert_allclose(norm, oracle.norm(leaf), 1e-6)
    np.testing.assert_allclose(clipped, leaf / norm, 1e-6)


def test_replicated_leaves_are_counted_once():
    # LBANN/lbann#2376.
    mesh = eight_devices()
    norm = jax.shard_map(
        lambda split, whole: global_norm([split, whole]),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )(jnp.ones(16), jnp.ones(9))
    assert norm == 5


def test_no_conditional_holds_a_collective():
    # Devices that disagree on the condition wait for each other for ever.
    mesh = eight_devices()
    norm = jax.shard_map(
        global_norm,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    leaf = jnp.full(16, 1e-30).at[3].set(1e30)
    np.testing.assert_allclose(norm(leaf), oracle.norm(leaf), 1e-6)

    def collectives(jaxpr):
        names = [equation.primitive.name for equation in oracle.equations(jaxpr)]
        return [name for name in names if "psum" in name or "pmax" in name]

    program = jax.make_jaxpr(norm)(leaf).jaxpr
    assert len(collectives(program)) == 1
    for equation in oracle.equations(program):
        if equation.primitive.name == "cond":
            for branch in equation.params["branches"]:
                assert not collectives(branch.jaxpr)


def test_step_and_metrics_look_at_no_value():
    """The update and the metrics look at no value: abstract ones do."""
    tx = optax.chain(clip_by_global_norm(optax.constant_schedule(1.0)), optax.sgd(0.1))

    def step(grads, state):
        updates, state = tx.update(grads, state, grads)
        return updates, state, metrics(state)

    grads = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    state = jax.eval_shape(tx.init, grads)
    assert jax.eval_shape(step, grads, state)[2]["global_norm"].shape == ()
    assert "callback" not in str(jax.make_jaxpr(step)(grads, state))


def test_logging_the_norm_measures_nothing_more():
    # AI-Hypercomputer/maxtext#5143.
    tx = clip_by_global_norm(1.0)

    def step(grads):
        updates, state = tx.update(grads, tx.init(None))
        return updates, metrics(state)

    def reductions(function):
        return jax.jit(function).lower(jnp.ones(1000)).as_text().count("reduce(")

    assert reductions(step) == reductions(global_norm)


def test_integers_and_bools_are_refused():
    for leaf in (jnp.arange(3), jnp.ones(3, bool), jnp.int8(1)):
        with pytest.raises(TypeError, match="takes float or complex arrays"):
            global_norm({"w": jnp.ones(3), "statistics": leaf})


def test_tensors_are_clipped_by_one_norm():
    # huggingface/transformers#614.
    clipped, _ = clip_updates([jnp.array([3.0]), jnp.array([4.0])], 1.0)
    np.testing.assert_allclose(jnp.concatenate(clipped), [0.6, 0.8], 1e-6)


def test_negative_threshold_keeps_the_sign():
    # optax 0.2.8 and torch.nn.utils.clip_grad_norm_.
    with pytest.raises(ValueError, match="max_norm=-1"):
        clip_by_global_norm(-1.0)
    clipped = jax.jit(lambda c: clip_updates(jnp.ones(3), c)[0])(-1.0)
    np.testing.assert_array_equal(clipped, [0, 0, 0])


def test_non_finite_updates_give_nan_by_default():
    # tensorflow/tensorflow#27733.
    clipped, _ = clip_updates(jnp.array([math.inf, 1.0]), 1.0)
    assert jnp.isnan(clipped).all()


def test_gradient_at_zero_is_finite():
    # tensorflow/tensorflow#22048; optax 0.2.8 too.
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(jax.grad(global_norm)(zero), zero)
    through = jax.grad(lambda x: clip_updates(x, 1.0)[0].sum())(zero)
    np.testing.assert_array_equal(through, [1, 1, 1])
