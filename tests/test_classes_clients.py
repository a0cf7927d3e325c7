"""Classes of clients: debug switches, wrappers, states, leaves, numbers of others."""

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
KINDS = {
    "clip": clip_by_global_norm,
    "skip": lambda t, **o: skip_by_global_norm(optax.trace(0.1), t, **o),
    "both": lambda t, **o: skip_by_global_norm(
        optax.chain(clip_by_global_norm(t, **o), optax.scale_by_adam()), 9.0, **o
    ),
}


def make(name, **options):
    kind, threshold = name.split(", ")
    return KINDS[kind](THRESHOLDS[threshold](), **options)


NAMES = [f"{kind}, {threshold}" for kind in KINDS for threshold in THRESHOLDS]
each_transformation = pytest.mark.parametrize("name", NAMES)


def after(tx, *scales):
    """The state after updates with gradients scaled so."""
    state = tx.init(PARAMS)
    for scale in scales:
        grads = jax.tree.map(lambda g, s=scale: g * np.float32(s), GRADS)
        _, state = tx.update(grads, state, PARAMS)
    return state


def assert_close(found, expected):
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(compare, found, expected)


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


SWITCHES = {
    "debug_nans": (lambda: jax.debug_nans(True), jax.jit),
    "debug_nans, eager": (lambda: jax.debug_nans(True), lambda f: f),
    "debug_nans, disable_jit": (nans_without_jit, lambda f: f),
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
            "bfloat16": jnp.asarray(entries, jnp.bfloat16),
            "float16": jnp.asarray(np.minimum(entries, 6e4), jnp.float16),
            "complex64": jnp.asarray(entries + 1j * entries, jnp.complex64),
            "empty": jnp.zeros(0),
        }


def slope(function):
    """The gradient by the float32 leaf."""
    return lambda tree: jax.grad(lambda x: function(tree | {"float32": x}))(
        tree["float32"]
    )


FUNCTIONS = {
    "leaves": leaf_norms,
    "given": lambda tree: clip_updates(tree, 1.0, use_norm=3e38),
    "zero": lambda tree: clip_updates(tree, 0.0, nonfinite="zero"),
    "slope": slope(global_norm),
    "slope of a clip": slope(lambda t: jnp.sum(clip_updates(t, 0.5)[0]["float32"])),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", [n for n in NAMES if "both" not in n] + [*FUNCTIONS])
def test_finite_updates_pass_the_debug_switches_of_jax(name, switch):
    setting, compiled = SWITCHES[switch]
    trees = list(finite_trees())
    if name in FUNCTIONS:
        function = compiled(FUNCTIONS[name])
        with setting():
            return [function(tree) for tree in trees] and None
    for ord in (1, 2, 3, math.inf) if "number" in name else (2,):
        tx = make(name, ord=ord)
        updates, update = None, compiled(tx.update)
        # Where the inner is Optax's, its init transfers zeros.
        with setting() if "clip" in name else contextlib.nullcontext():
            state = tx.init(trees[0])
        with setting():
            for tree in trees:
                updates, state = update(tree, state)
                metrics(state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    return None


# --- What init and update close over may be hashed and taken apart.


@each_transformation
def test_closures_are_pytrees_of_hashable_leaves(name):
    """As Equinox takes them, and with it Optimistix."""
    tx = make(name)
    init, update = map(equinox.internal.closure_to_pytree, tx)
    for leaf in jax.tree.leaves((init, update)):
        assert eqx.is_array(leaf) or isinstance(hash(leaf), int), leaf
    step = eqx.filter_jit(lambda update, grads, state: update(grads, state, grads))
    with jax.numpy_dtype_promotion("standard"):
        found = step(update, GRADS, init(PARAMS))
        assert_close(found, tx.update(GRADS, tx.init(PARAMS), GRADS))


@each_transformation
def test_optimistix_minimises_with_every_transformation(name):
    optimistix = pytest.importorskip("optimistix")
    chain = optax.chain(make(name), optax.sgd(0.1))
    solver = optimistix.OptaxMinimiser(chain, rtol=1e-3, atol=1e-3)
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
    "serialized": flax.serialization.to_state_dict,
    "bytes": lambda state: flax.serialization.msgpack_restore(
        flax.serialization.to_bytes(state)
    ),
    "boxed": boxed,
    "boxed NumPy": lambda state: jax.tree.map(np.asarray, boxed(state)),
}


@each_transformation
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("optax_promotes")
def test_metrics_are_the_same_in_every_form(name, form):
    states = (after(make(name), 1, 2, math.nan), optax.EmptyState())
    expected, found = metrics(states), metrics(FORMS[form](states))
    assert len(expected) == len(found) > 0
    np.testing.assert_array_equal(list(found.values()), list(expected.values()))


def test_metrics_count_the_latest_skips_in_a_row():
    tx = skip_by_global_norm(optax.identity(), 9.0)
    scales = [1, 2, math.nan, math.inf, 1, 1, 2]
    states = [after(tx, *scales[:i]) for i in range(len(scales) + 1)]
    counts = [metrics(state)["consecutive_skips"] for state in states]
    assert counts == [0, 0, 1, 2, 3, 0, 0, 1]


SAME = {
    "dict": lambda state: state._asdict(),
    "FrozenDict": lambda state: FrozenDict(state._asdict()),
    "proxy": lambda state: types.MappingProxyType(state._asdict()),
    "NumPy": lambda state: jax.tree.map(np.asarray, state)._asdict(),
    "serialized": flax.serialization.to_state_dict,
}
FOREIGN = {
    "()": lambda state: (),
    "an array": lambda state: np.zeros(3),
    "of the inner alone": lambda state: state.inner_state,
    "of a clip": lambda state: clip_by_global_norm(1.0).init(PARAMS),
    "in a chain": lambda state: (state,),
    "tuple of its fields": tuple,
    "an older tuple": lambda state: tuple(state[:-1]),
    "fewer fields": lambda state: dict(list(state._asdict().items())[1:]),
    "more fields": lambda state: state._asdict() | {"more": 1},
    "params": lambda state: PARAMS,
}


@pytest.mark.parametrize("compiled", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", [n for n in NAMES if "clip" not in n])
@pytest.mark.usefixtures("optax_promotes")
def test_skip_loses_no_state_in_silence(name, compiled):
    tx = make(name)
    state = after(tx, 1, math.nan)
    update = compiled(tx.update)
    for form in (None, optax.EmptyState()):
        assert_close(
            update(GRADS, form, PARAMS), update(GRADS, tx.init(PARAMS), PARAMS)
        )
    for label, form in SAME.items():
        if (label, compiled) != ("proxy", jax.jit):  # To JAX it is no tree.
            assert_close(
                update(GRADS, form(state), PARAMS), update(GRADS, state, PARAMS)
            )
    for form in FOREIGN.values():
        with pytest.raises(TypeError, match="inner_state"):
            update(GRADS, form(state), PARAMS)


# --- One NaN in what Optax accumulates.

ZERO = clip_by_global_norm(math.inf, nonfinite="zero")
SGD, EVERY, EMA = optax.sgd(1.0), optax.apply_every(2), optax.ema(0.9)
SKIPPED = skip_by_global_norm(SGD)
SUMMED = optax.MultiSteps(SGD, 2)
FINITE = {"should_skip_update_fn": optax.skip_not_finite}
AFTER_ONE_NAN = {  # Whether steps are taken again.
    "skip of MultiSteps": (skip_by_global_norm(SUMMED), True),
    "MultiSteps, skip_not_finite": (optax.MultiSteps(SKIPPED, 2, **FINITE), True),
    "clip, MultiSteps": (optax.chain(ZERO, SUMMED.gradient_transformation()), True),
    "clip, apply_every": (optax.chain(ZERO, EVERY), True),
    "skip of apply_every": (skip_by_global_norm(EVERY), True),
    "clip, ema": (optax.chain(ZERO, EMA), True),
    # Should Optax mend these, the warnings on the pages and in docstrings can go.
    "MultiSteps of a skip": (optax.MultiSteps(SKIPPED, 2), False),
    "MultiSteps of a clip": (optax.MultiSteps(optax.chain(ZERO, SGD), 2), False),
    "apply_every, clip": (optax.chain(EVERY, ZERO), False),
    "ema, clip": (optax.chain(EMA, ZERO), False),
}


@pytest.mark.whole
@pytest.mark.parametrize("case", AFTER_ONE_NAN)
@pytest.mark.usefixtures("optax_promotes")
def test_steps_after_one_nan_in_what_optax_accumulates(case):
    tx, steps_again = AFTER_ONE_NAN[case]
    state, sizes = tx.init(PARAMS), []
    for scale in [1, math.nan, *[1] * 8]:
        grads = jax.tree.map(lambda g, s=scale: g * np.float32(s), GRADS)
        updates, state = tx.update(grads, state, PARAMS)
        sizes.append(oracle.norm(updates))
    assert (max(sizes[-2:]) > 0) == steps_again


# --- Programs, and with them build times, grow with the leaves and no faster.

BUILT = {
    "leaves": leaf_norms,
    "clip": lambda tree, ord: clip_updates(tree, 1.0, ord=ord),
    "skip": lambda tree, ord: skip_by_global_norm(
        clip_by_global_norm(1.0, ord=ord), ord=ord
    ).update(tree, None),
    "slope": lambda tree, ord: jax.grad(functools.partial(global_norm, ord=ord))(tree),
}


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, math.inf])
def test_programs_grow_linearly_in_the_leaves(built, ord):
    def sizes(leaves):
        tree = [jnp.ones((3, 5 + i % 7)) for i in range(leaves)]
        traced = jax.jit(functools.partial(BUILT[built], ord=ord)).trace(tree)
        text = traced.lower().compile().as_text()
        equations = oracle.equations(traced.jaxpr.jaxpr)
        return np.array([len(list(equations)), text.count("\n")])

    few, some, many = map(sizes, (16, 32, 64))
    assert (many - some <= 2.5 * np.maximum(some - few, 16)).all(), (few, some, many)


# --- Stages on several meshes; code that assumes a clip without state.


def test_one_norm_over_stages_on_several_meshes():
    """The norm of the stages' norms; each stage is clipped by it as ``use_norm``."""
    devices, stages = jax.devices(), []
    for i, own in enumerate((devices[:4], devices[4:6], devices[6:7])):
        mesh = jax.make_mesh((len(own),), ("x",), (AxisType.Explicit,), devices=own)
        leaf = np.arange(1.0 + i, 9 + i, dtype=np.float32)
        stages.append([jax.device_put(leaf, NamedSharding(mesh, P("x")))])
    norm = float(global_norm([float(global_norm(stage)) for stage in stages]))
    np.testing.assert_allclose(norm, oracle.norm(stages), 1e-6)
    found = [clip_updates(stage, 2.0, use_norm=norm)[0] for stage in stages]
    oracle.assert_clipped(found, stages, 2.0)


def test_a_stateless_clip_for_code_that_reads_no_states():
    clip = optax.stateless(lambda updates, params: clip_updates(updates, 1.0)[0])
    state = clip.init(PARAMS)
    assert state == optax.EmptyState()
    updates, _ = clip.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-6)


# --- Leaves that lose what they say, and numbers of NumPy.

AT = r"\['w'\]\[1\]"
REFUSED = {
    "masked": (lambda: np.ma.array([3.0, 4.0], np.float32, mask=[0, 1]), AT),
    "no mask": (lambda: np.ma.array([3.0, 4.0], np.float32), AT),
    "masked scalar": (lambda: np.ma.array(3.0, mask=True), AT),
    "the constant": (lambda: np.ma.masked, AT),
    "masked complex": (lambda: np.ma.array([3j, 4.0], mask=[1, 0]), AT),
    **{
        dtype: (lambda d=dtype: np.ones((9, 9), d), AT)
        for dtype in (">f2", ">f4", ">f8", ">c8")
    },
    "big-endian scalar": (lambda: np.ones((), ">f4"), AT),
    "values": (lambda: GRADS.values(), r"list\("),
    "iterator": (lambda: iter(GRADS.values()), r"list\("),
    "generator": (lambda: (leaf for leaf in GRADS.values()), r"list\("),
    "map": (lambda: map(jnp.negative, GRADS.values()), r"list\("),
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
@pytest.mark.filterwarnings("ignore:Python iterable type:DeprecationWarning")
@pytest.mark.parametrize("leaf", REFUSED)
def test_leaves_are_refused_by_path_and_with_the_remedy(leaf, take):
    make_leaf, pattern = REFUSED[leaf]
    tree = {"w": [jnp.ones(2), make_leaf()], "b": np.ones(1, np.float32)}
    with pytest.raises(TypeError, match=pattern) as error:
        TAKEN[take](tree)
    assert len(str(error.value)) < 400


@each_taken
def test_memory_mapped_arrays_are_taken(take):
    """As ``numpy.load`` returns them with ``mmap_mode``."""
    plain = np.float32([[3.0, 4.0]])
    assert_close(TAKEN[take]([plain.view(np.memmap)]), TAKEN[take]([plain]))


INTEGERS = (int, np.int64, np.int32, np.int8, np.uint64)
FLOATS = (float, np.float32, np.float64, np.float16)


def memory(n):
    return Threshold(lambda: n(1), lambda norm, state, count: (2.0, state))


def passed(n):
    return Threshold(lambda: jnp.float32(0), lambda norm, last, count: (n(2), norm))


BOTH = INTEGERS + FLOATS
NUMBERS = {
    "max_norm": (lambda n: n(2), BOTH),
    "schedule": (lambda n: lambda count: n(2), BOTH),
    "threshold": (passed, BOTH),
    "memory": (memory, BOTH),
    "z": (lambda n: zscore_threshold(n(2)), BOTH),
    "decay": (lambda n: zscore_threshold(decay=n(0.5)), FLOATS),
    "warmup_steps": (lambda n: zscore_threshold(warmup_steps=n(2)), INTEGERS),
    "q": (lambda n: quantile_threshold(n(1), window=2), BOTH),
    "window": (lambda n: quantile_threshold(0.5, window=n(3)), INTEGERS),
}


@pytest.mark.parametrize("double", [False, True], ids=["", "x64"])
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_numpy_count_as_those_of_python(number, double):
    make_one, types = NUMBERS[number]
    expected = after(clip_by_global_norm(make_one(types[0])), 1, 2, 3)
    for type_ in types:
        with jax.enable_x64(double):
            state = after(clip_by_global_norm(make_one(type_)), 1, 2, 3)
        if number == "memory":  # In the dtype that its own type has.
            state = state._replace(threshold_state=jnp.int32(state.threshold_state))
        assert_close(state, expected)
        dtypes = [jax.tree.map(lambda x: x.dtype, each) for each in (state, expected)]
        assert dtypes[0] == dtypes[1]
