"""Classes of clients: debug switches, wrappers, states and leaves of others."""

import collections
import contextlib
import functools
import math
import types

import equinox as eqx
import equinox.internal
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
PARAMS = jax.tree.map(jnp.zeros_like, GRADS)
THRESHOLDS = {
    "number": lambda: 1.0,
    "array": lambda: jnp.float32(1.0),
    "inf": lambda: math.inf,
    "None": lambda: None,
    "schedule": lambda: optax.linear_schedule(1.0, 0.5, 4),
    "z-score": lambda: zscore_threshold(warmup_steps=2),
    "quantile": lambda: quantile_threshold(0.5, window=3, warmup_steps=2),
}
TRANSFORMATIONS = {
    f"{kind}, {name}": functools.partial(make, threshold)
    for kind, make in {
        "clip": lambda t, **o: clip_by_global_norm(t(), **o),
        "skip": lambda t, **o: skip_by_global_norm(optax.trace(0.1), t(), **o),
        "both": lambda t, **o: skip_by_global_norm(
            optax.chain(clip_by_global_norm(t(), **o), optax.scale_by_adam()), 9.0, **o
        ),
    }.items()
    for name, threshold in THRESHOLDS.items()
}
each_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def after(tx, *scales):
    """The state after updates with gradients scaled so."""
    state = tx.init(PARAMS)
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: g * np.float32(s), GRADS)
        _, state = tx.update(grads, state, PARAMS)
    return state


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- JAX's own hunters find nothing in finite updates.


def checked(function):
    compiled = jax.jit(checkify.checkify(function, errors=checkify.float_checks))

    def call(*args):
        error, result = compiled(*args)
        error.throw()
        return result

    return call


@contextlib.contextmanager
def nans_without_jit():
    with jax.debug_nans(True), jax.disable_jit(True):
        yield


def same(function):
    return function


SWITCHES = {
    "debug_nans": (lambda: jax.debug_nans(True), jax.jit),
    "debug_nans, eager": (lambda: jax.debug_nans(True), same),
    "debug_nans, disable_jit": (nans_without_jit, same),
    "float_checks": (contextlib.nullcontext, checked),
    "leaks": (jax.checking_leaks, jax.jit),
    "enable_checks": (lambda: jax.enable_checks(True), jax.jit),
    "transfer_guard": (lambda: jax.transfer_guard("disallow"), jax.jit),
}
MAGNITUDES = [1.0, 0.0, 3e38, 1.2e-38, 1e-44, 1.0]


def finite_trees():
    """Entries of every magnitude in every dtype, alike and mixed."""
    for entries in [np.full(3, m) for m in MAGNITUDES] + [np.array(MAGNITUDES[:3])]:
        yield {
            "float32": jnp.asarray(entries, jnp.float32),
            "bfloat16": jnp.asarray(np.minimum(entries, 3e38), jnp.bfloat16),
            "float16": jnp.asarray(np.minimum(entries, 6e4), jnp.float16),
            "complex64": jnp.asarray(entries + 1j * entries, jnp.complex64),
            "empty": jnp.zeros(0),
        }


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", [n for n in TRANSFORMATIONS if "both" not in n])
def test_finite_updates_pass_the_debug_switches_of_jax(name, switch):
    setting, compiled = SWITCHES[switch]
    trees = list(finite_trees())
    for ord in [1, 2, 3, math.inf] if "number" in name else [2]:
        tx = TRANSFORMATIONS[name](ord=ord)
        state = tx.init(trees[0])
        update = compiled(lambda g, s, tx=tx: tx.update(g, s, g))
        with setting():
            for tree in trees:
                updates, state = update(tree, state)
                metrics(state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


FUNCTIONS = {
    "norm": lambda tree: global_norm(tree),
    "leaves": lambda tree: leaf_norms(tree),
    "given": lambda tree: clip_updates(tree, 1.0, use_norm=3e38),
    "zero": lambda tree: clip_updates(tree, 0.0, nonfinite="zero"),
    "slope": lambda tree: jax.grad(global_norm)(real(tree)),
    "slope of a clip": lambda tree: jax.grad(
        lambda tree: jnp.sum(clip_updates(tree, 0.5)[0]["float32"])
    )(real(tree)),
}


def real(tree):
    return {"float32": tree["float32"]}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_pass_the_debug_switches_of_jax(name, switch):
    setting, compiled = SWITCHES[switch]
    function, trees = compiled(FUNCTIONS[name]), list(finite_trees())
    with setting():
        for tree in trees:
            function(tree)


# --- What init and update close over may be hashed and taken apart.


@each_transformation
def test_closures_are_pytrees_of_hashable_leaves(name):
    """As Equinox takes them, and with it Optimistix."""
    tx = TRANSFORMATIONS[name]()
    init, update = map(equinox.internal.closure_to_pytree, tx)
    for leaf in jax.tree.leaves((init, update)):
        assert eqx.is_array(leaf) or isinstance(hash(leaf), int), leaf
    step = eqx.filter_jit(lambda update, grads, state: update(grads, state, grads))
    with jax.numpy_dtype_promotion("standard"):
        found = step(update, GRADS, init(PARAMS))
        assert_close(found, tx.update(GRADS, tx.init(PARAMS), GRADS))


def assert_close(found, expected):
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(compare, found, expected)


@each_transformation
def test_optimistix_minimises_with_every_transformation(name):
    optimistix = pytest.importorskip("optimistix")
    solver = optimistix.OptaxMinimiser(
        optax.chain(TRANSFORMATIONS[name](), optax.sgd(0.1)), rtol=1e-3, atol=1e-3
    )
    with jax.numpy_dtype_promotion("standard"):
        found = optimistix.minimise(
            lambda y, _: jnp.sum((y - 1) ** 2), solver, jnp.zeros(2), throw=False
        )
    assert np.isfinite(found.value).all()


# --- States in every form that clients keep them in.


def boxed(state):
    """As Orbax restores the state of Flax NNX without a target."""
    if hasattr(state, "_asdict"):
        return {k: boxed(v) for k, v in state._asdict().items()}
    if isinstance(state, tuple):
        return {str(i): boxed(each) for i, each in enumerate(state)}
    return {"value": state} if hasattr(state, "dtype") else state


FORMS = {
    "NumPy": lambda state: jax.tree.map(np.asarray, state),
    "serialized": flax.serialization.to_state_dict,
    "frozen": lambda state: FrozenDict(flax.serialization.to_state_dict(state)),
    "bytes": lambda state: flax.serialization.msgpack_restore(
        flax.serialization.to_bytes(state)
    ),
    "boxed": boxed,
    "boxed NumPy": lambda state: jax.tree.map(np.asarray, boxed(state)),
    "variables": lambda state: jax.tree.map(nnx.Variable, state),
    "boxed variables": lambda state: boxed(jax.tree.map(nnx.Variable, state)),
}


@each_transformation
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("optax_promotes")
def test_metrics_are_the_same_in_every_form(name, form):
    states = (after(TRANSFORMATIONS[name](), 1, 2, math.nan), optax.EmptyState())
    expected, found = metrics(states), metrics(FORMS[form](states))
    assert len(expected) == len(found) > 0
    np.testing.assert_array_equal(list(found.values()), list(expected.values()))


def test_metrics_count_the_latest_skips_in_a_row():
    tx = skip_by_global_norm(optax.identity(), 9.0)
    scales = [1, 2, math.nan, math.inf, 1, 1, 2]
    counts = [
        metrics(after(tx, *scales[:i]))["consecutive_skips"]
        for i in range(len(scales) + 1)
    ]
    assert counts == [0, 0, 1, 2, 3, 0, 0, 1]


BEGINNINGS = {"None": None, "EmptyState": optax.EmptyState()}
MAPPINGS = {
    "dict": lambda state: state._asdict(),
    "OrderedDict": lambda state: collections.OrderedDict(state._asdict()),
    "FrozenDict": lambda state: FrozenDict(state._asdict()),
    "proxy": lambda state: types.MappingProxyType(state._asdict()),
    "of NumPy arrays": lambda state: jax.tree.map(np.asarray, state)._asdict(),
}
FOREIGN = {
    "()": lambda state: (),
    "an int": lambda state: 3,
    "an array": lambda state: np.zeros(3),
    "of the inner alone": lambda state: state.inner_state,
    "of Adam": lambda state: optax.adam(0.1).init(PARAMS),
    "of a clip": lambda state: clip_by_global_norm(1.0).init(PARAMS),
    "in a chain": lambda state: (state,),
    "tuple of its fields": tuple,
    "an older tuple": lambda state: tuple(state[:-1]),
    "fewer fields": lambda state: dict(list(state._asdict().items())[1:]),
    "more fields": lambda state: state._asdict() | {"more": 1},
    "params": lambda state: PARAMS,
}
SKIPS = [name for name in TRANSFORMATIONS if "clip" not in name]
each_skip = pytest.mark.parametrize("name", SKIPS)
each_way = pytest.mark.parametrize("compiled", [same, jax.jit], ids=["eager", "jit"])


@each_way
@each_skip
@pytest.mark.parametrize("form", MAPPINGS)
@pytest.mark.usefixtures("optax_promotes")
def test_skip_goes_on_from_a_mapping_with_its_fields(name, form, compiled):
    if compiled is jax.jit and form == "proxy":
        pytest.skip("JAX takes no such mapping as a tree")
    tx = TRANSFORMATIONS[name]()
    state = after(tx, 1, math.nan)
    update = compiled(tx.update)
    assert_close(
        update(GRADS, MAPPINGS[form](state), PARAMS), update(GRADS, state, PARAMS)
    )


@each_way
@each_skip
@pytest.mark.usefixtures("optax_promotes")
def test_skip_begins_anew_from_none_and_empty_states_only(name, compiled):
    tx = TRANSFORMATIONS[name]()
    state = after(tx, 1)
    update = compiled(tx.update)
    for given in BEGINNINGS.values():
        assert_close(
            update(GRADS, given, PARAMS), update(GRADS, tx.init(PARAMS), PARAMS)
        )
    for form in FOREIGN.values():
        with pytest.raises(TypeError, match="inner_state"):
            update(GRADS, form(state), PARAMS)


@each_skip
@pytest.mark.usefixtures("optax_promotes")
def test_skip_never_loses_the_inner_state_of_a_nested_mapping(name):
    """It goes on from it or raises, as the inner transformation does."""
    tx = TRANSFORMATIONS[name]()
    state = after(tx, 1, 1)
    given = flax.serialization.to_state_dict(state)
    try:
        found = tx.update(GRADS, given, PARAMS)
    except (TypeError, ValueError, AttributeError):
        return
    assert_close(found, tx.update(GRADS, state, PARAMS))


# --- One NaN in what Optax accumulates.

NAN_THEN_FINITE = [1, math.nan, *[1] * 8]
ZERO = functools.partial(clip_by_global_norm, math.inf, nonfinite="zero")
RECOVER = {
    "skip of MultiSteps": lambda: skip_by_global_norm(
        optax.MultiSteps(optax.sgd(1.0), 2)
    ),
    "skip_not_finite": lambda: optax.MultiSteps(
        skip_by_global_norm(optax.sgd(1.0)),
        2,
        should_skip_update_fn=optax.skip_not_finite,
    ),
    "clip before MultiSteps": lambda: optax.chain(
        ZERO(), optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    ),
    "clip before apply_every": lambda: optax.chain(ZERO(), optax.apply_every(2)),
    "skip of apply_every": lambda: skip_by_global_norm(optax.apply_every(2)),
    "clip before ema": lambda: optax.chain(ZERO(), optax.ema(0.9)),
    "skip of lookahead": lambda: skip_by_global_norm(optax.trace(0.9)),
}
STALL = {
    "MultiSteps of a skip": lambda: optax.MultiSteps(
        skip_by_global_norm(optax.sgd(1.0)), 2
    ),
    "MultiSteps of a clip": lambda: optax.MultiSteps(
        optax.chain(ZERO(), optax.sgd(1.0)), 2
    ),
    "apply_every before a clip": lambda: optax.chain(optax.apply_every(2), ZERO()),
    "apply_every before a skip": lambda: optax.chain(
        optax.apply_every(2), skip_by_global_norm(optax.identity())
    ),
    "ema before a clip": lambda: optax.chain(optax.ema(0.9), ZERO()),
}


def last_steps(tx):
    """Whether a step is taken after a NaN, and whether all that is kept is finite."""
    state, steps = tx.init(PARAMS), []
    for scale in NAN_THEN_FINITE:
        grads = jax.tree.map(lambda g, s=scale: g * np.float32(s), GRADS)
        updates, state = tx.update(grads, state, PARAMS)
        steps.append(oracle.norm(updates))
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    return max(steps[-2:]) > 0, finite


@pytest.mark.whole
@pytest.mark.parametrize("case", RECOVER)
@pytest.mark.usefixtures("optax_promotes")
def test_runs_that_one_nan_does_not_stop(case):
    taken, _ = last_steps(RECOVER[case]())
    assert taken


@pytest.mark.whole
@pytest.mark.parametrize("case", STALL)
@pytest.mark.usefixtures("optax_promotes")
def test_one_nan_stays_in_an_accumulator_of_optax_that_no_skip_is_around(case):
    """Its pages and docstrings warn of it; should Optax mend it, they need not."""
    assert last_steps(STALL[case]()) == (False, False)


# --- Programs and the time to build them grow with the leaves, no faster.

BUILT = {
    "norm": lambda tree, ord: global_norm(tree, ord=ord),
    "leaves": lambda tree, ord: leaf_norms(tree, ord=ord),
    "clip": lambda tree, ord: clip_updates(tree, 1.0, ord=ord),
    "skip": lambda tree, ord: skip_by_global_norm(
        clip_by_global_norm(1.0, ord=ord), ord=ord
    ).update(tree, None),
    "slope": lambda tree, ord: jax.grad(lambda x: global_norm(x, ord=ord))(tree),
}


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, math.inf])
def test_programs_grow_linearly_in_the_leaves(built, ord):
    def sizes(leaves):
        tree = [jnp.ones((3, 5 + i % 7)) for i in range(leaves)]
        traced = jax.jit(BUILT[built], static_argnums=1).trace(tree, ord)
        lowered = traced.lower()
        return np.array(
            [
                len(list(oracle.equations(traced.jaxpr.jaxpr))),
                lowered.as_text().count("\n"),
                lowered.compile().as_text().count("\n"),
            ]
        )

    few, some, many = map(sizes, (16, 32, 64))
    assert (many - some <= 2.5 * np.maximum(some - few, 16)).all(), (few, some, many)


# --- Stages on several meshes; code that assumes a clip without state.


def test_one_norm_over_stages_on_several_meshes():
    """The norm of the stages' norms, each stage clipped by it as ``use_norm``."""
    devices = jax.devices()
    stages = []
    for i, own in enumerate((devices[:4], devices[4:6], devices[6:7])):
        mesh = jax.make_mesh((len(own),), ("x",), (AxisType.Explicit,), devices=own)
        leaf = np.arange(1.0 + i, 9 + i, dtype=np.float32)
        stages.append([jax.device_put(leaf, NamedSharding(mesh, P("x")))])
    norm = global_norm([float(global_norm(stage)) for stage in stages])
    np.testing.assert_allclose(norm, oracle.norm(stages), 1e-6)
    found = [clip_updates(stage, 2.0, use_norm=float(norm))[0] for stage in stages]
    oracle.assert_clipped(found, stages, 2.0)


def test_a_stateless_clip_for_code_that_reads_no_states():
    clip = optax.stateless(lambda updates, params: clip_updates(updates, 1.0)[0])
    state = clip.init(PARAMS)
    assert (state, jax.tree.leaves(state)) == (optax.EmptyState(), [])
    updates, _ = clip.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-6)


# --- Leaves that lose what they say, and numbers of NumPy.

MASKED = {
    "masked": np.ma.array([3.0, 4.0], np.float32, mask=[0, 1]),
    "without a mask": np.ma.array([3.0, 4.0], np.float32),
    "0-d": np.ma.array(3.0, mask=True),
    "the constant": np.ma.masked,
    "complex": np.ma.array([3j, 4.0], mask=[1, 0]),
    "hard": np.ma.array(np.ones(2, np.float32), mask=True, hard_mask=True),
}
SUBCLASSES = {
    "matrix": lambda x: np.asmatrix(x),
    "recarray view": lambda x: x.view(np.recarray),
    "memmap": lambda x: x.view(np.memmap),
    "own": lambda x: x.view(type("Own", (np.ndarray,), {})),
}
TAKEN = {
    "norm": global_norm,
    "leaves": leaf_norms,
    "clip": lambda tree: clip_updates(tree, 1.0),
    "transformation": lambda tree: clip_by_global_norm(1.0).update(tree, None),
    "skip": lambda tree: skip_by_global_norm(optax.identity()).update(tree, None),
}
each_taken = pytest.mark.parametrize("take", TAKEN)


@each_taken
@pytest.mark.parametrize("leaf", MASKED)
def test_masked_arrays_are_refused_by_their_path(leaf, take):
    with pytest.raises(TypeError, match=r"\['w'\]\[1\]"):
        TAKEN[take]({"w": [jnp.ones(2), MASKED[leaf]], "b": np.ones(1, np.float32)})


@each_taken
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_other_subclasses_are_taken_for_their_buffer(take):
    plain = np.float32([[3.0, 4.0]])
    for subclass in SUBCLASSES.values():
        leaf = subclass(plain)
        assert type(leaf) is not np.ndarray
        assert_equal(TAKEN[take]([leaf]), TAKEN[take]([plain]))


@each_taken
@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8", ">c8", ">c16"])
def test_big_endian_leaves_are_refused_by_their_path(dtype, take):
    for shape in ((), (9, 9)):
        leaf = np.ones(shape, dtype)
        with pytest.raises(TypeError, match=r"\['w'\]") as error:
            TAKEN[take]({"w": leaf})
        assert len(str(error.value)) < 400


ITERATORS = {
    "values": dict.values,
    "iter": lambda tree: iter(tree.values()),
    "generator": lambda tree: (leaf for leaf in tree.values()),
    "map": lambda tree: map(jnp.negative, tree.values()),
}


@each_taken
@pytest.mark.filterwarnings("ignore:Python iterable type:DeprecationWarning")
@pytest.mark.parametrize("iterator", ITERATORS)
def test_iterators_are_told_to_be_lists(iterator, take):
    with pytest.raises(TypeError, match=r"list\("):
        TAKEN[take](ITERATORS[iterator](GRADS))


NUMBERS = {
    "max_norm": lambda n: clip_by_global_norm(n(2)),
    "schedule": lambda n: clip_by_global_norm(lambda count: n(2)),
    "threshold": lambda n: clip_by_global_norm(
        Threshold(lambda: jnp.float32(0), lambda norm, state, count: (n(2), norm))
    ),
    "memory": lambda n: clip_by_global_norm(
        Threshold(lambda: n(1), lambda norm, state, count: (2.0, state))
    ),
    "ord": lambda n: clip_by_global_norm(1.0, ord=n(3)),
    "z": lambda n: clip_by_global_norm(zscore_threshold(n(2), warmup_steps=2)),
    "warmup_steps": lambda n: clip_by_global_norm(zscore_threshold(warmup_steps=n(2))),
    "decay": lambda n: clip_by_global_norm(
        zscore_threshold(decay=n(0) if isinstance(n(0), int) else n(0.5))
    ),
    "q": lambda n: clip_by_global_norm(quantile_threshold(n(1), window=2)),
    "window": lambda n: clip_by_global_norm(
        quantile_threshold(0.5, window=n(3), warmup_steps=n(2))
    ),
    "skips": lambda n: skip_by_global_norm(
        optax.identity(), n(1), max_consecutive_skips=n(2)
    ),
}
INTEGRAL = ("warmup_steps", "window", "skips")
TYPES = [
    int,
    np.int64,
    np.int32,
    np.int8,
    np.uint64,
    np.float32,
    np.float64,
    np.float16,
]


@pytest.mark.parametrize("double", [False, True], ids=["", "x64"])
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_numpy_count_as_those_of_python(number, type_, double):
    if np.issubdtype(type_, np.floating) and number in INTEGRAL:
        pytest.skip("an integer is needed")
    if np.issubdtype(type_, np.integer) and number == "decay":
        pytest.skip("a fraction is needed")

    def run(convert):
        state = after(NUMBERS[number](convert), *[1, 2, 3])
        return jax.tree.map(jnp.float32, state), jax.tree.map(lambda x: x.dtype, state)

    expected = run(int if np.issubdtype(type_, np.integer) else float)
    with jax.enable_x64(double):
        found = run(type_)
    if number == "memory":  # A threshold's state is its own, in the dtype that it has.
        expected, found = expected[:1], found[:1]
    assert_close(found[0], expected[0])
    assert found[1:] == expected[1:]
