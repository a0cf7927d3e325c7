"""What every Optax transformation promises, for each of our factories and options."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax import contrib

from optax_globalclip import (
    ClipByGlobalNormState,
    Threshold,
    clip_by_global_norm,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

RUNNING_MEAN = Threshold(
    init=lambda: (np.float32(np.inf), jnp.int32(0)),
    update=lambda norm, state, count: (state[0], (norm, state[1] + 1)),
)
HALF = optax.GradientTransformation(
    lambda params: None,
    lambda updates, state, params=None: (jax.tree.map(lambda u: u / 2, updates), state),
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
    "skip": lambda: skip_by_global_norm(HALF, zscore_threshold()),
}
DTYPES = ["bfloat16", "float32", "complex64"] + [
    pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in ("float16", "float64", "complex128")
]


@pytest.fixture(params=FACTORIES)
def tx(request):
    return FACTORIES[request.param]()


@pytest.fixture
def grads():
    return oracle.normals({"w": (3, 4), "b": (4,)}, scale=3)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def assert_same(found, expected, tolerance=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for pair in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(*pair, tolerance)


def test_is_a_transformation_that_needs_neither_params_nor_extra_args(tx, grads):
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    expected = tx.update(grads, tx.init(grads), grads)
    found = tx.update(grads, tx.init(grads), grads, value=1.0, grad=grads, other=None)
    assert_same(found, expected)
    assert_same(tx.update(grads, tx.init(grads)), expected)


def test_init_looks_at_nothing(tx, grads):
    abstract = jax.eval_shape(lambda: grads)
    masked = {"w": optax.MaskedNode(), "b": None}
    for params in (None, {}, abstract, masked, {"step": jnp.int32(3)}):
        assert_same(tx.init(params), tx.init(grads))
    with jax.debug_infs(True):
        assert tx.init(grads).threshold == np.inf
        with pytest.raises(FloatingPointError):
            jnp.divide(1.0, jnp.zeros(2))


def test_state_keeps_its_type_with_and_without_x64(tx, grads):
    state = tx.init(grads)
    expected = types(state)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    for _ in range(2):
        _, state = tx.update(grads, state)
        assert types(state) == expected
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda g: g.astype(jnp.float64), grads)
        assert types(tx.init(grads)) == expected
        assert types(tx.update(grads, tx.init(grads))[1]) == expected
        assert types(tx.update(wide, tx.init(grads))[1]) == expected


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
        return tx.update(*carry), None

    (_, state), _ = jax.lax.scan(step, (grads, tx.init(grads)), length=3)
    assert state.num_updates == 3


def test_jit_and_donation_change_nothing_and_eager_compiles_once(tx, grads):
    expected, state = tx.update(grads, tx.init(grads))
    with oracle.compilations() as compiled:
        tx.update(grads, state)
    assert not compiled
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    first = tx.init(grads)
    for each in (first, state):
        held = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(each)]
        assert len(set(held)) == len(held)
    found = step(jax.tree.map(jnp.copy, grads), first)
    assert_same(found, (expected, state), 1e-6)
    _, later = step(jax.tree.map(jnp.copy, grads), found[1])
    assert later.num_updates == 2


def test_vmap(tx, grads):
    batch = jax.tree.map(lambda g: jnp.stack([g, 2 * g, 0 * g]), grads)
    states = jax.vmap(tx.init)(batch)
    updates, states = jax.vmap(tx.update)(batch, states)
    for i in range(3):
        example, found = jax.tree.map(lambda x, i=i: x[i], (batch, updates))
        expected, state = tx.update(example, tx.init(example))
        assert_same(found, expected, 1e-6)
        np.testing.assert_allclose(states.global_norm[i], state.global_norm, 1e-6)


def test_exported_step_gives_the_same_when_it_is_read_back(tx, grads):
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers")
    step = jax.jit(tx.update)
    _, state = step(grads, tx.init(grads))
    read = export.deserialize(export.export(step)(grads, state).serialize())
    assert_same(read.call(grads, state), step(grads, state))


def test_fields_are_found_through_any_nesting_and_none_is_a_parameter(tx, grads):
    chain = optax.chain(optax.chain(optax.trace(0.9), tx), optax.scale(1.0))
    _, state = chain.update(grads, chain.init(grads))
    own = state[0][1]
    for name in own._fields:
        assert_same(optax.tree.get(state, name), getattr(own, name))
    marked = optax.tree.map_params(tx, lambda _: "a parameter", tx.init(grads))
    assert "a parameter" not in jax.tree.leaves(marked)


# --- States of others, which count as that before the first update.

PARAMS = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
OURS = clip_by_global_norm(1.0).init(PARAMS)
FOREIGN = {
    "None": None,
    "EmptyState": optax.EmptyState(),
    "()": (),
    "[]": [],
    "...": ...,
    "an int": 3,
    "a string": "state",
    "an array": np.zeros(3),
    "adam's": optax.scale_by_adam().init(PARAMS),
    "an opt_state": optax.chain(clip_by_global_norm(1.0), optax.adam(1.0)).init(PARAMS),
    "a skip's": skip_by_global_norm(optax.identity()).init(PARAMS),
    "a dictionary of ours": OURS._asdict(),
    "a tuple of ours": tuple(OURS),
    "a threshold's": zscore_threshold().init(),
    "a type": ClipByGlobalNormState,
}
THRESHOLDS = [1.0, optax.constant_schedule(1.0), zscore_threshold()]


@pytest.mark.parametrize("max_norm", [*THRESHOLDS, quantile_threshold(0.5)])
@pytest.mark.parametrize("state", FOREIGN.values(), ids=FOREIGN)
def test_any_other_state_is_that_before_the_first_update(max_norm, state):
    tx = clip_by_global_norm(max_norm)
    expected = tx.update(GRADS, tx.init(PARAMS))
    assert_same(tx.update(GRADS, state), expected)
    assert_same(jax.jit(lambda grads: tx.update(grads, state))(GRADS), expected, 1e-6)
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state)):
        assert_same(jax.jit(tx.update)(GRADS, state), expected, 1e-6)


@pytest.mark.parametrize("nothing", [None, (), [], {}], ids=repr)
def test_threshold_state_without_leaves_is_that_before_the_first_update(nothing):
    """As a clip by a number keeps it, now (None) or in an older checkpoint."""
    tx = clip_by_global_norm(zscore_threshold())
    fresh = tx.init(None)
    found = tx.update(GRADS, fresh._replace(threshold_state=nothing))
    assert_same(found, tx.update(GRADS, fresh))


# --- Inside Optax's own wrappers.


@pytest.mark.usefixtures("optax_promotes")
def test_multi_steps(tx, grads):
    steps = optax.MultiSteps(tx, 2)
    first, state = steps.update(grads, steps.init(grads), grads)
    second, state = steps.update(grads, state, grads)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    assert_same(second, tx.update(grads, tx.init(grads))[0], 1e-5)
    assert state.inner_opt_state.num_updates == 1


def test_inside_and_around_apply_if_finite(tx, grads):
    outer = optax.apply_if_finite(tx, 3)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    updates, state = outer.update(bad, outer.init(grads))
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    _, state = outer.update(grads, state)
    # Its wrapped state is that of before the bad step.
    assert (state.inner_state.num_updates, state.total_notfinite) == (1, 1)

    chain = optax.chain(tx, optax.apply_if_finite(optax.sgd(1.0), 3))
    _, (state, _) = chain.update(bad, chain.init(grads), grads)
    counter = "num_nonfinite" if hasattr(state, "num_nonfinite") else "num_skipped"
    assert (state.num_updates, getattr(state, counter)) == (1, 1)


def test_masked_and_partition_clip_by_the_norm_of_their_leaves(tx, grads):
    expected, _ = tx.update({"w": grads["w"]}, tx.init(grads))
    masked = optax.masked(tx, {"w": True, "b": False})
    updates, _ = masked.update(grads, masked.init(grads))
    assert_same(updates, {"w": expected["w"], "b": grads["b"]})
    groups = {"clip": tx, "freeze": optax.set_to_zero()}
    parts = optax.partition(groups, {"w": "clip", "b": "freeze"})
    updates, _ = parts.update(grads, parts.init(grads))
    assert_same(updates, {"w": expected["w"], "b": 0 * grads["b"]})


# --- Inside and before each wrapper on the page: whose norm is clipped to 1.

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "wrappers.md").read_text()
CLIP = clip_by_global_norm(1.0)
SAME, DOUBLE, DOWN = optax.identity(), optax.scale(2.0), optax.scale(-1.0)
CHAIN = optax.chain(CLIP, optax.scale(10.0))
NAMED = optax.named_chain(("a", optax.scale(10.0)), ("b", CLIP))
ONLY_W, FROZEN = {"w": True, "b": False}, {"w": False, "b": True}
GROUPS = {"w": "one", "b": "other"}
EACH = optax.partition({"one": CLIP, "other": CLIP}, GROUPS)
EITHER = optax.partition({"one": DOUBLE, "other": optax.set_to_zero()}, GROUPS)
# Later than Optax 0.2.5.
selective = getattr(optax, "selective_transform", None)
MEAN = optax.MultiSteps(SAME, 2).gradient_transformation()
LATER = optax.conditionally_transform(CLIP, lambda step: step >= 1)
MASKED_LATER = optax.conditionally_mask(CLIP, lambda step: step >= 1)
PLATEAU = contrib.reduce_on_plateau(factor=0.5, patience=1)
NOISE = contrib.differentially_private_aggregate(10.0, 0.0, 0)
NAN = np.nan
INSIDE, BEFORE = skip_by_global_norm(CLIP, 6.0), skip_by_global_norm(SAME, 6.0)

# The name on the page, the transformation, by what the gradients of norm 5 are scaled
# at each step, the updates of each step, and metrics after the last.
ROWS = [
    ("chain", CHAIN, [1], [(6, 8)], {"global_norm": 5}),
    ("named_chain", NAMED, [1], [(0.6, 0.8)], {"global_norm": 50}),
    ("masked", optax.masked(CLIP, ONLY_W), [1], [(1, 4)], {"global_norm": 3}),
    ("masked", optax.chain(CLIP, optax.masked(DOUBLE, ONLY_W)), [1], [(1.2, 0.8)], {}),
    ("partition", EACH, [1], [(1, 1)], {}),
    ("partition", optax.chain(CLIP, EITHER), [1], [(1.2, 0)], {}),
    (
        "MultiSteps",
        optax.MultiSteps(CLIP, 2),
        [1, 3],
        [(0, 0), (0.6, 0.8)],
        {"global_norm": 10},
    ),
    (
        "MultiSteps",
        optax.chain(CLIP, MEAN),
        [0.1, 3],
        [(0, 0), (0.45, 0.6)],
        {"clip_fraction": 0.5},
    ),
    (
        "apply_every",
        optax.chain(CLIP, optax.apply_every(2)),
        [0.1, 3],
        [(0, 0), (0.9, 1.2)],
        {},
    ),
    (
        "apply_every",
        optax.chain(optax.apply_every(2), CLIP),
        [1, 3],
        [(0, 0), (0.6, 0.8)],
        {"global_norm": 20},
    ),
    (
        "apply_if_finite",
        optax.apply_if_finite(CLIP, 3),
        [NAN, 1],
        [(0, 0), (0.6, 0.8)],
        {"nonfinite_fraction": 0},
    ),
    (
        "apply_if_finite",
        optax.chain(CLIP, optax.apply_if_finite(SAME, 3)),
        [NAN, 1],
        [(0, 0), (0.6, 0.8)],
        {"nonfinite_fraction": 0.5},
    ),
    (
        "conditionally_transform",
        LATER,
        [1, 1],
        [(3, 4), (0.6, 0.8)],
        {"clip_fraction": 1},
    ),
    ("conditionally_mask", MASKED_LATER, [1, 1], [(0, 0), (0.6, 0.8)], {}),
    (
        "skip_by_global_norm",
        INSIDE,
        [9, 1],
        [(0, 0), (0.6, 0.8)],
        {"skip/skip_fraction": 0.5},
    ),
    ("skip_by_global_norm", optax.chain(CLIP, BEFORE), [9], [(0.6, 0.8)], {}),
]
if selective:
    SOME, THAW = (selective(tx, freeze_mask=FROZEN) for tx in (CLIP, SAME))
    ROWS += [
        ("selective_transform", SOME, [1], [(1, 0)], {}),
        ("selective_transform", optax.chain(CLIP, THAW), [1], [(0.6, 0)], {}),
    ]


def steps(tx, *scales, params=PARAMS, **extra):
    """The updates of each step, and the last state."""
    state, found = tx.init(params), []
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: jnp.where(g == 0, 0, g * s), GRADS)
        updates, state = tx.update(grads, state, params, **extra)
        found.append(updates)
    return found, state


def assert_updates(updates, w, b, tolerance=1e-6):
    np.testing.assert_allclose(updates["w"], [w, 0], tolerance)
    np.testing.assert_allclose(updates["b"], [b], tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize(
    ("tx", "scales", "expected", "measured"),
    [row[1:] for row in ROWS],
    ids=[row[0] for row in ROWS],
)
def test_row_of_the_page_about_wrappers(tx, scales, expected, measured):
    found, state = steps(tx, *scales)
    for updates, right in zip(found, expected, strict=True):
        assert_updates(updates, *right)
    for name, right in measured.items():
        np.testing.assert_allclose(metrics(state)[name], right, 1e-6)


# Those that need something of their own.


def lookahead():
    params = optax.LookaheadParams.init_synced(PARAMS)
    inside = optax.lookahead(optax.chain(CLIP, DOWN), 2, 0.5)
    for tx in (inside, optax.chain(CLIP, optax.lookahead(DOWN, 2, 0.5))):
        (updates, _), state = steps(tx, 1, 1, params=params)
        assert_updates(updates.fast, -0.6, -0.8)
        assert metrics(state)["global_norm"] == 5


def schedule_free():
    tx = contrib.schedule_free(optax.chain(CLIP, optax.sgd(1.0)), 1.0)
    (updates,), state = steps(tx, 1)
    assert metrics(state)["global_norm"] == 5
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-5)


def line_search(search):
    def loss(params):
        return sum(jnp.sum((p - 3) ** 2) for p in jax.tree.leaves(params))

    tx = optax.chain(CLIP, DOWN, search)
    value, grad = jax.value_and_grad(loss)(PARAMS)
    extra = {"value": value, "grad": grad, "value_fn": loss}
    updates, state = tx.update(grad, tx.init(PARAMS), PARAMS, **extra)
    np.testing.assert_allclose(metrics(state)["global_norm"], oracle.norm(grad), 1e-6)
    # The step is along the clipped direction, and as long as the search makes it.
    np.testing.assert_allclose(updates["w"] / updates["b"], [1, 1], 1e-6)
    assert loss(optax.apply_updates(PARAMS, updates)) < value


def scale_by_backtracking_linesearch():
    line_search(optax.scale_by_backtracking_linesearch(5))


def scale_by_zoom_linesearch():
    line_search(optax.scale_by_zoom_linesearch(5, initial_guess_strategy="one"))


def reduce_on_plateau():
    found, _ = steps(optax.chain(CLIP, PLATEAU), *[1] * 6, value=1.0)
    assert_updates(found[0], 0.6, 0.8)
    assert oracle.norm(found[-1]) < 0.6


def mechanize():
    inside = contrib.mechanize(optax.chain(CLIP, DOWN))
    _, state = steps(inside, 1, params=jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_allclose(metrics(state)["clipped_norm"], 1, 1e-6)


def sam():
    ascent = optax.chain(contrib.normalize(), optax.scale(0.1))
    ascended = jax.tree.map(lambda g: 2 * g, GRADS)
    for opaque in (True, False):
        tx = contrib.sam(optax.chain(CLIP, DOWN), ascent, 2, opaque_mode=opaque)
        found, state = steps(tx, *[1] * (2 - opaque), grad_fn=lambda *_: ascended)
        assert_updates(found[-1], -0.6, -0.8)
        # The gradient of the descent, at the point that the ascent has led to.
        assert optax.tree.get(state, "global_norm") == (10 if opaque else 5)
        # Selected by multiplying with 0, which of the threshold before makes a NaN.
        assert np.isnan(metrics(state)["threshold"]) == (not opaque)


def split_real_and_imaginary():
    tx, grads = contrib.split_real_and_imaginary(CLIP), jnp.array([3.0 + 4.0j])
    updates, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, [0.6 + 0.8j], 1e-6)
    assert metrics(state)["global_norm"] == 5


def differentially_private_aggregate():
    # It clips each example itself; the clip after it, their noisy mean.
    tx, grads = (
        optax.chain(NOISE, CLIP),
        jax.tree.map(lambda g: jnp.stack([g, g]), GRADS),
    )
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert_updates(updates, 0.6, 0.8)
    assert metrics(state)["global_norm"] == 5


OTHERS = [lookahead, schedule_free, scale_by_backtracking_linesearch]
OTHERS += [scale_by_zoom_linesearch, reduce_on_plateau, mechanize, sam]
OTHERS += [split_real_and_imaginary, differentially_private_aggregate]


@pytest.mark.slow
@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize("check", OTHERS, ids=lambda check: check.__name__)
def test_other_row_of_the_page_about_wrappers(check):
    check()


def test_every_row_of_the_page_is_a_test():
    cells = re.findall(r"^\| (`.*?) \|", PAGE.split("\n## ")[0], re.MULTILINE)
    names = re.findall(r"`(?:contrib\.)?(\w+)`", " ".join(cells))
    tested = {row[0] for row in ROWS} | {check.__name__ for check in OTHERS}
    # test_transform.py has these two.
    elsewhere = {"inject_hyperparams", "use_norm"}
    if not selective:
        elsewhere |= {"selective_transform"}
    assert set(names) - elsewhere == tested


# --- On a mesh.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_eight_devices(tx, axis_type, compile):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    host = oracle.normals({"w": (8, 4), "b": (8,), "r": (3,)}, scale=3)
    expected = tx.update(host, tx.init(host))
    specs = {"w": P("data", "model"), "b": P("data"), "r": P()}
    shardings = {key: NamedSharding(mesh, specs[key]) for key in specs}
    with jax.set_mesh(mesh):
        grads = jax.device_put(host, shardings)
        state = tx.init(grads)
        updates, new_state = compile(tx.update)(grads, state)
        assert types(updates) == types(grads)
        assert types(new_state) == types(state)
    assert_same((updates, new_state), expected, 1e-5)
    for key, sharding in shardings.items():
        assert updates[key].sharding.is_equivalent_to(sharding, updates[key].ndim)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(new_state))
