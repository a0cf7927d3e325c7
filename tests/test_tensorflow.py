"""tf.clip_by_global_norm: its examples, its documentation, and where we differ.

The table of docs/coming-from.md on TensorFlow has a test for each row: our
column always, TensorFlow's where it is installed (extra ``peers``).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import sparse

from optax_globalclip import clip_updates, global_norm

T_LIST = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 6.0, 7.0, 8.0])]


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow", reason="pip install '.[peers]'")


# --- The examples and the documentation.


def test_example_with_use_norm():
    with jax.enable_x64(True):
        clipped, norm = clip_updates(T_LIST, 0.8, use_norm=jnp.float64(1.0))
        assert (norm, norm.dtype) == (1.0, jnp.float64)
        np.testing.assert_allclose(clipped[0], [0.8, 1.6, 2.4, 3.2], 0, 1e-12)
        np.testing.assert_allclose(clipped[1], [4.0, 4.8, 5.6, 6.4], 0, 1e-12)


def test_example_without_use_norm():
    with jax.enable_x64(True):
        clipped, norm = clip_updates(T_LIST, 0.8)
        np.testing.assert_allclose(norm, math.sqrt(204), 0, 1e-12)
        for leaf, t in zip(clipped, T_LIST, strict=True):
            np.testing.assert_allclose(leaf, t * (0.8 / math.sqrt(204)), 0, 1e-12)
        # As printed in the example, to eight digits.
        printed = [0.0560112, 0.11202241, 0.16803361, 0.22404481]
        np.testing.assert_allclose(clipped[0], printed, 0, 5e-9)
        np.testing.assert_allclose(norm, 14.2828568570857, 0, 5e-14)


@pytest.mark.parametrize("max_norm", [0.5, 13.0, 100.0])
def test_formula(max_norm):
    """``t * clip_norm / max(global_norm, clip_norm)``."""
    with jax.enable_x64(True):
        t_list = [np.array([3.0, 4.0]), np.array([[12.0]])]
        clipped, norm = clip_updates(t_list, max_norm)
        assert norm == 13
        for leaf, t in zip(clipped, t_list, strict=True):
            np.testing.assert_allclose(leaf, t * max_norm / max(13.0, max_norm), 1e-15)


def test_none_is_kept_in_its_place():
    clipped, norm = clip_updates([None, jnp.array([3.0, 4.0]), None], 1.0)
    assert norm == 5
    assert (clipped[0], clipped[2]) == (None, None)
    np.testing.assert_allclose(clipped[1], [0.6, 0.8], 1e-6)


def test_infinite_norm_makes_all_nan():
    clipped, norm = clip_updates([jnp.array([1.0, math.inf]), jnp.ones(2)], 1.0)
    assert norm == math.inf
    assert all(jnp.isnan(leaf).all() for leaf in clipped)


@pytest.mark.parametrize("max_norm", [0.3, 1.0, 50.0])
def test_tensorflow_agrees(tf, max_norm):
    rng = np.random.default_rng(0)
    t_list = [rng.standard_normal(shape).astype(np.float32) for shape in [(9,), (4, 5)]]
    theirs, their_norm = tf.clip_by_global_norm(
        [tf.constant(t) for t in t_list], max_norm
    )
    ours, our_norm = clip_updates(t_list, max_norm)
    np.testing.assert_allclose(our_norm, their_norm.numpy(), 1e-6)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their.numpy(), 1e-6)


# --- Where we differ on purpose, by the rows of docs/coming-from.md.


def clip_in_tensorflow(tf, values, max_norm, **options):
    clipped, norm = tf.clip_by_global_norm([tf.constant(values)], max_norm, **options)
    return clipped[0].numpy(), float(norm)


def test_zero_threshold_and_zero_norm():
    np.testing.assert_array_equal(clip_updates(jnp.zeros(2), 0.0)[0], [0, 0])


def test_zero_threshold_and_zero_norm_in_tensorflow(tf):
    assert np.isnan(clip_in_tensorflow(tf, [0.0, 0.0], 0.0)[0]).all()


def test_negative_threshold():
    with pytest.raises(ValueError, match="max_norm=-1.0"):
        clip_updates(jnp.array([3.0, 4.0]), -1.0)


def test_negative_threshold_in_tensorflow(tf):
    np.testing.assert_array_equal(clip_in_tensorflow(tf, [3.0, 4.0], -1.0)[0], [3, 4])


def test_infinite_threshold():
    leaf = jnp.array([3.0, 4.0])
    np.testing.assert_array_equal(clip_updates(leaf, math.inf)[0], leaf)


def test_infinite_threshold_in_tensorflow(tf):
    if tuple(map(int, tf.__version__.split(".")[:2])) > (2, 21):
        pytest.skip("TensorFlow up to 2.21")
    assert np.isnan(clip_in_tensorflow(tf, [3.0, 4.0], math.inf)[0]).all()


THRESHOLDS = np.linspace(40, 1000, 500)
UNCLIPPED = np.random.default_rng(0).standard_normal(1000).astype(np.float32)


def test_unclipped_entries():
    clip = jax.jit(lambda max_norm: clip_updates(UNCLIPPED, max_norm)[0])
    assert all((clip(c) == UNCLIPPED).all() for c in THRESHOLDS)


def test_unclipped_entries_in_tensorflow(tf):
    changed = [
        (clip_in_tensorflow(tf, UNCLIPPED, float(c))[0] != UNCLIPPED).any()
        for c in THRESHOLDS
    ]
    assert 0.1 < np.mean(changed) < 0.2


def test_squares_that_overflow():
    clipped, norm = clip_updates(jnp.full(4, 1e20), 1.0)
    np.testing.assert_allclose(norm, 2e20, 1e-6)
    np.testing.assert_allclose(clipped, 0.5, 1e-6)


def test_squares_that_overflow_in_tensorflow(tf):
    clipped, norm = clip_in_tensorflow(tf, [1e20] * 4, 1.0)
    assert norm == math.inf
    assert np.isnan(clipped).all()


def half_precision_leaves():
    return oracle.normals([(1000,)] * 100, "bfloat16")


def test_norm_of_half_precision():
    leaves = half_precision_leaves()
    assert global_norm(leaves).dtype == jnp.float32
    expected = oracle.norm(leaves)
    np.testing.assert_allclose(float(global_norm(leaves)), expected, oracle.SUMMED)


def test_norm_of_half_precision_in_tensorflow(tf):
    leaves = half_precision_leaves()
    norm = tf.linalg.global_norm(
        [tf.cast(np.asarray(leaf, np.float32), tf.bfloat16) for leaf in leaves]
    )
    assert norm.dtype == tf.bfloat16
    assert abs(float(norm) / oracle.norm(leaves) - 1) > 5e-4


def test_python_float_use_norm():
    clipped, norm = clip_updates(jnp.array([3.0, 4.0]), 1.0, use_norm=10.0)
    assert norm == 10
    np.testing.assert_allclose(clipped, [0.3, 0.4], 1e-6)


def test_python_float_use_norm_in_tensorflow(tf):
    with pytest.raises(AttributeError, match="dtype"):
        clip_in_tensorflow(tf, [3.0, 4.0], 1.0, use_norm=10.0)


def test_rows_given_twice_are_summed_first():
    data, indices = jnp.array([[3.0], [4.0]]), jnp.array([[2], [2]])
    assert global_norm(sparse.BCOO((data, indices), shape=(5, 1))) == 7


def test_tensorflow_takes_rows_given_twice_by_themselves(tf):
    slices = tf.IndexedSlices(tf.constant([[3.0], [4.0]]), tf.constant([2, 2]), (5, 1))
    _, norm = tf.clip_by_global_norm([slices], 1.0)
    assert norm.numpy() == 5
