"""metrics: where the states are found, and what they say."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

from optax_globalclip import (
    clip_by_global_norm,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
NAMES = """
    global_norm clipped_norm clip_scale threshold clip_fraction nonfinite_fraction
    """.split()
SKIP_NAMES = "global_norm threshold skip_fraction consecutive_skips".split()
SGD = optax.sgd(1.0)


def after_steps(tx, *scales):
    """The state after updates with gradients scaled so."""
    state = tx.init(PARAMS)
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: jnp.where(g == 0, 0, g * s), GRADS)
        _, state = tx.update(grads, state, PARAMS)
    return state


def after(tx, *scales):
    return metrics(after_steps(tx, *scales))


def test_before_the_first_update():
    found = after(clip_by_global_norm(1.0))
    assert found == dict(zip(NAMES, [0, 0, 1, np.inf, 0, 0], strict=True))
    found = after(skip_by_global_norm(SGD, 6.0))
    assert found == dict(zip(SKIP_NAMES, [0, np.inf, 0, 0], strict=True))


def test_after_updates():
    found = after(clip_by_global_norm(1.0), 0.1, 1, 0.01, 1)
    assert list(found) == NAMES
    expected = [5, 1, 0.2, 1, 0.5, 0]
    np.testing.assert_allclose([float(found[name]) for name in NAMES], expected, 1e-6)
    skip = skip_by_global_norm(SGD, 6.0)
    for scales, expected in (([1, 2, np.nan, 1], [5, 6, 0.5, 0]), ([1, 2, 2], None)):
        found = after(skip, *scales)
        assert list(found) == SKIP_NAMES
        assert list(found.values()) == (expected or [10, 6, np.float32(2 / 3), 2])
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


# --- Where they are found.

WRAPPERS = {
    "chain": lambda tx: optax.chain(tx, optax.adam(1.0)),
    "named_chain": lambda tx: optax.named_chain(("clip", tx), ("sgd", SGD)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.chain(
        optax.chain(optax.masked(tx, lambda _: {"w": True, "b": True}))
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda c: tx)(c=1.0),
    "partition": lambda tx: optax.partition({"all": tx}, {"w": "all", "b": "all"}),
}


def as_mappings(node, leaf=lambda array: array):
    """Mappings in place of tuples, and each array as a function has it."""
    if hasattr(node, "_asdict"):
        node = node._asdict()
    if isinstance(node, tuple):
        node = {str(i): part for i, part in enumerate(node)}
    if isinstance(node, dict):
        return {name: as_mappings(part, leaf) for name, part in node.items()}
    return node if node is None else leaf(node)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.usefixtures("optax_promotes")
def test_found_through_wrappers_in_every_form(wrap):
    for own, names in (
        (clip_by_global_norm(1.0), NAMES),
        (clip_by_global_norm(quantile_threshold(0.5)), NAMES),
        (skip_by_global_norm(SGD, zscore_threshold()), SKIP_NAMES),
    ):
        state = after_steps(wrap(own), 1)
        expected = metrics(state)
        assert sorted(expected) == sorted(names)
        assert expected["global_norm"] == 5
        assert jax.jit(metrics)(state) == expected
        assert metrics(as_mappings(state)) == expected
        # As Orbax restores an nnx.state without a target.
        values = as_mappings(state, lambda array: {"value": np.asarray(array)})
        assert metrics(values) == expected


def test_none_found_is_an_error():
    for state in (
        optax.adam(1.0).init(PARAMS),
        {"global_norm": jnp.ones(()), "threshold": jnp.ones(())},
    ):
        with pytest.raises(ValueError, match="clip_by_global_norm"):
            metrics(state)


# --- Names, where there are several.


def test_clip_and_skip_have_names_of_their_own_wherever_they_are():
    """Those of a clip in a skip tell of the last step taken."""
    clip = clip_by_global_norm(1.0)
    names = [f"skip/{name}" for name in SKIP_NAMES] + [f"clip/{name}" for name in NAMES]
    inside = after(skip_by_global_norm(optax.chain(clip, SGD), 6.0), 1, 2)
    assert sorted(inside) == sorted(names)
    assert (inside["skip/global_norm"], inside["clip/global_norm"]) == (10, 5)
    assert (inside["skip/skip_fraction"], inside["clip/clip_fraction"]) == (0.5, 1)
    beside = after(optax.chain(clip, skip_by_global_norm(SGD, 6.0)), 1)
    assert sorted(beside) == sorted(names)


def test_more_states_are_told_apart_by_their_paths():
    transforms = {"big": clip_by_global_norm(1.0), "small": clip_by_global_norm(0.1)}
    found = after(optax.partition(transforms, {"w": "big", "b": "small"}), 1)
    assert len(found) == 2 * len(NAMES)
    for group, norm in (("big", 3), ("small", 4)):
        (name,) = [n for n in found if group in n and n.endswith("/global_norm")]
        assert found[name] == norm

    skip = skip_by_global_norm(clip_by_global_norm(1.0), 6.0)
    masked = optax.masked(skip, {"w": True, "b": True})
    found = after(optax.chain(masked, clip_by_global_norm(None)), 1)
    prefixes = {name.rpartition("/")[0] for name in found}
    assert prefixes == {"0/inner_state", "0/inner_state/inner_state", "1"}


def clip_state(norm):
    return clip_by_global_norm(1.0).init(None)._replace(global_norm=jnp.float32(norm))


COLLIDING = {
    "a slash in a key": lambda s: {"a/b": s(1), "a": {"b": s(2)}},
    "a slash at its end": lambda s: {"a/": {"b": s(1)}, "a": {"/b": s(2)}},
    "a number and its name": lambda s: {"x": {1: s(1)}, "y": {"1": s(2)}, "z": s(3)},
    "an index and its name": lambda s: {"x": (s(1),), "x/0": s(2)},
    "a field's name": lambda s: {"x": optax.MaskedState(s(1)), "x/inner_state": s(2)},
    "a metric's name": lambda s: (s(1), {"0/global_norm": s(2)}),
    "an empty key": lambda s: {"": s(1), "a": s(2), "/a": s(3)},
    "an empty key above": lambda s: {"": {"a": s(1)}, "a": s(2)},
    "an escaped slash": lambda s: {"a\\/b": s(1), "a/b": s(2), "a\\": {"b": s(3)}},
    "a quoted slash": lambda s: {"a%2Fb": s(1), "a/b": s(2), "a": {"b": s(3)}},
    "a suffix": lambda s: {"a/b": s(1), "a": {"b": s(2)}, "a/b_1": s(3), "a/b#2": s(4)},
    "keys in brackets": lambda s: {"['a']": s(1), "a": s(2), "'a'": s(3)},
    # JAX sorts no mixed keys, but an OrderedDict keeps its own order.
    "a key and its name": lambda s: collections.OrderedDict({1: s(1), "1": s(2)}),
    "a bool and its name": lambda s: collections.OrderedDict(
        {True: s(1), "True": s(2)}
    ),
}


def assert_none_lost(tree, count):
    found = metrics(tree)
    norms = [found[name] for name in found if name.split("/")[-1] == "global_norm"]
    assert len(found) == count * len(NAMES)
    assert sorted(map(float, norms)) == list(range(1, count + 1))


def test_no_metric_is_lost_where_paths_read_the_same():
    for make in COLLIDING.values():
        norms = []
        tree = make(lambda norm, norms=norms: norms.append(norm) or clip_state(norm))
        assert_none_lost(tree, len(norms))


@given(
    st.recursive(
        st.none(),
        lambda inner: st.dictionaries(
            st.text("a/1\\_", max_size=3), inner, min_size=1, max_size=3
        ),
        max_leaves=5,
    ).filter(lambda tree: isinstance(tree, dict))
)
def test_no_metric_is_lost_in_any_nest(tree):
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda node: node is None)
    states = [clip_state(norm + 1) for norm in range(len(leaves))]
    assert_none_lost(treedef.unflatten(states), len(states))


def test_names_without_a_collision_are_the_plain_paths():
    state = {"a": (clip_state(1), clip_state(2)), "b": {"c": clip_state(3)}}
    prefixes = {name.removesuffix("/clip_scale") for name in metrics(state)}
    assert {"a/0", "a/1", "b/c"} <= prefixes
