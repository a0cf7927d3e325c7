"""The states: what stands for them, what they survive, who finds them."""

import collections

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import given, strategies as st
from jax import export

from optax_globalclip import (
    ClipByGlobalNormState,
    Threshold,
    clip_by_global_norm,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = oracle.RUNS_OPTAX

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
CLIP_METRICS = 6
SKIP_METRICS = 3


def keep(leaves):
    """A transformation that keeps the last updates: a state that is a dictionary."""
    del leaves
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )


# No state of Optax's own in them that is an empty container.
TRANSFORMATIONS = {
    "number": lambda: clip_by_global_norm(1.0),
    "schedule": lambda: clip_by_global_norm(optax.linear_schedule(1.0, 2.0, 9)),
    "None": lambda: clip_by_global_norm(None),
    "z-score": lambda: clip_by_global_norm(zscore_threshold(warmup_steps=2)),
    "quantile": lambda: clip_by_global_norm(
        quantile_threshold(0.5, window=4, warmup_steps=2)
    ),
    "skip": lambda: skip_by_global_norm(optax.scale_by_adam(), 6.0),
    "skip by z-score": lambda: skip_by_global_norm(
        clip_by_global_norm(1.0), zscore_threshold(6.0, warmup_steps=2)
    ),
    "skip by quantile": lambda: skip_by_global_norm(
        keep(()), quantile_threshold(0.9, window=4), max_consecutive_skips=3
    ),
}
each_transformation = pytest.mark.parametrize(
    "make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS
)


def after_steps(tx, *scales):
    """The state after updates with gradients scaled so."""
    state = tx.init(PARAMS)
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: g * s, GRADS)
        _, state = tx.update(grads, state, PARAMS)
    return state


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- States of others.


def train_state(tx):
    return TrainState.create(apply_fn=None, params=PARAMS, tx=tx)


FOREIGN = {
    "None": None,
    "EmptyState": optax.EmptyState(),
    "()": (),
    "[]": [],
    "...": ...,
    "an int": 3,
    "a string": "state",
    "an array": np.zeros(3),
    "a TrainState": train_state(optax.adam(1.0)),
    "a TrainState with a clip": train_state(clip_by_global_norm(1.0)),
    "adam's": optax.scale_by_adam().init(PARAMS),
    "Optax's clip's": optax.clip_by_global_norm(1.0).init(PARAMS),
    "an opt_state": optax.chain(clip_by_global_norm(1.0), optax.adam(1.0)).init(PARAMS),
    "a skip's": skip_by_global_norm(optax.identity()).init(PARAMS),
    "a dictionary of ours": clip_by_global_norm(1.0).init(PARAMS)._asdict(),
    "a tuple of ours": tuple(clip_by_global_norm(1.0).init(PARAMS)),
    "a threshold's": zscore_threshold().init(),
    "a type": ClipByGlobalNormState,
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("state", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize(
    "max_norm",
    [
        pytest.param(1.0, id="number"),
        pytest.param(optax.constant_schedule(1.0), id="schedule"),
        pytest.param(zscore_threshold(), id="z-score", marks=pytest.mark.slow),
        pytest.param(quantile_threshold(0.5), id="quantile"),
    ],
)
def test_any_other_state_is_that_before_the_first_update(max_norm, state, jitted):
    tx = clip_by_global_norm(max_norm)

    def update(grads):
        return tx.update(grads, state)

    updates, new_state = (jax.jit(update) if jitted else update)(GRADS)
    adaptive = isinstance(max_norm, Threshold)
    expected = GRADS if adaptive else oracle.clipped(GRADS, 1.0)
    for name in GRADS:
        np.testing.assert_allclose(updates[name], expected[name], 1e-6)
    assert (new_state.global_norm, new_state.num_updates) == (5, 1)
    assert jax.tree.structure(new_state) == jax.tree.structure(tx.init(PARAMS))


@pytest.mark.parametrize("name", ["a TrainState", "adam's", "an opt_state", "a skip's"])
def test_another_state_may_be_an_operand_of_jit(name):
    updates, state = jax.jit(clip_by_global_norm(1.0).update)(GRADS, FOREIGN[name])
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-6)
    assert state.num_updates == 1


# --- init and the fields.


def test_debug_infs_raises_on_an_inf():
    with jax.debug_infs(True), pytest.raises(FloatingPointError):
        jnp.divide(1.0, jnp.zeros(2))


@each_transformation
def test_init_passes_while_jax_looks_for_infs(make):
    with jax.debug_infs(True):
        state = make().init(PARAMS)
    assert state.threshold == np.inf


def without_memory(empty):
    """A threshold of 1 whose state has no leaves."""
    return Threshold(lambda: empty, lambda norm, state, count: (1.0, state))


WITHOUT_MEMORY = {
    "number": 1.0,
    "NumPy number": np.float32(1),
    "array": jnp.float32(1),
    "schedule": optax.constant_schedule(1.0),
    "None": None,
    "Threshold of ()": without_memory(()),
    "Threshold of []": without_memory([]),
    "Threshold of {}": without_memory({}),
    "Threshold of None": without_memory(None),
    "Threshold of empty ones": without_memory(((), {"a": []})),
    "Threshold of EmptyState": without_memory(optax.EmptyState()),
}


@pytest.mark.parametrize("max_norm", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
def test_threshold_without_memory_has_none_as_its_state(max_norm):
    for tx in (
        clip_by_global_norm(max_norm),
        skip_by_global_norm(keep(()), max_norm),
    ):
        state = tx.init(PARAMS)
        assert state.threshold_state is None
        _, state = tx.update(GRADS, state, PARAMS)
        assert state.threshold_state is None
        _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        assert state.threshold_state is None


def containers(node):
    """Every container in a tree of containers, the outer ones first."""
    if isinstance(node, dict | list | tuple):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            yield from containers(child)


@each_transformation
@pytest.mark.parametrize("scales", [(), (1,), (1, 2, 0.5)])
def test_no_container_in_the_state_is_empty(make, scales):
    state = after_steps(make(), *scales)
    assert all(containers(state))
    assert all(containers(flax.serialization.to_state_dict(state)))


@each_transformation
def test_buffers_of_the_state_are_distinct_and_can_be_donated(make):
    tx = make()
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(PARAMS)
    _, state_of_eager = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for each in (state, state_of_eager):
        held = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(each)]
        assert len(set(held)) == len(held)
        for _ in range(3):
            _, each = step(GRADS, each, PARAMS)
        assert int(each.num_updates) >= 3


# --- Conversions and checkpoints.


def by_bytes(state, like, path):
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))


def by_flat_dict(state, like, path):
    """As converters do that know dictionaries of arrays only: they lose empty ones."""
    nested = flax.serialization.to_state_dict(state)
    flat = flax.traverse_util.flatten_dict(nested)
    nested = flax.traverse_util.unflatten_dict(flat)
    return flax.serialization.from_state_dict(like, nested)


def by_joined_names(state, like, path):
    nested = flax.serialization.to_state_dict(state)
    flat = flax.traverse_util.flatten_dict(nested, sep="/")
    nested = flax.traverse_util.unflatten_dict(flat, sep="/")
    return flax.serialization.from_state_dict(like, nested)


def by_nnx(state, like, path):
    """Through the state of Flax NNX, as conversions from Linen to NNX go."""
    nested = flax.serialization.to_state_dict(state)
    nnx_state = nnx.State(jax.tree.map(nnx.Variable, nested))
    flat = dict(nnx.to_flat_state(nnx_state))
    pure = nnx.to_pure_dict(nnx.from_flat_state(flat))
    return flax.serialization.from_state_dict(like, with_none_leaves(pure, nested))


def with_none_leaves(pure, nested):
    """The dictionary, with None where there was None: a leaf of Linen's, not NNX's."""
    return {
        name: with_none_leaves(pure[name], child)
        if isinstance(child, dict)
        else pure.get(name)
        for name, child in nested.items()
    }


def by_orbax(state, like, path):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


def by_nothing(state, like, path):
    return state


CONVERSIONS = [by_bytes, by_flat_dict, by_joined_names, by_nnx, by_orbax]


@each_transformation
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_conversions_keep_the_whole_state(make, convert, tmp_path):
    tx = make()
    state = after_steps(tx, 1, 2, 0.5)
    found = convert(state, tx.init(PARAMS), tmp_path / "state")
    assert_equal(found, state)


# --- Checkpoints written with Optax's clip.


def adopted(new, old):
    """The recipe of the documentation: an Optax state with our clips in it."""
    return jax.tree.map(
        lambda new, old: new if isinstance(new, ClipByGlobalNormState) else old,
        new,
        old,
        is_leaf=lambda node: isinstance(node, ClipByGlobalNormState),
    )


def returned(ours, optaxs):
    """The way back: our state without our clips."""
    return jax.tree.map(
        lambda ours, optaxs: (
            optaxs if isinstance(ours, ClipByGlobalNormState) else ours
        ),
        ours,
        optaxs,
        is_leaf=lambda node: isinstance(node, ClipByGlobalNormState),
    )


OPTIMIZERS = {
    "chain": lambda clip: optax.chain(clip(1.0), optax.adamw(0.1)),
    "nested": lambda clip: optax.chain(
        optax.chain(clip(1.0)), optax.sgd(0.1, 0.9), clip(0.1)
    ),
    "MultiSteps": lambda clip: optax.MultiSteps(
        optax.chain(clip(1.0), optax.adam(0.1)), 2
    ),
    "apply_if_finite": lambda clip: optax.apply_if_finite(
        optax.chain(clip(1.0), optax.adam(0.1)), 3
    ),
    "masked": lambda clip: optax.masked(
        optax.chain(clip(1.0), optax.sgd(0.1, 0.9)), {"w": True, "b": False}
    ),
    "partition": lambda clip: optax.partition(
        {"one": optax.chain(clip(1.0), optax.adam(0.1)), "other": clip(0.5)},
        {"w": "one", "b": "other"},
    ),
    "inject_hyperparams": lambda clip: optax.inject_hyperparams(
        lambda rate: optax.chain(clip(1.0), optax.adam(rate))
    )(0.1),
}


# Flax writes no OrderedDict, orbax no state that is nothing but empty.
ONLY_IN_MEMORY = {
    "clip alone": lambda clip: clip(1.0),
    "named_chain": lambda clip: optax.named_chain(
        ("clip", clip(1.0)), ("adam", optax.adam(0.1))
    ),
}
CHECKPOINTS = [
    pytest.param(
        wrap,
        restored,
        id=f"{name}-{restored.__name__}",
        marks=[pytest.mark.slow] * (restored is by_bytes),
    )
    for name, wrap in (OPTIMIZERS | ONLY_IN_MEMORY).items()
    for restored in (by_nothing, by_bytes, by_orbax)
    if name in OPTIMIZERS or restored is by_nothing
]


def trained(tx, state, scales):
    """All updates, with gradients scaled so, and the last state."""
    step, found = jax.jit(tx.update), []
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: g * s, GRADS)
        updates, state = step(grads, state, PARAMS)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(("wrap", "restored"), CHECKPOINTS)
def test_optax_checkpoint_goes_on_with_ours_and_back(wrap, restored, tmp_path):
    optaxs, ours = wrap(optax.clip_by_global_norm), wrap(clip_by_global_norm)
    _, old = trained(optaxs, optaxs.init(PARAMS), [1.0, 0.1, 2.0])
    old = restored(old, optaxs.init(PARAMS), tmp_path / "old")

    state = adopted(ours.init(PARAMS), old)
    assert jax.tree.structure(state) == jax.tree.structure(ours.init(PARAMS))
    found, state = trained(ours, state, [1.5, 0.05, 3.0])
    expected, expected_state = trained(optaxs, old, [1.5, 0.05, 3.0])
    for pair in zip(found, expected, strict=True):
        jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, 1e-5), *pair)
    assert metrics(state)

    state = restored(state, ours.init(PARAMS), tmp_path / "new")
    state = returned(state, optaxs.init(PARAMS))
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    found, _ = trained(optaxs, state, [0.7, 2.0])
    expected, _ = trained(optaxs, expected_state, [0.7, 2.0])
    for pair in zip(found, expected, strict=True):
        jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, 1e-5), *pair)


# --- Metrics of states that have become mappings.


def in_nnx(tx):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: 100 * jnp.sum(model(jnp.ones((1, 2)))))(model)
    optimizer.update(model, grads)
    return optimizer


NESTS = {
    "clip": lambda: optax.chain(clip_by_global_norm(1.0), optax.adam(0.1)),
    "z-score": lambda: optax.chain(
        clip_by_global_norm(zscore_threshold()), optax.sgd(0.1)
    ),
    "skip": lambda: skip_by_global_norm(optax.adam(0.1), 6.0),
    "clip in a skip": lambda: skip_by_global_norm(
        optax.chain(clip_by_global_norm(1.0), optax.adam(0.1)), zscore_threshold()
    ),
    "two clips": lambda: optax.chain(
        clip_by_global_norm(1.0), optax.adam(0.1), clip_by_global_norm(0.1)
    ),
}
each_nest = pytest.mark.parametrize("make", NESTS.values(), ids=NESTS)


def assert_same_metrics(found, expected):
    """As many, of the same last names, with the same values."""

    def pairs(each):
        return sorted((name.split("/")[-1], float(each[name])) for name in each)

    assert expected
    assert pairs(found) == pairs(expected)


@each_nest
@pytest.mark.parametrize(
    "view",
    [
        nnx.state,
        lambda optimizer: nnx.to_pure_dict(nnx.state(optimizer)),
        lambda optimizer: nnx.split(optimizer)[1],
        lambda optimizer: nnx.state(optimizer, nnx.optimizer.OptState),
    ],
    ids=["state", "pure dict", "split", "filtered"],
)
def test_metrics_of_an_nnx_state(make, view):
    optimizer = in_nnx(make())
    expected = metrics(optimizer.opt_state)
    assert_same_metrics(metrics(view(optimizer)), expected)
    assert_same_metrics(jax.jit(metrics)(view(optimizer)), expected)


@each_nest
def test_metrics_of_a_state_dict(make):
    state = after_steps(make(), 1, 2)
    nested = flax.serialization.to_state_dict(state)
    assert_same_metrics(metrics(nested), metrics(state))
    msgpack = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    assert_same_metrics(metrics(msgpack), metrics(state))


@each_nest
def test_metrics_of_a_train_state(make):
    state = train_state(make()).apply_gradients(grads=GRADS)
    expected = metrics(state.opt_state)
    assert_same_metrics(metrics(state), expected)
    assert_same_metrics(metrics(flax.serialization.to_state_dict(state)), expected)


@each_nest
def test_metrics_of_an_orbax_checkpoint_restored_without_target(make, tmp_path):
    state = after_steps(make(), 1, 2)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(tmp_path / "state")
    assert not isinstance(found, type(state)) or type(found) is not tuple
    assert_same_metrics(metrics(found), metrics(state))


def test_mapping_with_some_of_the_fields_is_none_of_ours():
    assert metrics({"global_norm": jnp.ones(()), "threshold": jnp.ones(())}) == {}


# --- Names of metrics.


def clip_state(norm):
    return clip_by_global_norm(1.0).init(None)._replace(global_norm=jnp.float32(norm))


COLLIDING = {
    "a slash in a key": lambda s: {"a/b": s(1), "a": {"b": s(2)}},
    "a slash at its end": lambda s: {"a/": {"b": s(1)}, "a": {"/b": s(2)}},
    "a number and its name": lambda s: {"x": {1: s(1)}, "y": {"1": s(2)}, "z": s(3)},
    "an index and its name": lambda s: {"x": (s(1),), "x/0": s(2)},
    "a field and its name": lambda s: {
        "x": optax.MaskedState(s(1)),
        "x/inner_state": s(2),
    },
    "a metric's name": lambda s: (s(1), {"0/global_norm": s(2)}),
    "an empty key": lambda s: {"": s(1), "a": s(2), "/a": s(3)},
    "an empty key above": lambda s: {"": {"a": s(1)}, "a": s(2)},
    "an escaped slash": lambda s: {"a\\/b": s(1), "a/b": s(2), "a\\": {"b": s(3)}},
    "a quoted slash": lambda s: {"a%2Fb": s(1), "a/b": s(2), "a": {"b": s(3)}},
    "a suffix": lambda s: {"a/b": s(1), "a": {"b": s(2)}, "a/b_1": s(3), "a/b#2": s(4)},
    "keys in brackets": lambda s: {"['a']": s(1), "a": s(2), "'a'": s(3)},
}


def assert_none_lost(tree, count):
    found = metrics(tree)
    norms = [found[name] for name in found if name.split("/")[-1] == "global_norm"]
    assert len(found) == count * CLIP_METRICS
    assert sorted(map(float, norms)) == list(range(1, count + 1))


@pytest.mark.parametrize("make", COLLIDING.values(), ids=COLLIDING)
def test_no_metric_is_lost_where_paths_read_the_same(make):
    norms = []

    def draw(norm):
        norms.append(norm)
        return clip_state(norm)

    assert_none_lost(make(draw), len(norms))


@pytest.mark.parametrize("keys", [(1, "1"), (0, "0"), (-1, "-1"), (True, "True")])
def test_no_metric_is_lost_among_keys_that_print_the_same(keys):
    """JAX sorts no mixed keys, but an OrderedDict keeps its own order."""
    mapping = collections.OrderedDict(
        {key: clip_state(i + 1) for i, key in enumerate(keys)}
    )
    assert_none_lost(mapping, 2)


def test_no_metric_is_lost_in_a_named_chain():
    tx = optax.named_chain(
        ("a/b", clip_by_global_norm(1.0)),
        ("a", optax.named_chain(("b", clip_by_global_norm(2.0)))),
    )
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    found = metrics(state)
    assert len(found) == 2 * CLIP_METRICS
    thresholds = [found[name] for name in found if name.endswith("/threshold")]
    assert sorted(thresholds) == [1, 2]


KEYS = st.text("a/1\\_", max_size=3)


@given(
    st.recursive(
        st.none(),
        lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3),
        max_leaves=5,
    ).filter(lambda tree: isinstance(tree, dict))
)
def test_no_metric_is_lost_in_any_nest(tree):
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda node: node is None)
    states = [clip_state(norm + 1) for norm in range(len(leaves))]
    if len(states) > 1:
        assert_none_lost(treedef.unflatten(states), len(states))


def test_names_without_a_collision_are_the_plain_paths():
    state = {"a": (clip_state(1), clip_state(2)), "b": {"c": clip_state(3)}}
    prefixes = {name.removesuffix("/clip_scale") for name in metrics(state)}
    assert {"a/0", "a/1", "b/c"} <= prefixes


# --- Export.


# Optax registers no serialization for its own states, such as adam's in "skip".
@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "skip"])
def test_exported_step_gives_the_same_when_it_is_read_back(name):
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
    tx = TRANSFORMATIONS[name]()
    step = jax.jit(tx.update)
    state = after_steps(tx, 1, 2, 0.5)
    exported = export.export(step)(GRADS, state, PARAMS)
    read = export.deserialize(exported.serialize())
    assert_equal(read.call(GRADS, state, PARAMS), step(GRADS, state, PARAMS))
