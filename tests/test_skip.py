"""skip_by_global_norm: which steps, around which transformations, from which state."""

import functools
import inspect
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from optax import contrib

from optax_globalclip import (
    SkipByGlobalNormState,
    clip_by_global_norm,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = [
    *oracle.RUNS_OPTAX,
    pytest.mark.filterwarnings("ignore:scatter inputs:FutureWarning"),
]

SHAPES = {"w": (2, 3), "b": (4,)}
PARAMS = oracle.normals(SHAPES, seed=1)
GRADS = oracle.normals(SHAPES, seed=2)
NORM = oracle.norm(GRADS)
CLIP = clip_by_global_norm(1.0)
ONLY_W = {"w": True, "b": False}
GROUPS = {"w": "one", "b": "other"}


def scaled(scale, grads=GRADS):
    return jax.tree.map(lambda g: g * jnp.asarray(scale, g.dtype), grads)


def run(tx, scales, state=None):
    """Updates and states after each step, with gradients scaled so."""
    state = tx.init(PARAMS) if state is None else state
    history = []
    for scale in scales:
        updates, state = tx.update(scaled(scale), state, PARAMS)
        history.append((updates, state))
    return history


def steps(tx, scales):
    """A letter for each step: taken or skipped."""
    return "".join("ts"[bool(s.num_consecutive_skips)] for _, s in run(tx, scales))


def bits(tree):
    """Path, dtype, shape and bytes of every leaf."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        name = jax.tree_util.keystr(path)
        found.append((name, leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()))
    return found


# --- What is skipped.


@pytest.mark.parametrize(
    ("max_norm", "limit", "scales", "expected"),
    [
        (None, None, [1, 1e30, np.nan, np.inf, 1], "ttsst"),
        (2 * NORM, None, [1, 3, 1, 3, 3], "tstss"),
        (2 * NORM, None, [9] * 5, "sssss"),
        (2 * NORM, 2, [9] * 7, "sstssts"),
        (2 * NORM, 0, [9, 9, np.nan, 9], "ttst"),
        (2 * NORM, 2, [np.nan] * 5, "sssss"),
        # However many were skipped before it, one that is finite is let through.
        (2 * NORM, 2, [np.nan, np.nan, np.nan, 9, 9], "sssts"),
        (2 * NORM, 2, [9, 1, 9, 9, 9], "stsst"),
        # A schedule counts skipped steps too; NaN and negative arrays skip all.
        (optax.piecewise_constant_schedule(2 * NORM, {2: 10.0}), None, [5] * 4, "sstt"),
        (jnp.float32(np.nan), None, [1], "s"),
        (jnp.float32(-1), None, [1], "s"),
    ],
)
def test_steps_that_are_taken(max_norm, limit, scales, expected):
    tx = skip_by_global_norm(optax.sgd(1.0), max_norm, max_consecutive_skips=limit)
    assert steps(tx, scales) == expected


def test_norm_at_the_threshold_is_taken():
    tx = skip_by_global_norm(optax.sgd(1.0), 5.0)
    for last, taken in ((4.0, True), (np.nextafter(4, 5, dtype="f4"), False)):
        updates, state = tx.update(jnp.array([3.0, last]), tx.init(None))
        assert bool(updates.any()) == taken == (not state.num_skipped)


def test_finite_entries_whose_norm_overflows():
    big = {"w": jnp.full((2, 3), 3e38), "b": jnp.full(4, 3e38)}
    for max_norm, taken in ((1e38, False), (None, True)):
        tx = skip_by_global_norm(optax.scale(0.5), max_norm)
        updates, _ = tx.update(big, tx.init(PARAMS))
        assert bool(updates["w"].all()) == taken


def test_norm_given_is_used_here_and_inside():
    tx = skip_by_global_norm(CLIP, 100.0)
    updates, state = tx.update(GRADS, tx.init(PARAMS), use_norm=50.0)
    np.testing.assert_allclose(updates["b"], GRADS["b"] / 50, 1e-6)
    assert state.global_norm == state.inner_state.global_norm == 50
    _, state = tx.update(GRADS, state, use_norm=150.0)
    assert (state.num_skipped, state.inner_state.num_updates) == (1, 1)


def test_trees_with_none_masked_and_float0():
    grads = {
        "w": np.float32([3, 4]),
        "frozen": None,
        "masked": optax.MaskedNode(),
        "steps": np.zeros((), jax.dtypes.float0),
        "scalar": 0.0,
    }
    tx = skip_by_global_norm(CLIP, 6.0)
    for scale, expected in ((1, [0.6, 0.8]), (2, [0, 0])):
        updates, _ = tx.update(grads | {"w": scale * grads["w"]}, tx.init(grads))
        assert jax.tree.structure(updates) == jax.tree.structure(grads)
        np.testing.assert_allclose(updates["w"], expected, 1e-6)
        assert updates["steps"].dtype == jax.dtypes.float0


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0.5), (9.0, 0.0)])
def test_gradient_is_that_of_the_inner_or_zero(scale, expected):
    tx = skip_by_global_norm(optax.scale(0.5), 2 * NORM)

    def total(grads):
        updates, _ = tx.update(grads, tx.init(PARAMS))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(updates))

    slopes = jax.grad(total)(scaled(scale))
    np.testing.assert_array_equal(slopes["w"], np.full((2, 3), expected))


def test_vmap_skips_each_example_by_itself():
    tx = skip_by_global_norm(CLIP, 2 * NORM)
    batch = jax.tree.map(lambda g: jnp.stack([g, 9 * g, g * jnp.nan]), GRADS)
    states = jax.vmap(tx.init)(batch)
    updates, states = jax.vmap(tx.update)(batch, states)
    np.testing.assert_array_equal(states.num_skipped, [0, 1, 1])
    np.testing.assert_array_equal(states.inner_state.num_updates, [1, 0, 0])
    np.testing.assert_allclose(updates["b"][0], GRADS["b"] / NORM, 1e-6)
    assert not updates["b"][1:].any()


def test_skip_around_skip():
    tx = skip_by_global_norm(skip_by_global_norm(optax.trace(0.9), 3.0), 30.0)
    state = tx.init(jnp.zeros(1))
    counts, found = [], []
    for grad in (1, 10, 100, np.nan, 2):
        updates, state = tx.update(jnp.full(1, grad, "f4"), state)
        found.append(float(updates[0]))
        counts.append((int(state.num_skipped), int(state.inner_state.num_skipped)))
    np.testing.assert_allclose(found, [1, 0, 0, 0, 2.9], 1e-6)
    assert counts == [(0, 0), (0, 1), (1, 1), (2, 1), (2, 1)]
    assert (state.num_updates, state.inner_state.num_updates) == (5, 3)


# --- The table: every factory in optax and in optax.contrib.


def loss_of(params):
    """A quadratic, in float32, for transformations that evaluate the loss."""
    wide = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    return sum(jnp.sum((leaf - 3) ** 2) for leaf in wide)


def loss_value(grads, params):
    return {"value": loss_of(params)}


def line_search(grads, params):
    return {"value": loss_of(params), "grad": grads, "value_fn": loss_of}


def objective(grads, params):
    return {"obj_fn": loss_of}


def gradient_function(grads, params):
    return {"grad_fn": lambda params, *_: jax.grad(loss_of)(params)}


def as_drawn(tree):
    return tree


def per_example(grads):
    return jax.tree.map(lambda grad: jnp.stack([grad, 2 * grad]), grads)


def as_complex(tree):
    return jax.tree.map(lambda leaf: leaf + 1j * leaf.astype(jnp.complex64), tree)


def only_matrix(tree):
    return {"w": tree["w"]}


def every_matrix(tree):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), tree)


ADAM, SGD, TRACE = optax.adam(0.1), optax.sgd(0.1), optax.trace(0.9)
DECAY, KEY = optax.linear_schedule(0.1, 0.01, 3), jax.random.key(0)
NO_ARGUMENT = """
    adadelta add_decayed_weights apply_every centralize identity
    keep_params_nonnegative named_chain normalize_by_update_norm
    scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad
    scale_by_belief scale_by_distance_over_gradients scale_by_factored_rms
    scale_by_lbfgs scale_by_lion scale_by_novograd scale_by_optimistic_gradient
    scale_by_param_block_norm scale_by_param_block_rms scale_by_radam scale_by_rms
    scale_by_rss scale_by_sign scale_by_sm3 scale_by_stddev scale_by_trust_ratio
    scale_by_yogi set_to_zero zero_nans polyak_sgd scale_by_polyak
    contrib.cocob contrib.dadapt_adamw contrib.dog contrib.dowg contrib.normalize
    contrib.prodigy contrib.scale_by_acprop contrib.scale_by_ademamix
    contrib.scale_by_adopt contrib.scale_by_cocob contrib.scale_by_galore
    contrib.scale_by_simplified_ademamix contrib.schedule_free_adamw
    contrib.schedule_free_sgd contrib.hutchinson_estimator_diag_hessian contrib.momo
    contrib.momo_adam contrib.reduce_on_plateau
    """.split()
A_RATE = """
    adabelief adafactor adagrad adam adamax adamaxw adamw adan adaptive_grad_clip
    amsgrad clip clip_by_block_rms clip_by_global_norm ema fromage lamb lars lion
    nadam nadamw novograd optimistic_adam optimistic_adam_v2
    optimistic_gradient_descent radam rmsprop rprop scale scale_by_learning_rate
    scale_by_rprop sgd sign_sgd signum sm3 trace yogi contrib.acprop contrib.ademamix
    contrib.adopt contrib.madgrad contrib.muon contrib.scale_by_madgrad
    contrib.simplified_ademamix
    """.split()
ARGUMENTS = dict.fromkeys(NO_ARGUMENT, ()) | dict.fromkeys(A_RATE, (0.1,))
ARGUMENTS |= {
    "MultiSteps": (ADAM, 2),
    "add_noise": (0.1, 0.5, KEY),
    "apply_if_finite": (ADAM, 3),
    "chain": (TRACE, optax.scale(-0.1)),
    "conditionally_mask": (ADAM, lambda step: step >= 1),
    "conditionally_transform": (ADAM, lambda step: step >= 1),
    "flatten": (ADAM,),
    "freeze": (ONLY_W,),
    "lbfgs": (),
    "lookahead": (ADAM, 2, 0.5),
    "masked": (ADAM, ONLY_W),
    "measure_with_ema": (optax.tree.norm, 0.9),
    "multi_transform": ({"one": ADAM, "other": SGD}, GROUPS),
    "noisy_sgd": (0.1,),
    "partition": ({"one": ADAM, "other": TRACE}, GROUPS),
    "scale_by_backtracking_linesearch": (3,),
    "scale_by_schedule": (DECAY,),
    "scale_by_zoom_linesearch": (3,),
    "selective_transform": (ADAM,),
    "snapshot": ("norm", optax.tree.norm),
    "stateless": (lambda u, p: jax.tree.map(jnp.multiply, u, p),),
    "stateless_with_tree_map": (lambda u, p: u * p,),
    "with_extra_args_support": (optax.scale_by_adam(),),
    "contrib.differentially_private_aggregate": (1.0, 0.1, KEY),
    "contrib.dpsgd": (0.1, 1.0, 0.1, 0, 0.9),
    "contrib.galore": (0.1,),
    "contrib.mechanize": (optax.sgd(0.1, momentum=0.9),),
    "contrib.sam": (SGD, SGD),
    "contrib.scale_by_muon": (),
    "contrib.schedule_free": (SGD, 0.1),
    "contrib.sophia": (0.1,),
    "contrib.split_real_and_imaginary": (ADAM,),
}
OPTIONS = {
    "lbfgs": {"memory_size": 2},
    "noisy_sgd": {"key": KEY},
    "selective_transform": {"freeze_mask": ONLY_W},
    "contrib.galore": {"rank": 1, "update_proj_gap": 2},
    "contrib.scale_by_muon": {"weight_dimension_numbers": every_matrix},
    "contrib.sophia": {"verbose": False, "update_interval": 2},
}
EXTRA = dict.fromkeys(
    """
    lbfgs scale_by_backtracking_linesearch scale_by_zoom_linesearch
    """.split()
    + ["backtracking after sgd"],
    line_search,
)
EXTRA |= dict.fromkeys(
    """
    polyak_sgd scale_by_polyak with_extra_args_support contrib.momo contrib.momo_adam
    contrib.reduce_on_plateau
    """.split(),
    loss_value,
)
EXTRA["contrib.hutchinson_estimator_diag_hessian"] = objective
EXTRA |= {"contrib.sophia": objective, "sam in opaque mode": gradient_function}
# How parameters and gradients are made of those drawn.
MADE = {
    "lookahead": (optax.LookaheadParams.init_synced, as_drawn),
    "contrib.differentially_private_aggregate": (as_drawn, per_example),
    "contrib.dpsgd": (as_drawn, per_example),
    "contrib.scale_by_muon": (only_matrix, only_matrix),
    "contrib.split_real_and_imaginary": (as_complex, as_complex),
}


def factory(name):
    module = contrib if name.startswith("contrib.") else optax
    return getattr(module, name.removeprefix("contrib."), None)


CASES = {
    name: functools.partial(factory(name), *arguments, **OPTIONS.get(name, {}))
    for name, arguments in ARGUMENTS.items()
    if factory(name)  # older versions of Optax have fewer
} | {
    "a clip first": lambda: optax.chain(CLIP, ADAM),
    "backtracking after sgd": lambda: optax.chain(
        SGD, optax.scale_by_backtracking_linesearch(3)
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(DECAY),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.sgd)(
        0.1
    ),
    "MultiSteps as a transformation": lambda: optax.MultiSteps(
        ADAM, 2
    ).gradient_transformation(),
    "sam in opaque mode": lambda: contrib.sam(ADAM, SGD, opaque_mode=True),
}
# One of each kind, for the default run: moments, an accumulator, injected numbers,
# masks, groups, extra arguments, other parameters, complex leaves.
KINDS = """
    scale_by_adam MultiSteps inject_hyperparams masked partition polyak_sgd lookahead
    contrib.split_real_and_imaginary
    """.split()


@pytest.mark.skipif(optax.__version__ != "0.2.8", reason="the table is of 0.2.8")
def test_the_table_has_every_factory_of_optax():
    """Every function that says that it returns a transformation."""
    exported = set()
    for module, prefix in ((optax, ""), (contrib, "contrib.")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            members = inspect.getmembers(module, inspect.isfunction)
        exported |= {
            prefix + name
            for name, value in members
            if "GradientTransformation"
            in str(inspect.signature(value).return_annotation)
        }
    exported = {name for name in exported if "_deprecated" not in name}
    assert len(exported) > 110
    assert exported - set(CASES) == set()


def each_case(*dtypes, default):
    """Every case in each dtype; in the first one, those named are not slow."""
    rows = [
        pytest.param(name, dtype, marks=[pytest.mark.slow] * (name not in default))
        if dtype == dtypes[0]
        else pytest.param(name, dtype, marks=pytest.mark.slow)
        for name in CASES
        for dtype in dtypes
    ]
    parametrized = pytest.mark.parametrize(("name", "dtype"), rows)
    return lambda test: pytest.mark.whole(parametrized(test))


@pytest.fixture
def optax_broadcasts():
    """For arithmetic of Optax's own, which adds axes to scalars."""
    with jax.numpy_rank_promotion("allow"):
        yield


def drawn(name, dtype, grad_dtype=None):
    """Parameters and gradients for a case."""
    as_params, as_grads = MADE.get(name, (as_drawn, as_drawn))
    params = oracle.normals(SHAPES, dtype, seed=1)
    grads = oracle.normals(SHAPES, grad_dtype or dtype, seed=2)
    return as_params(params), as_grads(grads)


def step_of(tx, name):
    """One update outside ``jit``, with the extra arguments that the case needs.

    XLA fuses an inner alone otherwise than the same inner in a skip, which changes
    roundings. Outside ``jit`` each operation is compiled by itself.
    """
    extra = EXTRA.get(name, lambda grads, params: {})
    return lambda grads, state, params: tx.update(
        grads, state, params, **extra(grads, params)
    )


def cast_like(tree, like):
    def cast(leaf, old):
        is_key = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
        return leaf if is_key else leaf.astype(old.dtype)

    return jax.tree.map(cast, tree, like)


def with_nan(grads):
    leaves, treedef = jax.tree.flatten(grads)
    return treedef.unflatten([leaves[0].at[..., 0].set(jnp.nan), *leaves[1:]])


def check_steps(name, params, grads):
    """Two steps beside the inner alone; one with a NaN and a spike are skipped."""
    inner = CASES[name]()
    tx = skip_by_global_norm(inner, 3 * oracle.norm(grads))
    alone, step = step_of(inner, name), step_of(tx, name)
    state, expected_state = tx.init(params), inner.init(params)
    assert bits(state.inner_state) == bits(expected_state)
    for scale, bad in ((1, with_nan(grads)), (2, scaled(1e3, grads))):
        expected, new_state = alone(scaled(scale, grads), expected_state, params)
        # Some states of Optax have another dtype after an update than before it.
        expected_state = cast_like(new_state, expected_state)
        updates, state = step(scaled(scale, grads), state, params)
        assert bits(updates) == bits(expected)
        assert bits(state.inner_state) == bits(expected_state)

        zeros, state = step(bad, state, params)
        assert bits(zeros) == bits(jax.tree.map(jnp.zeros_like, expected))
        assert bits(state.inner_state) == bits(expected_state)
    assert (state.num_updates, state.num_skipped) == (4, 2)


# In bfloat16 more states change their dtype: float32 shows less.
@pytest.mark.usefixtures("optax_broadcasts")
@each_case("bfloat16", "float32", default=KINDS)
def test_steps_taken_are_the_inners_and_steps_skipped_leave_no_trace(name, dtype):
    check_steps(name, *drawn(name, dtype))


def types_of(tree):
    return [
        (jax.tree_util.keystr(path), leaf.dtype, leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


@pytest.mark.usefixtures("optax_broadcasts")
@each_case("bfloat16 float32", "float32 bfloat16", default=KINDS)
def test_dtypes_and_shapes_of_the_inner_state_never_change(name, dtype):
    """With parameters of the first dtype, and gradients of the second."""
    params, grads = drawn(name, *dtype.split())
    inner = CASES[name]()
    tx = skip_by_global_norm(inner)
    state, inner_step = tx.init(params), step_of(inner, name)
    try:
        expected, _ = jax.eval_shape(inner_step, grads, state.inner_state, params)
    except TypeError:
        pytest.skip("Optax's own branches return other dtypes here")
    updates, new_state = jax.eval_shape(step_of(tx, name), grads, state, params)
    assert types_of(updates) == types_of(expected)
    assert types_of(new_state) == types_of(state)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="Optax 0.2.7 added it")
def test_monitor_is_an_error_that_names_what_it_adds_to_its_state():
    tx = skip_by_global_norm(optax.monitor({"seen": optax.tree.norm}))
    with pytest.raises((TypeError, ValueError), match="seen|measurements"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_state_may_hold_python_numbers_and_typed_keys():
    def update(updates, state, params=None):
        return updates, {"steps": 5, "key": jax.random.split(state["key"])[0]}

    inner = optax.GradientTransformation(
        lambda _: {"steps": 0, "key": jax.random.key(0)}, update
    )
    tx = skip_by_global_norm(inner, 10.0)
    state = tx.init(None)._replace(num_updates=7)
    for grad, steps in ((1.0, 5), (99.0, 0)):
        _, new = tx.update(jnp.full(3, grad), state)
        assert (new.num_updates, new.inner_state["steps"]) == (8, steps)
        assert (new.inner_state["key"] == state.inner_state["key"]) == (grad > 10)


# --- Extra arguments.

GIVEN = [
    {},
    {"value": 1.5},
    {"use_norm": 2.5},
    {"use_norm": np.float32(2.5), "value": 1},
    {"value_fn": loss_of, "grad": None, "value": np.float32(3)},
    # The names of our own fields, and of others.
    {"global_norm": 1, "ord": 3, "axis_name": "x"},
    {"updates_": 1, "taken": False, "norm": 7.0, "leaves": ()},
]
TAKERS = {
    "alone": lambda inner: inner,
    "MultiSteps": lambda inner: optax.MultiSteps(inner, 1),
    "MultiSteps of two": lambda inner: optax.MultiSteps(inner, 2),
    "chain": lambda inner: optax.chain(inner, optax.scale(2.0)),
    "skip": skip_by_global_norm,
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
    "partition": lambda inner: optax.partition({"all": inner}, "all"),
}


def recorder(seen, kind=optax.GradientTransformationExtraArgs):
    """A transformation that only records the extra arguments of each update."""

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    return kind(lambda _: None, update)


@pytest.mark.parametrize("wrap", TAKERS.values(), ids=TAKERS)
def test_inner_gets_exactly_the_extra_arguments_given(wrap):
    for extra in GIVEN:
        for bad in (1.0, np.nan):
            seen = []
            tx = skip_by_global_norm(wrap(recorder(seen)))
            grads = {"w": jnp.full(2, bad)}
            tx.update(grads, tx.init(grads), grads, **extra)
            assert seen
            for found in seen:
                assert set(found) == set(extra)
                assert all(found[name] is extra[name] for name in extra)


def test_transformation_without_extra_arguments_gets_none():
    for extra in GIVEN:
        for nest in (lambda tx: tx, optax.chain):
            seen = []
            plain = recorder(seen, kind=optax.GradientTransformation)
            tx = skip_by_global_norm(nest(plain))
            tx.update(jnp.ones(2), tx.init(None), None, **extra)
            assert seen == [{}]


def test_inner_that_takes_one_extra_argument_only():
    def update(updates, state, params=None, *, value=1.0):
        return updates * value, state

    tx = skip_by_global_norm(
        optax.GradientTransformationExtraArgs(lambda _: None, update)
    )
    for extra, expected in (({}, 1), ({"value": 3.0}, 3)):
        updates, _ = tx.update(jnp.ones(2), tx.init(None), **extra)
        np.testing.assert_array_equal(updates, [expected] * 2)


# --- States of others: test_classes_clients.py has those that are refused.


def guarded(threshold=None):
    return skip_by_global_norm(
        optax.chain(CLIP, TRACE), threshold or zscore_threshold()
    )


def nested(node):
    """Mappings in place of tuples, as checkpoints have them when no target is given."""
    if hasattr(node, "_fields"):
        return {name: nested(getattr(node, name)) for name in node._fields}
    if isinstance(node, tuple):
        return {str(i): nested(part) for i, part in enumerate(node)}
    return node


@pytest.mark.parametrize("threshold", [3 * NORM, zscore_threshold(warmup_steps=2)])
def test_mapping_with_the_fields_is_the_state(threshold):
    tx = guarded(threshold)
    (*_, (_, state)) = run(tx, [1, 1.1, 9, 0.9])
    expected = run(tx, [1.2, np.nan, 9, 1], state)
    for mapping in (state._asdict(), nested(state)):
        found = run(tx, [1.2, np.nan, 9, 1], mapping)
        assert bits(found) == bits(expected)
        assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_state_of_the_bare_optimizer_is_moved_over():
    inner, tx = optax.chain(CLIP, TRACE), guarded()
    _, old = inner.update(GRADS, inner.init(PARAMS), PARAMS)
    expected, expected_state = inner.update(scaled(2), old, PARAMS)
    state = tx.init(PARAMS)._replace(inner_state=old)
    updates, state = tx.update(scaled(2), state, PARAMS)
    assert bits((updates, state.inner_state)) == bits((expected, expected_state))
    assert isinstance(state, SkipByGlobalNormState)


# --- Checks of the inner.

CLIP_OR_RAISE = clip_by_global_norm(1.0, nonfinite="error")
CHECKED = {
    "clip": CLIP_OR_RAISE,
    "after a scale": optax.chain(optax.scale(2.0), CLIP_OR_RAISE),
    "masked": optax.masked(CLIP_OR_RAISE, ONLY_W),
    "another order": clip_by_global_norm(1.0, ord=1, nonfinite="error"),
    "in another skip": skip_by_global_norm(CLIP_OR_RAISE),
}


def errors_of(tx, grads):
    """What ``checkify`` says of one update, eager and jitted."""
    state = tx.init(grads)
    for update in (tx.update, jax.jit(tx.update)):
        error, _ = checkify.checkify(lambda g, s, f=update: f(g, s, g))(grads, state)
        yield error.get()


@pytest.mark.parametrize("inner", CHECKED.values(), ids=CHECKED)
def test_inner_check_fires_on_a_skipped_step_too(inner):
    """The inner transformation gets the updates as they are."""
    tx = skip_by_global_norm(inner, 100.0)
    grads = {"w": jnp.full(2, np.nan), "b": jnp.ones(1)}
    assert all(errors_of(tx, grads))


def test_inner_check_fires_on_a_step_that_overflows_inside():
    tx = skip_by_global_norm(optax.chain(optax.scale(1e30), CLIP_OR_RAISE))
    assert all(errors_of(tx, jnp.full(2, 1e20)))
    assert not any(errors_of(tx, jnp.full(2, 1e5)))


# --- The norm is measured once.


def reductions(tx, grads=GRADS, **options):
    """How often the compiled update reduces an array, loops, or sums over devices."""
    step = jax.jit(lambda grads, state: tx.update(grads, state, grads), **options)
    text = step.lower(grads, tx.init(grads)).compile().as_text()
    return len(re.findall(r" (?:reduce|while|dot|all-reduce)\(", text))


CLIP_FIRST = {
    "alone": lambda clip, _: clip,
    "before adamw": lambda clip, _: optax.chain(clip, optax.adamw(0.1)),
    "in chains": lambda clip, _: optax.chain(optax.chain(clip), optax.scale(2.0)),
    "masked, all": lambda clip, _: optax.masked(clip, {"w": True, "b": True}),
    "in skips": lambda clip, ord: skip_by_global_norm(
        skip_by_global_norm(clip, 9.0, ord=ord), zscore_threshold(), ord=ord
    ),
}


@pytest.mark.parametrize("ord", [2, 1, 3, np.inf])
@pytest.mark.parametrize("wrap", CLIP_FIRST.values(), ids=CLIP_FIRST)
def test_norm_is_measured_once_where_a_clip_comes_first(wrap, ord):
    clip = clip_by_global_norm(1.0, ord=ord)
    tx = skip_by_global_norm(wrap(clip, ord), zscore_threshold(6.0), ord=ord)
    assert 1 <= reductions(tx) <= reductions(clip)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_norm_is_reduced_over_devices_once(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        shards = NamedSharding(mesh, P("x"))
        grads = jax.device_put({"w": jnp.ones(8), "b": jnp.ones(16)}, shards)
        tx = skip_by_global_norm(optax.chain(CLIP, SGD), zscore_threshold())
        assert reductions(tx, grads) <= reductions(CLIP, grads)


def test_norm_of_other_leaves_is_measured_anew():
    """Also inside a compiled inner, in which nothing of the first step stays."""
    for inner, length in (
        (optax.chain(optax.scale(2.0), CLIP), 1),
        (CLIP._replace(update=jax.jit(CLIP.update)), 1),
        (optax.chain(CLIP, optax.scale(3.0)), 3),
    ):
        tx = skip_by_global_norm(inner, 100.0)
        state = tx.init(PARAMS)
        for scale in (4.0, 0.9, 1e3, 7.0, np.nan, 11.0):
            updates, state = tx.update(scaled(scale), state, PARAMS)
            expected = length * (scale * NORM <= 100)
            np.testing.assert_allclose(oracle.norm(updates), expected, 1e-5)
    masked = skip_by_global_norm(optax.masked(CLIP, ONLY_W), 100.0)
    updates, _ = masked.update(GRADS, masked.init(PARAMS))
    np.testing.assert_allclose(oracle.norm(updates["w"]), 1, 1e-6)
