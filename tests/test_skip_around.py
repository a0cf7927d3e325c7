"""skip_by_global_norm around every transformation that Optax exports."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, PartitionSpec as P
from optax import contrib

from optax_globalclip import (
    clip_by_global_norm,
    skip_by_global_norm,
    zscore_threshold,
)

pytestmark = [
    *oracle.RUNS_OPTAX,
    pytest.mark.filterwarnings("ignore:scatter inputs:FutureWarning"),
]

SHAPES = {"w": (2, 3), "b": (4,)}
ONLY_W = {"w": True, "b": False}
GROUPS = {"w": "one", "b": "other"}


# --- The table: one case for each factory in optax and in optax.contrib.


def loss_of(params):
    """A quadratic, in float32, for transformations that evaluate the loss."""
    wide = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(params)]
    return sum(jnp.sum((leaf - 3) ** 2) for leaf in wide)


def gradient_of(params, *_):
    return jax.grad(loss_of)(params)


def no_extra(grads, params):
    del grads, params
    return {}


def loss_value(grads, params):
    del grads
    return {"value": loss_of(params)}


def line_search(grads, params):
    return {"value": loss_of(params), "grad": grads, "value_fn": loss_of}


def objective(grads, params):
    del grads, params
    return {"obj_fn": loss_of}


def gradient_function(grads, params):
    del grads, params
    return {"grad_fn": gradient_of}


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


class Case(NamedTuple):
    """How to call one factory and the ``update`` of what it returns."""

    make: Callable[[], Any]
    extra: Callable = no_extra
    params: Callable = as_drawn
    grads: Callable = as_drawn


def with_rate(factory):
    return lambda: factory(0.1)


CASES = {
    name: Case(getattr(optax, name))
    for name in """
    adadelta add_decayed_weights apply_every centralize identity
    keep_params_nonnegative named_chain normalize_by_update_norm
    scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad
    scale_by_belief scale_by_distance_over_gradients scale_by_factored_rms
    scale_by_lbfgs scale_by_learning_rate scale_by_lion scale_by_novograd
    scale_by_optimistic_gradient scale_by_param_block_norm scale_by_param_block_rms
    scale_by_radam scale_by_rms scale_by_rss scale_by_sign scale_by_sm3
    scale_by_stddev scale_by_trust_ratio scale_by_yogi set_to_zero zero_nans
    """.split()
    if hasattr(optax, name)
}
CASES |= {
    name: Case(with_rate(getattr(optax, name)))
    for name in """
    adabelief adafactor adagrad adam adamax adamaxw adamw adan adaptive_grad_clip
    amsgrad clip clip_by_block_rms clip_by_global_norm ema fromage lamb lars lion
    nadam nadamw novograd optimistic_adam optimistic_adam_v2
    optimistic_gradient_descent radam rmsprop rprop scale scale_by_learning_rate
    scale_by_rprop sgd sign_sgd signum sm3 trace yogi
    """.split()
    if hasattr(optax, name)
}
CASES |= {
    f"contrib.{name}": Case(getattr(contrib, name))
    for name in """
    cocob dadapt_adamw dog dowg normalize prodigy scale_by_acprop scale_by_ademamix
    scale_by_adopt scale_by_cocob scale_by_galore
    scale_by_simplified_ademamix schedule_free_adamw schedule_free_sgd
    """.split()
    if hasattr(contrib, name)
}
CASES |= {
    f"contrib.{name}": Case(with_rate(getattr(contrib, name)))
    for name in """
    acprop ademamix adopt madgrad muon scale_by_madgrad simplified_ademamix
    """.split()
    if hasattr(contrib, name)
}
CASES |= {
    "MultiSteps": Case(lambda: optax.MultiSteps(optax.adam(0.1), 2)),
    "MultiSteps.gradient_transformation": Case(
        lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    ),
    "add_noise": Case(lambda: optax.add_noise(0.1, 0.5, jax.random.key(0))),
    "apply_if_finite": Case(lambda: optax.apply_if_finite(optax.adam(0.1), 3)),
    "chain": Case(lambda: optax.chain(optax.trace(0.9), optax.scale(-0.1))),
    "conditionally_mask": Case(
        lambda: optax.conditionally_mask(optax.adam(0.1), lambda step: step >= 1)
    ),
    "conditionally_transform": Case(
        lambda: optax.conditionally_transform(optax.adam(0.1), lambda step: step >= 1)
    ),
    "flatten": Case(lambda: optax.flatten(optax.adam(0.1))),
    "freeze": Case(lambda: optax.freeze(ONLY_W)),
    "inject_hyperparams": Case(
        lambda: optax.inject_hyperparams(optax.adam)(
            optax.linear_schedule(0.1, 0.01, 3)
        )
    ),
    "inject_stateful_hyperparams": Case(
        lambda: optax.inject_stateful_hyperparams(optax.sgd)(0.1)
    ),
    "lbfgs": Case(lambda: optax.lbfgs(memory_size=2), line_search),
    "lookahead": Case(
        lambda: optax.lookahead(optax.adam(0.1), 2, 0.5),
        params=optax.LookaheadParams.init_synced,
    ),
    "masked": Case(lambda: optax.masked(optax.adam(0.1), ONLY_W)),
    "measure_with_ema": Case(lambda: optax.measure_with_ema(optax.tree.norm, 0.9)),
    "multi_transform": Case(
        lambda: optax.multi_transform(
            {"one": optax.adam(0.1), "other": optax.set_to_zero()}, GROUPS
        )
    ),
    "partition": Case(
        lambda: optax.partition(
            {"one": optax.adam(0.1), "other": optax.sgd(0.1, 0.9)}, GROUPS
        )
    ),
    "polyak_sgd": Case(optax.polyak_sgd, loss_value),
    "scale_by_backtracking_linesearch": Case(
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3)),
        line_search,
    ),
    "scale_by_backtracking_linesearch alone": Case(
        lambda: optax.scale_by_backtracking_linesearch(3), line_search
    ),
    "noisy_sgd": Case(lambda: optax.noisy_sgd(0.1, key=jax.random.key(0))),
    "scale_by_polyak": Case(optax.scale_by_polyak, loss_value),
    "scale_by_schedule": Case(
        lambda: optax.scale_by_schedule(optax.linear_schedule(1.0, 0.1, 3))
    ),
    "scale_by_zoom_linesearch": Case(
        lambda: optax.scale_by_zoom_linesearch(3), line_search
    ),
    "selective_transform": Case(
        lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=ONLY_W)
    ),
    "snapshot": Case(lambda: optax.snapshot("norm", optax.tree.norm)),
    "stateless": Case(
        lambda: optax.stateless(lambda u, p: jax.tree.map(jnp.multiply, u, p))
    ),
    "stateless_with_tree_map": Case(
        lambda: optax.stateless_with_tree_map(lambda u, p: u * p)
    ),
    "with_extra_args_support": Case(
        lambda: optax.with_extra_args_support(optax.scale_by_adam()), loss_value
    ),
    "contrib.differentially_private_aggregate": Case(
        lambda: contrib.differentially_private_aggregate(1.0, 0.1, jax.random.key(0)),
        grads=per_example,
    ),
    "contrib.dpsgd": Case(
        lambda: contrib.dpsgd(0.1, 1.0, 0.1, 0, momentum=0.9), grads=per_example
    ),
    "contrib.galore": Case(lambda: contrib.galore(0.1, rank=1, update_proj_gap=2)),
    "contrib.hutchinson_estimator_diag_hessian": Case(
        contrib.hutchinson_estimator_diag_hessian, objective
    ),
    "contrib.mechanize": Case(lambda: contrib.mechanize(optax.sgd(0.1, momentum=0.9))),
    "contrib.momo": Case(contrib.momo, loss_value),
    "contrib.momo_adam": Case(contrib.momo_adam, loss_value),
    "contrib.reduce_on_plateau": Case(contrib.reduce_on_plateau, loss_value),
    "contrib.sam": Case(lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1))),
    "contrib.sam in opaque mode": Case(
        lambda: contrib.sam(optax.adam(0.1), optax.sgd(0.1), opaque_mode=True),
        gradient_function,
    ),
    "contrib.scale_by_muon": Case(
        lambda: contrib.scale_by_muon(weight_dimension_numbers=every_matrix),
        params=only_matrix,
        grads=only_matrix,
    ),
    "contrib.schedule_free": Case(
        lambda: contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1)
    ),
    "contrib.sophia": Case(
        lambda: contrib.sophia(0.1, verbose=False, update_interval=2), objective
    ),
    "contrib.split_real_and_imaginary": Case(
        lambda: contrib.split_real_and_imaginary(optax.adam(0.1)),
        params=as_complex,
        grads=as_complex,
    ),
}

# Every other function of the two namespaces, by what it is.
NO_TRANSFORMATION = {
    "a loss or a distance": """
        convex_kl_divergence cosine_distance cosine_similarity ctc_loss
        ctc_loss_with_forward_probs generalized_kl_divergence hinge_loss huber_loss
        kl_divergence l2_loss log_cosh ntxent safe_softmax_cross_entropy
        sigmoid_binary_cross_entropy sigmoid_focal_loss smooth_labels
        softmax_cross_entropy softmax_cross_entropy_with_integer_labels squared_error
        """,
    "a schedule": """
        constant_schedule cosine_decay_schedule cosine_onecycle_schedule
        exponential_decay join_schedules linear_onecycle_schedule linear_schedule
        piecewise_constant_schedule piecewise_interpolate_schedule
        polynomial_schedule sgdr_schedule warmup_constant_schedule
        warmup_cosine_decay_schedule warmup_exponential_decay_schedule
        """,
    "a type that annotates arguments": """
        MaskOrFn OptState Params ScalarOrSchedule Schedule Updates
        """,
    "arithmetic on trees and arrays": """
        apply_updates bias_correction global_norm incremental_update
        matrix_inverse_pth_root nnls per_example_global_norm_clip
        per_example_layer_norm_clip periodic_update power_iteration safe_increment
        safe_int32_increment safe_norm safe_root_mean_squares scale_gradient
        update_infinity_moment update_moment update_moment_per_elem_norm
        """,
    "a helper around a loss, a state or a test": """
        init_empty_state microbatch multi_normal schedule_free_eval_params
        skip_large_updates skip_not_finite tree_map_params value_and_grad_from_state
        """,
    "a transformation whose first update changes its state's structure": "monitor",
}


def functions_of(module, prefix=""):
    """The names of the callables that a module exports, without its classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = {
            name: getattr(module, name)
            for name in dir(module)
            if not name.startswith("_")
        }
    return {
        prefix + name
        for name, value in exported.items()
        if callable(value) and (value is optax.MultiSteps or not inspect.isclass(value))
    }


@pytest.mark.skipif(optax.__version__ != "0.2.8", reason="the table is of 0.2.8")
def test_the_table_has_every_factory_of_optax():
    exported = functions_of(optax) | functions_of(contrib, "contrib.")
    others = {name for names in NO_TRANSFORMATION.values() for name in names.split()}
    excluded = {name for name in exported if name.removeprefix("contrib.") in others}
    assert not excluded & set(CASES)
    assert exported - excluded - set(CASES) == set()
    # Nothing is excluded that says that it returns a transformation.
    for name in excluded - {"monitor"}:
        module = contrib if name.startswith("contrib.") else optax
        value = getattr(module, name.removeprefix("contrib."))
        annotations = getattr(value, "__annotations__", {})
        assert "GradientTransformation" not in str(annotations.get("return"))


# These compile for 5 to 20 s, and others that run stand for them: backtracking for the
# line searches, dpsgd for its first half, scale_by_muon for muon.
COMPILE_LONG = """
    lbfgs scale_by_lbfgs scale_by_zoom_linesearch contrib.muon contrib.prodigy
    MultiSteps.gradient_transformation contrib.differentially_private_aggregate
    """.split()
# In bfloat16 more states change their dtype: float32 shows less.
MEMBERS = [
    pytest.param(
        case,
        jnp.dtype(dtype),
        id=f"{name}-{dtype}",
        marks=[pytest.mark.slow] * (dtype == "float32" or name in COMPILE_LONG),
    )
    for name, case in CASES.items()
    for dtype in ("float32", "bfloat16")
]


# --- Steps taken, steps skipped.


def drawn(case, dtype, grad_dtype=None):
    """Parameters and gradients for a case."""
    params = oracle.normals(SHAPES, dtype, seed=1)
    grads = oracle.normals(SHAPES, grad_dtype or dtype, seed=2)
    return case.params(params), case.grads(grads)


def step_of(tx, case):
    """One update outside ``jit``, with the extra arguments that the case needs.

    XLA fuses an inner alone otherwise than the same inner in a skip, which changes
    roundings. Outside ``jit`` each operation is compiled by itself.
    """

    def step(grads, state, params):
        return tx.update(grads, state, params, **case.extra(grads, params))

    return step


def bits(tree):
    """Path, dtype, shape and bytes of every leaf."""
    leaves = jax.tree.leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path), *bits_of(jnp.asarray(leaf)))
        for path, leaf in leaves
    ]


def bits_of(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()


def cast_like(tree, like):
    def cast(leaf, old):
        is_key = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
        return leaf if is_key else leaf.astype(old.dtype)

    return jax.tree.map(cast, tree, like)


def with_nan(grads):
    leaves, treedef = jax.tree.flatten(grads)
    return treedef.unflatten([leaves[0].at[..., 0].set(jnp.nan), *leaves[1:]])


@pytest.fixture
def optax_broadcasts():
    """For arithmetic of Optax's own, which adds axes to scalars."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("optax_broadcasts")
@pytest.mark.parametrize(("case", "dtype"), MEMBERS)
def test_steps_taken_are_the_inners_and_steps_skipped_leave_no_trace(case, dtype):
    check_steps(case, *drawn(case, dtype))


def check_steps(case, params, grads):
    """Two steps, each followed by one with a NaN, beside the inner alone."""
    inner = case.make()
    tx = skip_by_global_norm(inner)
    alone, step = step_of(inner, case), step_of(tx, case)
    state, expected_state = tx.init(params), inner.init(params)
    assert bits(state.inner_state) == bits(expected_state)
    for scale in (1, 2):
        grads = jax.tree.map(lambda grad, scale=scale: grad * scale, grads)
        expected, new_state = alone(grads, expected_state, params)
        # Some states of Optax have another dtype after an update than before it.
        expected_state = cast_like(new_state, expected_state)
        updates, state = step(grads, state, params)
        assert bits(updates) == bits(expected)
        assert bits(state.inner_state) == bits(expected_state)

        zeros, state = step(with_nan(grads), state, params)
        assert bits(zeros) == bits(jax.tree.map(jnp.zeros_like, expected))
        assert bits(state.inner_state) == bits(expected_state)
    assert (state.num_updates, state.num_skipped) == (4, 2)


# Optax raises in these by themselves where parameters and gradients have different
# dtypes: a branch that updates returns other dtypes than one that does not.
REFUSE_MIXED_DTYPES = {
    ("bfloat16", "float32"): """
        scale_by_novograd novograd apply_if_finite conditionally_mask
        conditionally_transform contrib.scale_by_galore contrib.galore
        contrib.mechanize
        """.split(),
    ("float32", "bfloat16"): """
        apply_if_finite conditionally_mask conditionally_transform
        contrib.scale_by_galore contrib.galore
        """.split(),
}
# Of parameters and gradients. Equal dtypes are tested with the steps above.
DTYPES = [("bfloat16", "float32"), ("float32", "bfloat16")]
each_dtypes = pytest.mark.parametrize(
    "dtypes",
    [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.slow)],
    ids="-".join,
)


def types_of(tree):
    return [
        (jax.tree_util.keystr(path), leaf.dtype, leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


@pytest.mark.usefixtures("optax_broadcasts")
@each_dtypes
@pytest.mark.parametrize("name", CASES)
def test_dtypes_and_shapes_of_the_inner_state_never_change(name, dtypes):
    """With parameters of the first dtype, and gradients of the second."""
    case = CASES[name]
    params, grads = drawn(case, *dtypes)
    inner = case.make()
    if name in REFUSE_MIXED_DTYPES.get(dtypes, ()):
        with pytest.raises(TypeError):
            jax.eval_shape(step_of(inner, case), grads, inner.init(params), params)
        return
    tx = skip_by_global_norm(inner)
    state = tx.init(params)
    expected, _ = jax.eval_shape(step_of(inner, case), grads, state.inner_state, params)
    updates, new_state = jax.eval_shape(step_of(tx, case), grads, state, params)
    assert types_of(updates) == types_of(expected)
    assert types_of(new_state) == types_of(state)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@each_dtypes
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("contrib.prodigy", marks=pytest.mark.slow),
        *"contrib.dadapt_adamw adan scale_by_adam chain snapshot".split(),
    ],
)
def test_state_keeps_its_dtype_where_the_inner_changes_it(name, dtypes):
    check_steps(CASES[name], *drawn(CASES[name], *dtypes))


@pytest.mark.parametrize("bad", [1.0, np.nan])
@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ({"a": np.zeros(2, "f4")}, {"a": np.zeros(3, "f4")}, "a"),
        ({"a": np.zeros((), "f4")}, {"a": np.zeros(2, "f4")}, "a"),
        ({"a": np.zeros(2, "f4")}, {"b": np.zeros(2, "f4")}, "a"),
        ({"a": None}, {"a": np.zeros(2, "f4")}, "a"),
        ({"deep": {"leaf": np.zeros(2, "f4")}}, {"deep": {"leaf": None}}, "leaf"),
    ],
)
def test_inner_state_of_another_shape_or_structure_is_an_error(old, new, path, bad):
    inner = optax.GradientTransformation(lambda _: old, lambda u, *_: (u, new))
    tx = skip_by_global_norm(inner)
    with pytest.raises((TypeError, ValueError), match=path):
        tx.update(jnp.full(2, bad), tx.init(None))


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="Optax 0.2.7 added it")
def test_monitor_is_an_error_that_names_what_it_adds_to_its_state():
    tx = skip_by_global_norm(optax.monitor({"seen": optax.tree.norm}))
    with pytest.raises((TypeError, ValueError), match="seen|measurements"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


# --- Extra arguments.


def recorder(seen, kind=optax.GradientTransformationExtraArgs):
    """A transformation that only records the extra arguments of each update."""

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    return kind(lambda _: None, update)


EXTRA = {
    "nothing": {},
    "a value": {"value": 1.5},
    "the norm": {"use_norm": 2.5},
    "an array as norm": {"use_norm": np.float32(2.5), "value": 1},
    "a function": {"value_fn": loss_of, "grad": None, "value": np.float32(3)},
    "the names of our own fields": {"global_norm": 1, "ord": 3, "axis_name": "x"},
    "names of others": {"updates_": 1, "taken": False, "norm": 7.0, "leaves": ()},
}
TAKERS = {
    "alone": lambda inner: inner,
    "MultiSteps": lambda inner: optax.MultiSteps(inner, 1),
    "MultiSteps of two": lambda inner: optax.MultiSteps(inner, 2),
    "chain": lambda inner: optax.chain(inner, optax.scale(2.0)),
    "skip": skip_by_global_norm,
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
    "partition": lambda inner: optax.partition({"all": inner}, "all"),
}


@pytest.mark.parametrize("bad", [1.0, np.nan], ids=["taken", "skipped"])
@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
@pytest.mark.parametrize("wrap", TAKERS.values(), ids=TAKERS)
def test_inner_gets_exactly_the_extra_arguments_given(wrap, extra, bad):
    seen = []
    tx = skip_by_global_norm(wrap(recorder(seen)))
    grads = {"w": jnp.full(2, bad)}
    tx.update(grads, tx.init(grads), grads, **extra)
    assert seen
    for found in seen:
        assert set(found) == set(extra)
        assert all(found[name] is extra[name] for name in extra)


@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
@pytest.mark.parametrize("nest", [lambda tx: tx, optax.chain], ids=["alone", "chain"])
def test_transformation_without_extra_arguments_gets_none(nest, extra):
    seen = []
    plain = recorder(seen, kind=optax.GradientTransformation)
    tx = skip_by_global_norm(nest(plain))
    tx.update(jnp.ones(2), tx.init(None), None, **extra)
    assert seen == [{}]


def test_inner_that_takes_one_extra_argument_only():
    def update(updates, state, params=None, *, value=1.0):
        return updates * value, state

    inner = optax.GradientTransformationExtraArgs(lambda _: None, update)
    tx = skip_by_global_norm(inner)
    updates, _ = tx.update(jnp.ones(2), tx.init(None))
    np.testing.assert_array_equal(updates, [1, 1])
    updates, _ = tx.update(jnp.ones(2), tx.init(None), value=3.0)
    np.testing.assert_array_equal(updates, [3, 3])


# --- States of others.

STATES = {
    "None": None,
    "EmptyState": optax.EmptyState(),
    "()": (),
    "...": ...,
    "an int": 3,
    "adam's": optax.adam(0.1).init({"w": jnp.ones(2)}),
    "the inner's": optax.chain(optax.trace(0.9)).init({"w": jnp.ones(2)}),
    "a clip's": clip_by_global_norm(1.0).init(None),
    "a dictionary": {"inner_state": 1},
}


@pytest.mark.parametrize("with_params", [True, False])
@pytest.mark.parametrize("bad", [1.0, np.nan], ids=["taken", "skipped"])
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_state_of_another_is_that_before_the_first_update(state, bad, with_params):
    tx = skip_by_global_norm(optax.trace(0.9), zscore_threshold())
    grads = {"w": jnp.full(2, bad)}
    params = {"w": jnp.full(2, 7.0)} if with_params else None
    expected = tx.update(grads, tx.init(grads if params is None else params), params)
    found = tx.update(grads, state, params)
    assert bits(found) == bits(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


# --- Checks of the inner.

CLIP_OR_RAISE = clip_by_global_norm(1.0, nonfinite="error")
CHECKED = {
    "clip": lambda: CLIP_OR_RAISE,
    "clip in a chain": lambda: optax.chain(CLIP_OR_RAISE, optax.adam(0.1)),
    "clip after a scale": lambda: optax.chain(optax.scale(2.0), CLIP_OR_RAISE),
    "clip at the end": lambda: optax.chain(optax.trace(0.9), CLIP_OR_RAISE),
    "jitted": lambda: CLIP_OR_RAISE._replace(update=jax.jit(CLIP_OR_RAISE.update)),
    "masked": lambda: optax.masked(CLIP_OR_RAISE, ONLY_W),
    "another order": lambda: clip_by_global_norm(1.0, ord=1, nonfinite="error"),
    "in another skip": lambda: skip_by_global_norm(CLIP_OR_RAISE),
}


def errors_of(tx, grads, state, jitted):
    """What ``checkify`` says of one update."""
    update = jax.jit(tx.update) if jitted else tx.update
    error, _ = checkify.checkify(lambda g, s: update(g, s, g))(grads, state)
    return error.get()


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow), 1e30]
)
@pytest.mark.parametrize("make", CHECKED.values(), ids=CHECKED)
def test_inner_check_does_not_fire_on_a_skipped_step(make, bad, jitted):
    tx = skip_by_global_norm(make(), 100.0)
    grads = {"w": jnp.full(2, bad), "b": jnp.ones(1)}
    assert errors_of(tx, grads, tx.init(grads), jitted) is None


@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_inner_check_fires_on_a_step_that_overflows_inside(jitted):
    tx = skip_by_global_norm(optax.chain(optax.scale(1e30), CLIP_OR_RAISE))
    state = tx.init(None)
    assert errors_of(tx, jnp.full(2, 1e20), state, jitted)
    assert errors_of(tx, jnp.full(2, 1e5), state, jitted) is None


# --- A skip in a skip.


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


# --- Orders that are operands.

ORDERS = {"a number": 2.0, "a NumPy array": np.float32(2), "an array": jnp.float32(2)}


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "as it is"])
@pytest.mark.parametrize("inner", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("outer", ORDERS.values(), ids=ORDERS)
def test_skip_and_clip_by_orders_of_any_kind(outer, inner, traced):
    def clipped(outer):
        tx = skip_by_global_norm(clip_by_global_norm(1.0, ord=inner), 10.0, ord=outer)
        updates = jnp.array([3.0, 4.0])
        return tx.update(updates, tx.init(updates))[0]

    found = (jax.jit(clipped) if traced else clipped)(outer)
    np.testing.assert_allclose(found, [0.6, 0.8], 1e-6)


# --- The norm is measured once.

REDUCTIONS = ("reduce", "dot_general", "psum", "while", "scan")


def reductions(tx, params):
    """How many operations of the traced update reduce an array or loop over one."""
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    names = [equation.primitive.name for equation in oracle.equations(jaxpr)]
    return sum(name.startswith(REDUCTIONS) for name in names)


def jitted(tx):
    return tx._replace(update=jax.jit(tx.update))


CLIP_FIRST = {
    "alone": lambda clip: clip,
    "before sgd": lambda clip: optax.chain(clip, optax.sgd(0.1)),
    "in chains": lambda clip: optax.chain(optax.chain(clip), optax.scale(2.0)),
    "named": lambda clip: optax.named_chain(("clip", clip), ("sgd", optax.sgd(0.1))),
    "masked, all": lambda clip: optax.masked(clip, {"w": True, "b": True}),
}


@pytest.mark.parametrize("dtype", oracle.FLOATS)
@pytest.mark.parametrize("ord", [2, 1, 3, np.inf])
@pytest.mark.parametrize("wrap", CLIP_FIRST.values(), ids=CLIP_FIRST)
def test_norm_is_measured_once_where_a_clip_comes_first(wrap, ord, dtype):
    params = oracle.normals(SHAPES, dtype)
    clip = clip_by_global_norm(1.0, ord=ord)
    once = reductions(clip, params)
    assert once >= 2
    assert reductions(skip_by_global_norm(wrap(clip), 5.0, ord=ord), params) == once


def test_norm_is_measured_once_in_skips_of_skips():
    params = oracle.normals(SHAPES)
    tx = clip_by_global_norm(1.0)
    once = reductions(tx, params)
    for _ in range(3):
        tx = skip_by_global_norm(tx, zscore_threshold(6.0))
        assert reductions(tx, params) == once


@pytest.mark.parametrize(
    ("inner", "times"),
    [
        (optax.chain(optax.scale(2.0), clip_by_global_norm(1.0)), 2),
        (optax.chain(*[clip_by_global_norm(1.0)] * 2), 2),
    ],
    ids=["scaled", "clipped twice"],
)
def test_norm_of_other_leaves_is_measured_anew(inner, times):
    params = oracle.normals(SHAPES)
    once = reductions(clip_by_global_norm(1.0), params)
    assert reductions(skip_by_global_norm(inner, 5.0), params) == times * once


def test_norm_is_reduced_over_devices_once():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    clip = clip_by_global_norm(1.0)

    def reductions_of(tx):
        def norm(tree):
            _, state = tx.update(tree, tx.init(tree), tree)
            return state.global_norm

        sharded = jax.shard_map(norm, mesh=mesh, in_specs=P("x"), out_specs=P())
        jaxpr = jax.make_jaxpr(sharded)({"w": jnp.ones(8), "b": jnp.ones(16)})
        names = [e.primitive.name for e in oracle.equations(jaxpr.jaxpr)]
        return sum(name.startswith("psum") for name in names)

    once = reductions_of(clip)
    assert once >= 1
    tx = skip_by_global_norm(optax.chain(clip, optax.sgd(0.1)), zscore_threshold())
    assert reductions_of(tx) == once


# --- A compiled inner, called from Python.

COMPILED = {
    "clip": lambda clip: jitted(clip),
    "clip in a chain": lambda clip: jitted(optax.chain(clip, optax.scale(3.0))),
    "after a scale": lambda clip: jitted(optax.chain(optax.scale(3.0), clip)),
    "part of a chain": lambda clip: optax.chain(jitted(clip), optax.scale(3.0)),
    "in a compiled skip": lambda clip: jitted(skip_by_global_norm(clip)),
}


@pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED)
def test_compiled_inner_follows_each_steps_norm(wrap):
    """Nothing of the first step, at which it is traced, stays in the program."""
    tx = skip_by_global_norm(wrap(clip_by_global_norm(1.0)), 100.0)
    grads = oracle.normals(SHAPES)
    direction = oracle.clipped(grads, 1.0)
    state = tx.init(grads)
    length = oracle.norm(tx.update(grads, state, grads)[0])
    assert min(abs(length - 1), abs(length - 3)) < 1e-5
    taken = 0
    for scale in (4.0, 0.9, 1e3, 7.0, np.nan, 11.0):
        scaled = jax.tree.map(lambda grad, scale=scale: grad * scale, grads)
        updates, state = tx.update(scaled, state, grads)
        is_taken = scale * oracle.norm(grads) <= 100
        taken += is_taken
        for name in SHAPES:
            expected = is_taken * length * direction[name]
            np.testing.assert_allclose(updates[name], expected, 1e-5)
        assert state.num_updates - state.num_skipped == taken
