"""What every Optax transformation promises, for each of our factories and options."""

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

RUNNING_MEAN = Threshold(
    init=lambda: (jnp.float32(jnp.inf), jnp.int32(0)),
    update=lambda norm, state, count: (state[0], (norm, state[1] + 1)),
)
FACTORIES = {
    "number": lambda: clip_by_global_norm(1.0),
    "array": lambda: clip_by_global_norm(jnp.float32(1.0)),
    "schedule": lambda: clip_by_global_norm(optax.linear_schedule(2.0, 0.5, 10)),
    "threshold": lambda: clip_by_global_norm(RUNNING_MEAN),
    "measure": lambda: clip_by_global_norm(None),
    "ord 1": lambda: clip_by_global_norm(1.0, ord=1),
    "ord 3": lambda: clip_by_global_norm(1.0, ord=3),
    "ord inf": lambda: clip_by_global_norm(1.0, ord=np.inf),
    "zero": lambda: clip_by_global_norm(1.0, nonfinite="zero"),
    "z-score": lambda: clip_by_global_norm(zscore_threshold(warmup_steps=1)),
    "quantile": lambda: clip_by_global_norm(quantile_threshold(0.5, window=3)),
    "skip": lambda: skip_by_global_norm(optax.scale(0.5), zscore_threshold()),
}
DTYPES = ["bfloat16", "float32", "complex64"] + [
    pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in ("float16", "float64", "complex128")
]


@pytest.fixture(params=FACTORIES)
def tx(request) -> Any:
    return FACTORIES[request.param]()


@pytest.fixture
def grads():
    return oracle.normals({"w": (3, 4), "b": (4,)}, scale=3)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_is_a_transformation_with_extra_args(tx, grads):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    expected = tx.update(grads, tx.init(grads), grads)
    found = tx.update(grads, tx.init(grads), grads, value=1.0, grad=grads, other=None)
    assert_same(found, expected)


def test_does_not_need_params(tx, grads):
    assert_same(
        tx.update(grads, tx.init(grads)), tx.update(grads, tx.init(grads), grads)
    )


def test_init_looks_at_nothing(tx, grads):
    abstract = jax.eval_shape(lambda: grads)
    masked = {"w": optax.MaskedNode(), "b": None}
    for params in (None, {}, abstract, masked, {"step": jnp.int32(3)}):
        assert_same(tx.init(params), tx.init(grads))


def test_state_keeps_its_type(tx, grads):
    state = tx.init(grads)
    for _ in range(2):
        _, new_state = tx.update(grads, state)
        assert types(new_state) == types(state)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        state = new_state
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(tx.init(grads)))


def test_state_has_the_same_types_with_x64(tx, grads):
    expected = [leaf.dtype for leaf in jax.tree.leaves(tx.init(grads))]
    with jax.enable_x64(True):
        state = tx.init(grads)
        _, later = tx.update(grads, state)
        wide = jax.tree.map(lambda g: g.astype(jnp.float64), grads)
        _, wider = tx.update(wide, state)
    for found in (state, later, wider):
        assert [leaf.dtype for leaf in jax.tree.leaves(found)] == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_dtypes_and_fits_cond(tx, dtype):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        grads = [jnp.ones(3, dtype), jnp.full((2, 2), 2, dtype)]
        updates, state = tx.update(grads, tx.init(grads))
        assert types(updates) == types(grads)

        @jax.jit
        def step(skip, state):
            return jax.lax.cond(
                skip, lambda: (grads, state), lambda: tx.update(grads, state)
            )

        assert types(step(False, state)) == types((grads, state))


def test_is_a_scan_carry(tx, grads):
    def step(carry, _):
        updates, state = carry
        return tx.update(updates, state), None

    (_, state), _ = jax.lax.scan(step, (grads, tx.init(grads)), length=3)
    assert state.num_updates == 3


def test_jit_and_eager_agree(tx, grads):
    eager = tx.update(grads, tx.init(grads))
    compiled = jax.jit(tx.update)(grads, tx.init(grads))
    jax.tree.map(lambda e, c: np.testing.assert_allclose(e, c, 1e-6), eager, compiled)


def test_second_call_compiles_nothing(tx, grads):
    _, state = tx.update(grads, tx.init(grads))
    with oracle.compilations() as compiled:
        tx.update(grads, state)
    assert not compiled


def test_vmap(tx, grads):
    batch = jax.tree.map(lambda g: jnp.stack([g, 2 * g, 0 * g]), grads)
    states = jax.vmap(tx.init)(batch)
    updates, states = jax.vmap(tx.update)(batch, states)
    for i in range(3):
        example = jax.tree.map(lambda g, i=i: g[i], batch)
        expected, state = tx.update(example, tx.init(example))
        found = jax.tree.map(lambda u, i=i: u[i], updates)
        jax.tree.map(
            lambda f, e: np.testing.assert_allclose(f, e, 1e-6), found, expected
        )
        np.testing.assert_allclose(states.global_norm[i], state.global_norm, 1e-6)


def test_donation(tx, grads):
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    expected = jax.tree.map(np.asarray, tx.update(grads, tx.init(grads)))
    found = step(jax.tree.map(jnp.copy, grads), tx.init(grads))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, 1e-6), found, expected)


def test_pickle(tx, grads):
    _, state = tx.update(grads, tx.init(grads))
    restored = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert_same(tx.update(grads, restored), tx.update(grads, state))


def test_fields_are_found_through_any_nesting(tx, grads):
    chain = optax.chain(optax.chain(optax.trace(0.9), tx), optax.scale(1.0))
    _, state = chain.update(grads, chain.init(grads))
    for name in state[0][1]._fields:
        found = optax.tree.get(state, name)
        assert_same(found, getattr(state[0][1], name))


# --- Inside Optax's own wrappers.


def test_map_params(tx, grads):
    """No part of the state is a parameter: none is sharded as one."""
    state = optax.tree.map_params(tx, lambda _: "a parameter", tx.init(grads))
    assert "a parameter" not in jax.tree.leaves(state)


@pytest.mark.usefixtures("optax_promotes")
def test_multi_steps(tx, grads):
    steps = optax.MultiSteps(tx, 2)
    state = steps.init(grads)
    first, state = steps.update(grads, state, grads)
    second, state = steps.update(grads, state, grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    expected, _ = tx.update(grads, tx.init(grads))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, 1e-5), second, expected)
    assert state.inner_opt_state.num_updates == 1


def test_inside_apply_if_finite(tx, grads):
    outer = optax.apply_if_finite(tx, 3)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, state = outer.update(bad, outer.init(grads))
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    _, state = outer.update(grads, state)
    # Its wrapped state is that of before the bad step.
    assert (state.inner_state.num_updates, state.total_notfinite) == (1, 1)


def test_around_apply_if_finite(tx, grads):
    chain = optax.chain(tx, optax.apply_if_finite(optax.sgd(1.0), 3))
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, state = chain.update(bad, chain.init(grads), grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    counted = optax.tree.get_all_with_path(state[0], "num_nonfinite")
    counted += optax.tree.get_all_with_path(state[0], "num_skipped")
    assert [state[0].num_updates, *(count for _, count in counted)] == [1, 1]


def test_masked(tx, grads):
    masked = optax.masked(tx, {"w": True, "b": False})
    updates, _ = masked.update(grads, masked.init(grads))
    expected, _ = tx.update({"w": grads["w"]}, tx.init(grads))
    np.testing.assert_array_equal(updates["w"], expected["w"])
    np.testing.assert_array_equal(updates["b"], grads["b"])


def test_partition_clips_each_group_by_its_own_norm(tx, grads):
    labels = {"w": "clip", "b": "freeze"}
    parts = optax.partition({"clip": tx, "freeze": optax.set_to_zero()}, labels)
    updates, _ = parts.update(grads, parts.init(grads))
    expected, _ = tx.update({"w": grads["w"]}, tx.init(grads))
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert not updates["b"].any()


@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("options", [{}, {"ord": 3}, {"static_args": "ord"}])
def test_inject_hyperparams(compile, options, grads):
    static = {key: options[key] for key in options if key == "static_args"}
    ord = options.get("ord", 2)
    tx = optax.inject_hyperparams(clip_by_global_norm, **static)(1.0, ord=ord)
    state = tx.init(grads)
    for max_norm in (1.0, 0.25):
        state.hyperparams["max_norm"] = jnp.float32(max_norm)
        updates, state = compile(tx.update)(grads, state, grads)
        np.testing.assert_allclose(oracle.norm(updates, ord), max_norm, 1e-5)
    assert state.inner_state.num_updates == 2


def test_inject_hyperparams_with_a_schedule(grads):
    schedule = optax.linear_schedule(1.0, 0.5, 2)
    tx = optax.inject_hyperparams(clip_by_global_norm)(schedule)
    state, updates = tx.init(grads), grads
    for expected in (1.0, 0.75, 0.5):
        updates, state = jax.jit(tx.update)(grads, state, grads)
        np.testing.assert_allclose(oracle.norm(updates), expected, 1e-5)


# --- On a mesh.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "compile",
    [pytest.param(lambda f: f, id="eager", marks=pytest.mark.slow), jax.jit],
)
def test_eight_devices(tx, axis_type, compile):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    host = oracle.normals({"w": (8, 4), "b": (8,), "r": (3,)}, scale=3)
    expected, expected_state = tx.update(host, tx.init(host))
    specs = {
        "w": PartitionSpec("data", "model"),
        "b": PartitionSpec("data"),
        "r": PartitionSpec(),
    }
    with jax.set_mesh(mesh):
        grads = {
            key: jax.device_put(host[key], NamedSharding(mesh, specs[key]))
            for key in host
        }
        state = tx.init(grads)
        updates, new_state = compile(tx.update)(grads, state)
        assert types(updates) == types(grads)
        assert types(new_state) == types(state)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, 1e-5),
        (updates, new_state),
        (expected, expected_state),
    )
    for key, spec in specs.items():
        assert updates[key].sharding.is_equivalent_to(
            NamedSharding(mesh, spec), updates[key].ndim
        )
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(new_state))
