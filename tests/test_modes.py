"""Programs exported with symbolic shapes, and donated states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import export

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

PLATFORMS = ("cpu", "cuda", "tpu")
EXPORTED = {
    "global_norm": global_norm,
    "ord 3": functools.partial(global_norm, ord=3),
    "ord inf": functools.partial(global_norm, ord=np.inf),
    "leaf_norms": leaf_norms,
    "clip_updates": lambda updates: clip_updates(updates, 1.0),
    "zero": lambda updates: clip_updates(updates, 1.0, nonfinite="zero"),
}
EXTENTS = {"b, 3": (5000, 3), "b, n": (70, 80), "b": (9,), "2*b, 3": (4, 3)}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("extents", EXTENTS)
def test_symbolic_shapes_may_be_exported_for_every_platform(extents, name, dtype):
    shape = export.symbolic_shape(extents)
    abstract = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), jnp.zeros(4)]
    program = export.export(jax.jit(EXPORTED[name]), platforms=PLATFORMS)(abstract)
    assert program.platforms == PLATFORMS
    first, second = oracle.normals([EXTENTS[extents], (4,)])
    for scale in (1.0,) if dtype == "float16" else (1.0, 1e-18, 1e30):
        updates = [(first * scale).astype(dtype), second * scale]
        found, expected = program.call(updates), EXPORTED[name](updates)
        for leaf, same in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert leaf.dtype == same.dtype
            rounding = oracle.eps(leaf) + 1e-6
            np.testing.assert_allclose(np.float64(leaf), np.float64(same), rounding)


@pytest.mark.parametrize("skip", [False, True])
def test_states_may_be_in_the_signature_of_an_exported_step(skip):
    # Not around a state of Optax's own, which Optax does not register.
    tx = clip_by_global_norm(1.0)
    tx = skip_by_global_norm(tx, zscore_threshold()) if skip else tx
    (rows,) = export.symbolic_shape("b")
    updates = [jax.ShapeDtypeStruct((rows, 3), jnp.float32)]
    state = jax.eval_shape(tx.init, [jnp.ones((2, 3))])
    program = export.export(jax.jit(tx.update), platforms=PLATFORMS)(updates, state)
    program = export.deserialize(program.serialize())
    gradients = [np.float32([[3, 4, 12]])]
    found, new_state = program.call(gradients, tx.init(gradients))
    expected, same_state = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(found[0], expected[0], 1e-6)
    assert type(new_state) is type(same_state)
    np.testing.assert_allclose(new_state.global_norm, 13, 1e-6)


# --- Donation.

SHARED = jnp.arange(3.0)
# One array twice in the first state, and an array that the user still holds.
SHARING = Threshold(
    lambda: (SHARED, SHARED, SHARED), lambda norm, state, count: (1.0, state)
)
LAST_NORM = Threshold(
    lambda: (jnp.float32(jnp.inf),) * 2, lambda norm, state, count: (norm, (norm, norm))
)
THRESHOLDS = {
    "own": SHARING,
    "last norm": LAST_NORM,
    "number": 1.0,
    "schedule": optax.linear_schedule(1.0, 0.5, 4),
    "None": None,
    "z-score": zscore_threshold(warmup_steps=1),
    "quantile": quantile_threshold(0.5, window=3),
}
INNER = {
    "clip": lambda max_norm: clip_by_global_norm(max_norm),
    "skip": lambda max_norm: skip_by_global_norm(optax.adam(0.1), max_norm),
    "both": lambda max_norm: skip_by_global_norm(
        clip_by_global_norm(max_norm), zscore_threshold()
    ),
    "chain": lambda max_norm: optax.chain(
        clip_by_global_norm(max_norm), clip_by_global_norm(2.0)
    ),
}


def pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("make", INNER)
def test_states_share_no_buffers_and_may_be_donated(make, threshold):
    tx = INNER[make](THRESHOLDS[threshold])

    def gradients():
        return {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}

    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state, expected_state = tx.init(gradients()), tx.init(gradients())
    # A second state is no view of the first: donating one leaves the other.
    assert not pointers(state) & pointers(expected_state)
    for init in (tx.init, jax.jit(tx.init)):
        state, expected_state = init(gradients()), tx.init(gradients())
        for _ in range(2):
            first = jax.tree.leaves(state)
            assert len(pointers(state)) == len(first)
            updates, state = step(gradients(), state)
            assert any(leaf.is_deleted() for leaf in first)
            expected, expected_state = tx.update(gradients(), expected_state)
            jax.tree.map(
                lambda f, e: np.testing.assert_allclose(f, e, 1e-5, 1e-7),
                (updates, state),
                (expected, expected_state),
            )
    np.testing.assert_array_equal(SHARED, [0, 1, 2])
