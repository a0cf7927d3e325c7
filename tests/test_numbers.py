"""Numbers, schedules and thresholds that users give: every kind, everywhere."""

import functools
import gc
import math
import weakref
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest

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

VALUES = np.float32([3.0, 4.0, -12.0])
NORM = 13.0

# --- Where a number may stand. Each place: a function of (updates, number) to an
# array, and the float64 value of the array as a function of the number's value.


def by_clip_updates(updates, number):
    return clip_updates(updates, number)[0]


def by_clip_by_global_norm(updates, number):
    return clip_by_global_norm(number).update(updates, None)[0]


def by_skip_by_global_norm(updates, number):
    tx = skip_by_global_norm(optax.identity(), number)
    return tx.update(updates, tx.init(updates))[0]


def by_schedule(updates, number):
    return clip_by_global_norm(lambda count: number).update(updates, None)[0]


def by_threshold(updates, number):
    threshold = Threshold(lambda: None, lambda norm, state, count: (number, state))
    return clip_by_global_norm(threshold).update(updates, None)[0]


def by_schedule_of_skip(updates, number):
    return by_skip_by_global_norm(updates, lambda count: number)


def by_use_norm(updates, number):
    return clip_updates(updates, 1.0, use_norm=number)[0]


def by_use_norm_of_update(updates, number):
    return clip_by_global_norm(1.0).update(updates, None, use_norm=number)[0]


def by_use_norm_of_skip(updates, number):
    tx = skip_by_global_norm(optax.identity(), 1.0)
    return tx.update(updates, tx.init(updates), use_norm=number)[0]


def by_ord(updates, number):
    return global_norm(updates, ord=number)


def by_ord_of_leaf_norms(updates, number):
    return leaf_norms(updates, ord=number)


def by_ord_of_clip_updates(updates, number):
    return clip_updates(updates, 2.0, ord=number)[0]


def by_ord_of_update(updates, number):
    return clip_by_global_norm(2.0, ord=number).update(updates, None)[0]


def clipped_to(value, norm=NORM):
    return VALUES * (1.0 if norm <= value else value / norm)


def kept_if_within(value, norm=NORM):
    return VALUES * float(norm <= value)


def clipped_from(norm):
    """An infinite norm is that of updates that are not finite."""
    return clipped_to(1.0, norm) if norm < math.inf else np.full(3, math.nan)


THRESHOLDS = {
    by_clip_updates: clipped_to,
    by_clip_by_global_norm: clipped_to,
    by_skip_by_global_norm: kept_if_within,
}
RETURNED = {
    by_schedule: clipped_to,
    by_threshold: clipped_to,
    by_schedule_of_skip: kept_if_within,
}
NORMS = {
    by_use_norm: clipped_from,
    by_use_norm_of_update: clipped_from,
    by_use_norm_of_skip: lambda value: kept_if_within(1.0, value),
}
ORDERS = {
    by_ord: lambda value: oracle.norm(VALUES, value),
    by_ord_of_leaf_norms: lambda value: oracle.norm(VALUES, value),
    by_ord_of_clip_updates: lambda value: clipped_to(2.0, oracle.norm(VALUES, value)),
    by_ord_of_update: lambda value: clipped_to(2.0, oracle.norm(VALUES, value)),
}
PLACES = THRESHOLDS | RETURNED | NORMS | ORDERS
ARGUMENTS = (
    dict.fromkeys(THRESHOLDS, "max_norm")
    | dict.fromkeys(RETURNED, "(?i)schedule|threshold")
    | dict.fromkeys(NORMS, "use_norm")
    | dict.fromkeys(ORDERS, "ord")
)


def each(places):
    return pytest.mark.parametrize("place", places, ids=lambda place: place.__name__)


COMPILE = {"eager": lambda function: function, "jit": jax.jit}


def crossed(kinds, *roles):
    """Each kind at one place of each role, in turn, and each place with many kinds.

    Places of one role check their numbers with the same function, so no bug hides in a
    pair of place and kind. At each place, kinds are eager and compiled in turn.
    """
    cases = [
        (list(role)[i % len(role)], kind, list(COMPILE)[i // len(role) % 2])
        for role in roles
        for i, kind in enumerate(kinds)
    ]
    return pytest.mark.parametrize(
        ("place", "kind", "compile"),
        cases,
        ids=[f"{place.__name__}-{kind}-{how}" for place, kind, how in cases],
    )


NUMBERS = {
    "int": 3,
    "float": 2.5,
    "Fraction": Fraction(5, 2),
    "Decimal": Decimal("2.5"),
    "np.float16": np.float16(2.5),
    "np.float32": np.float32(2.5),
    "np.float64": np.float64(2.5),
    "np.longdouble": np.longdouble(2.5),
    "bfloat16": ml_dtypes.bfloat16(2.5),
    "np.int8": np.int8(3),
    "np.int16": np.int16(3),
    "np.int32": np.int32(3),
    "np.int64": np.int64(3),
    "np.uint8": np.uint8(3),
    "np.uint64": np.uint64(3),
    "np.array of float64": np.array(2.5),
    "np.array of float16": np.array(2.5, np.float16),
    "np.array of bfloat16": np.array(2.5, ml_dtypes.bfloat16),
    "np.array of longdouble": np.array(2.5, np.longdouble),
    "np.array of int64": np.array(3),
    "np.array of uint8": np.array(3, np.uint8),
    "inf": math.inf,
    "np.inf": np.float32(math.inf),
    "Decimal inf": Decimal("Infinity"),
}
ARRAYS = {
    "jnp.float32": jnp.float32(2.5),
    "jnp.bfloat16": jnp.bfloat16(2.5),
    "jnp.float16": jnp.float16(2.5),
    "jnp.int32": jnp.int32(3),
    "jnp.uint8": jnp.uint8(3),
    "weakly typed": jnp.asarray(2.5),
    "jnp.inf": jnp.float32(math.inf),
}
# Not as ord: no float32 norm of such an order differs from the largest entry.
LARGE = {
    "np.int64": np.int64(2**31),
    "np.int64, largest": np.int64(2**63 - 1),
    "np.uint32": np.uint32(2**32 - 1),
    "np.uint64": np.uint64(2**63),
    "np.array of int64": np.array(2**40),
    "np.longdouble": np.longdouble(1e30),
    "int": 2**70,
    "Fraction": Fraction(10**30, 7),
    "Decimal": Decimal("1e30"),
    # Above the largest float32.
    "int of 40 digits": 10**40,
    "float64": 1e300,
    "np.float64": np.float64(1e300),
    "int of 300 digits": 10**300,
}
FITS = NUMBERS | ARRAYS
ROLES = (THRESHOLDS, RETURNED, NORMS, ORDERS)


def assert_value(place, found, number):
    (found,) = jax.tree.leaves(found)
    with np.errstate(over="ignore"):
        expected = PLACES[place](float(number))
    np.testing.assert_allclose(np.float64(found), expected, 1e-5)


def at(place, number, compile):
    """The value of one place, computed eagerly or closed over by ``jit``."""
    return COMPILE[compile](lambda updates: place(updates, number))([VALUES])


@crossed(FITS, *ROLES)
def test_every_kind_of_number_counts_by_its_value(place, kind, compile):
    assert_value(place, at(place, FITS[kind], compile), FITS[kind])


@crossed(LARGE, THRESHOLDS | RETURNED, NORMS)
def test_large_numbers_count_by_their_value(place, kind, compile):
    number = LARGE[kind]
    if place in NORMS and float(number) > float(np.finfo(np.float32).max):
        pytest.skip("whether such a norm is finite is a question of its own")
    assert_value(place, at(place, number, compile), number)


@crossed(FITS, PLACES)
def test_abstract_evaluation_may_close_over_every_kind(place, kind, compile):
    abstract = [jax.ShapeDtypeStruct(VALUES.shape, VALUES.dtype)]
    run = COMPILE[compile](lambda updates: place(updates, FITS[kind]))
    (leaf,) = jax.tree.leaves(jax.eval_shape(run, abstract))
    assert leaf.dtype == jnp.float32


@each(PLACES)
def test_numbers_may_be_closed_over_by_scan(place):
    numbers = FITS["Fraction"], FITS["jnp.float32"]

    def step(carry, _):
        return carry, [place([VALUES * carry], number) for number in numbers]

    _, found = jax.lax.scan(step, jnp.float32(1), length=2)
    for rows, number in zip(jax.tree.leaves(found), numbers, strict=True):
        for row in rows:
            assert_value(place, row, number)


@each(PLACES)
def test_traced_numbers_count_by_their_value(place):
    jitted = jax.jit(place)
    for number in (2.5, np.float32(1.5), 3, jnp.int32(2)):
        assert_value(place, jitted([VALUES], number), number)


@each(THRESHOLDS | RETURNED | NORMS)
def test_numbers_may_differ_by_example_under_vmap(place):
    numbers = np.float32([1.0, 2.5, 14.0])
    found = jax.vmap(lambda number: place([VALUES], number))(numbers)
    for row, number in zip(jax.tree.leaves(found)[0], numbers, strict=True):
        assert_value(place, row, number)


@each(THRESHOLDS | RETURNED)
def test_numbers_are_compared_in_the_accumulators_dtype(place):
    with jax.enable_x64(True):
        updates = [VALUES.astype(np.float64)]
        above = np.nextafter(NORM, 99)
        for number in (NORM, above, np.float64(NORM), np.longdouble(above)):
            (found,) = place(updates, number)
            np.testing.assert_array_equal(found, updates[0])


# --- What is no number.

NOT_NUMBERS = {
    "bool": True,
    "np.bool": np.bool_(True),
    "jnp.bool": jnp.array(True),
    "np.array of bool": np.array(True),
    "complex": 1j,
    "np.complex64": np.complex64(2),
    "np.array of complex": np.array(2j),
    "jnp.complex64": jnp.complex64(2),
    "str": "2",
    "np.str": np.str_("2"),
    "bytes": b"2",
    "np.array of str": np.array("2"),
    "np.array of object": np.array(2.0, object),
    "np.array of Fraction": np.array(Fraction(5, 2), object),
    "np.timedelta64": np.timedelta64(2, "s"),
    "np.datetime64": np.datetime64("2025-01-01"),
    "object": object(),
    "list": [2.0],
    "dict": {"max_norm": 2.0},
    "key": jax.random.key(0),
}
TOO_LARGE = {
    "int": 10**400,
    "negative int": -(10**400),
    "Fraction": Fraction(10**400, 3),
}
NEGATIVE = {
    "int": -1,
    "float": -1.0,
    "-inf": -math.inf,
    "Fraction": Fraction(-1, 2),
    "Decimal": Decimal(-1),
    "np.int8": np.int8(-1),
    "np.int64": np.int64(-(2**31)),
    "np.float16": np.float16(-1),
    "np.float64": np.float64(-1),
    "np.longdouble": np.longdouble(-1),
    "bfloat16": ml_dtypes.bfloat16(-1),
    "np.array": np.array(-1.0),
    "np.array of int8": np.array(-1, np.int8),
    "just below zero": -5e-324,
}
NANS = {
    "float": math.nan,
    "Decimal": Decimal("NaN"),
    "np.float16": np.float16(math.nan),
    "bfloat16": ml_dtypes.bfloat16(math.nan),
    "np.array": np.array(math.nan),
}


def refuses(place, number, errors, compile=lambda function: function):
    """The error names the argument, and says what to pass."""
    run = compile(lambda updates: place(updates, number))
    with pytest.raises(errors, match=ARGUMENTS[place]) as error:
        run([VALUES])
    remedies = ("pass", "return", "at least")
    assert any(word in str(error.value).lower() for word in remedies)


@crossed(NOT_NUMBERS, *ROLES)
def test_what_is_no_real_number_is_refused(place, kind, compile):
    error = ValueError if place in ORDERS else TypeError
    refuses(place, NOT_NUMBERS[kind], error, COMPILE[compile])


@crossed(TOO_LARGE, *ROLES)
def test_numbers_too_large_for_a_float_are_refused(place, kind, compile):
    refuses(place, TOO_LARGE[kind], (TypeError, ValueError), COMPILE[compile])


@crossed(NEGATIVE, THRESHOLDS | RETURNED, NORMS)
def test_negative_numbers_are_refused(place, kind, compile):
    refuses(place, NEGATIVE[kind], ValueError, COMPILE[compile])


@crossed(NANS, THRESHOLDS, RETURNED, ORDERS)
def test_nan_numbers_are_refused(place, kind, compile):
    refuses(place, NANS[kind], ValueError, COMPILE[compile])


@crossed(NANS, NORMS)
def test_nan_as_use_norm_is_the_norm_of_updates_that_are_not_finite(
    place, kind, compile
):
    (found,) = at(place, NANS[kind], compile)
    expected = np.zeros(3) if place is by_use_norm_of_skip else np.full(3, np.nan)
    np.testing.assert_array_equal(found, expected)


BELOW_ONE = {
    "zero": 0,
    "float": 0.5,
    "Fraction": Fraction(1, 2),
    "Decimal": Decimal("0.5"),
    "np.float16": np.float16(0.5),
    "np.array": np.array(-1),
}


@crossed(BELOW_ONE, ORDERS)
def test_orders_below_one_are_refused(place, kind, compile):
    refuses(place, BELOW_ONE[kind], ValueError, COMPILE[compile])


NOT_SCALARS = {
    "np.array": np.ones(1),
    "jnp.array": jnp.ones(1),
    "matrix": np.ones((2, 2)),
    "empty": np.ones(0),
}


@crossed(NOT_SCALARS, *ROLES)
def test_arrays_of_more_dimensions_are_refused(place, kind, compile):
    refuses(place, NOT_SCALARS[kind], (TypeError, ValueError), COMPILE[compile])


@each(THRESHOLDS | RETURNED)
def test_negative_arrays_count_as_zero(place):
    for compile in COMPILE:
        (found,) = at(place, jnp.float32(-1), compile)
        np.testing.assert_array_equal(found, np.zeros(3))


@each(THRESHOLDS | RETURNED)
def test_nan_arrays_clip_to_nan_and_skip(place):
    skips = "skip" in place.__name__
    expected = np.zeros(3) if skips else np.full(3, math.nan)
    for compile in COMPILE:
        (found,) = at(place, jnp.float32(math.nan), compile)
        np.testing.assert_array_equal(found, expected)


# --- Nobody waits for an array.


@pytest.fixture
def unready(monkeypatch):
    """Returns a function after whose call the host cannot read an array."""

    def refuse(self):
        raise AssertionError("the host waits for an array")

    def start():
        kind = type(jnp.float32(1))
        monkeypatch.setattr(kind, "_value", property(refuse))
        monkeypatch.setattr(kind, "block_until_ready", refuse)

    yield start
    monkeypatch.undo()


def test_fixture_sees_that_the_host_waits(unready):
    array = jnp.float32(1) + 1
    unready()
    # Not np.asarray: it reads the buffer itself, which nothing in Python can notice.
    for read in (bool, float, int, math.isnan, str, jax.device_get):
        with pytest.raises(AssertionError, match="the host waits"):
            read(array)


@each(PLACES)
def test_arrays_are_never_waited_for(place, unready):
    # Two sums that differ, so that no constant is read from a cache.
    warm, number = jnp.float32(1) + 1.5, jnp.float32(1) + 1.25
    updates = [jnp.asarray(VALUES)]
    try:
        place(updates, warm)
    finally:
        unready()
    place(updates, number)


def test_init_update_and_metrics_wait_for_no_array(unready):
    for tx in (
        clip_by_global_norm(quantile_threshold(0.5, window=3)),
        clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 3), nonfinite="zero"),
        skip_by_global_norm(clip_by_global_norm(jnp.float32(1)), zscore_threshold()),
    ):
        updates = [jnp.asarray(VALUES)]
        metrics(tx.update(updates, tx.init(updates))[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(updates[0]), "_value", property(lambda self: pytest.fail("read"))
            )
            _, state = tx.update(updates, tx.init(updates))
            metrics(state)


# --- Schedules and thresholds are called where update is called.


class Schedule:
    """A schedule that can be changed, and that notes what it was called with."""

    def __init__(self, value):
        self.value = value
        self.counts = []

    def __call__(self, count):
        self.counts.append(count)
        return self.value


def as_threshold(schedule):
    """A threshold from a schedule: both are functions that users write."""
    return Threshold(
        lambda: jnp.float32(0), lambda norm, state, count: (schedule(count), norm)
    )


FORMS = {
    "schedule": lambda schedule: clip_by_global_norm(schedule),
    "threshold": lambda schedule: clip_by_global_norm(as_threshold(schedule)),
    "skip": lambda schedule: skip_by_global_norm(optax.scale(0.5), schedule),
    "skip by a threshold": lambda schedule: skip_by_global_norm(
        optax.scale(0.5), as_threshold(schedule)
    ),
}
forms = pytest.mark.parametrize("form", FORMS)


def updated(tx, state=None):
    updates, state = tx.update([VALUES], tx.init([VALUES]) if state is None else state)
    return updates[0], state


@forms
def test_second_fresh_function_compiles_nothing(form):
    state = updated(FORMS[form](lambda count: 1.0))[1]
    with oracle.compilations() as compiled:
        for value in (1.5, 2.5):
            updated(FORMS[form](lambda count, value=value: value), state)
    assert not compiled


def test_second_fresh_optax_schedule_compiles_nothing():
    state = updated(clip_by_global_norm(optax.linear_schedule(1.0, 0.0, 5)))[1]
    updated(clip_by_global_norm(optax.linear_schedule(1.0, 0.0, 5)), state)
    with oracle.compilations() as compiled:
        updated(clip_by_global_norm(optax.linear_schedule(2.0, 0.0, 5)), state)
    assert not compiled


@forms
def test_functions_are_not_kept(form):
    schedule = Schedule(1.0)
    tx = FORMS[form](schedule)
    updated(tx)
    kept = weakref.ref(schedule)
    del schedule, tx
    gc.collect()
    assert kept() is None


@forms
def test_change_of_a_schedule_is_followed(form):
    schedule = Schedule(jnp.float32(26.0))
    tx = FORMS[form](schedule)
    _, state = updated(tx)
    assert state.threshold == 26
    for value in (6.5, np.float32(1.25), jnp.float32(3.0)):
        schedule.value = value
        _, state = updated(tx, state)
        assert state.threshold == value


@forms
def test_functions_are_called_once_an_update_and_not_traced_outside_jit(form):
    schedule = Schedule(1.0)
    tx = FORMS[form](schedule)
    state = tx.init([VALUES])
    for _ in range(3):
        _, state = updated(tx, state)
    assert not any(isinstance(count, jax.core.Tracer) for count in schedule.counts)
    assert [int(count) for count in schedule.counts] == [0, 1, 2]


@forms
def test_tracers_in_a_closure_do_not_leak(form):
    @jax.jit
    def run(threshold):
        return updated(FORMS[form](lambda count: threshold))[1].threshold

    with jax.checking_leaks():
        assert run(2.0) == 2
    assert run(3.0) == 3


def test_change_of_a_schedule_inside_jit_does_not_leak():
    schedule = Schedule(1.0)
    tx = clip_by_global_norm(schedule)

    @jax.jit
    def run(threshold):
        schedule.value = threshold
        return updated(tx)[1].threshold

    assert updated(tx)[1].threshold == 1
    assert run(2.0) == 2
    schedule.value = 4.0
    assert updated(tx)[1].threshold == 4
    assert run(3.0) == 3


def test_gradient_by_what_a_schedule_closes_over():
    def total(threshold):
        return updated(clip_by_global_norm(lambda count: threshold))[0].sum()

    expected = VALUES.sum() / NORM
    np.testing.assert_allclose(jax.grad(total)(2.0), expected, 1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(2.0), expected, 1e-6)
    thresholds = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.vmap(total)(thresholds), expected * thresholds, 1e-6)


# --- What schedules and thresholds return.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compile", COMPILE)
def test_none_as_a_threshold_is_refused(form, compile):
    tx = FORMS[form](lambda count: None)
    state = tx.init([VALUES])
    run = COMPILE[compile](tx.update)
    with pytest.raises(TypeError, match="(?is)None.*return|return.*None"):
        run([VALUES], state)


def keeps(new_state, init=None):
    """A threshold whose update returns another state than the one it was given."""
    initial = {"mean": jnp.float32(0), "window": jnp.zeros(3)} if init is None else init
    return Threshold(lambda: initial, lambda norm, state, count: (1.0, new_state))


RESHAPED = {
    "shorter": {"mean": jnp.float32(0), "window": jnp.zeros(2)},
    "broadcast": {"mean": jnp.float32(0), "window": jnp.zeros(())},
    "longer by a row": {"mean": jnp.float32(0), "window": jnp.zeros((1, 3))},
    "empty": {"mean": jnp.float32(0), "window": jnp.zeros(0)},
}
RESTRUCTURED = {
    "None": None,
    "a tuple": (jnp.float32(0), jnp.zeros(3)),
    "a leaf less": {"mean": jnp.float32(0)},
    "a leaf more": {
        "mean": jnp.float32(0),
        "window": jnp.zeros(3),
        "count": jnp.int32(0),
    },
    "another name": {"mean": jnp.float32(0), "ring": jnp.zeros(3)},
    "a leaf that is None": {"mean": jnp.float32(0), "window": None},
}
RETYPED = {
    "half": {"mean": jnp.float32(0), "window": jnp.zeros(3, jnp.bfloat16)},
    "integers": {"mean": jnp.float32(0), "window": jnp.zeros(3, jnp.int32)},
    "bools": {"mean": jnp.float32(0), "window": jnp.zeros(3, bool)},
    "complex": {"mean": jnp.float32(0), "window": jnp.zeros(3, jnp.complex64)},
}
FACTORIES = {
    "clip": clip_by_global_norm,
    "skip": functools.partial(skip_by_global_norm, optax.identity()),
}
factories = pytest.mark.parametrize("factory", FACTORIES)


def refuses_state(factory, state, error, match):
    tx = FACTORIES[factory](keeps(state))
    initial = tx.init([VALUES])
    for compile in COMPILE.values():
        with pytest.raises(error, match=match):
            compile(tx.update)([VALUES], initial)


@factories
@pytest.mark.parametrize("case", RESHAPED)
def test_threshold_state_of_another_shape_is_refused(factory, case):
    refuses_state(factory, RESHAPED[case], ValueError, r"(?s)\['window'\].*\(3,\)")


@factories
@pytest.mark.parametrize("case", RESTRUCTURED)
def test_threshold_state_of_another_structure_is_refused(factory, case):
    refuses_state(factory, RESTRUCTURED[case], ValueError, "(?i)state")


@factories
@pytest.mark.parametrize("case", RETYPED)
def test_threshold_state_of_another_dtype_is_refused(factory, case):
    refuses_state(factory, RETYPED[case], TypeError, r"(?s)\['window'\].*float32")


def test_threshold_state_that_appears_is_refused():
    threshold = Threshold(lambda: (), lambda norm, state, count: (1.0, norm))
    tx = clip_by_global_norm(threshold)
    with pytest.raises(ValueError, match="(?i)state"):
        tx.update([VALUES], tx.init(None))


@factories
@pytest.mark.parametrize(
    "new",
    [2, 2.0, np.float64(2), jnp.asarray(2.0), lambda: jnp.float32(1) * 2.0],
    ids=["int", "float", "np.float64", "weak", "product"],
)
def test_weakly_typed_threshold_state_is_cast(factory, new):
    new = new() if callable(new) else new
    tx = FACTORIES[factory](keeps(new, init=jnp.float32(0)))
    for compile in COMPILE.values():
        _, state = compile(tx.update)([VALUES], tx.init(None))
        assert state.threshold_state == 2
        assert jax.typeof(state.threshold_state) == jax.typeof(jnp.float32(0))


@factories
def test_python_scalars_as_the_first_threshold_state_are_arrays(factory):
    threshold = Threshold(
        lambda: (0.0, 0), lambda norm, state, count: (1.0, (norm, state[1] + 1))
    )
    tx = FACTORIES[factory](threshold)
    first = tx.init(None)
    _, later = tx.update([VALUES], first)
    assert jax.tree.map(jax.typeof, first) == jax.tree.map(jax.typeof, later)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(first))
    assert later.threshold_state == (NORM, 1)


def test_empty_threshold_state_is_none():
    for empty in (None, (), {}, [(), {}]):
        threshold = Threshold(
            lambda empty=empty: empty, lambda norm, state, count: (1.0, state)
        )
        for factory in FACTORIES.values():
            tx = factory(threshold)
            _, state = tx.update([VALUES], tx.init(None))
            assert tx.init(None).threshold_state is None
            assert state.threshold_state is None


# --- What is required.


def test_max_norm_is_required():
    with pytest.raises(TypeError, match="max_norm"):
        clip_by_global_norm()  # pyright: ignore
    with pytest.raises(TypeError, match="max_norm"):
        clip_updates([VALUES])  # pyright: ignore


@pytest.mark.parametrize("nonfinite", ["zero", "error"])
def test_none_with_a_policy_is_refused(nonfinite):
    with pytest.raises(ValueError, match=r"math\.inf"):
        clip_by_global_norm(None, nonfinite=nonfinite)
    with pytest.raises(ValueError, match=r"math\.inf"):
        clip_updates([VALUES], None, nonfinite=nonfinite)


@pytest.mark.parametrize("nonfinite", ["zero", "nan"])
def test_infinite_threshold_keeps_the_policy(nonfinite):
    bad = [np.float32([1.0, math.nan])]
    expected = [0, 0] if nonfinite == "zero" else [math.nan] * 2
    for number in (math.inf, np.float64(math.inf), jnp.float32(math.inf)):
        updates, _ = clip_by_global_norm(number, nonfinite=nonfinite).update(bad, None)
        np.testing.assert_array_equal(updates[0], expected)


# --- inject_hyperparams.

pytest_promotes = pytest.mark.usefixtures("optax_promotes")


def norms_of_steps(tx, name, values, scales=(1, 1, 1)):
    """The norms of the updates of a few steps, with the hyperparameter changed."""
    found, state = [], tx.init([VALUES])
    for value, scale in zip(values, scales, strict=True):
        state.hyperparams[name] = jnp.float32(value)
        updates, state = jax.jit(tx.update)([VALUES * np.float32(scale)], state)
        found.append(oracle.norm(updates))
    return found


@pytest_promotes
def test_injected_max_norm_of_a_clip():
    tx = optax.inject_hyperparams(clip_by_global_norm)(max_norm=1.0)
    found = norms_of_steps(tx, "max_norm", [1.0, 26.0, 0.25])
    np.testing.assert_allclose(found, [1, 13, 0.25], 1e-5)


@pytest_promotes
def test_injected_schedule_of_a_clip():
    schedule = optax.linear_schedule(2.0, 0.0, 2)
    tx = optax.inject_hyperparams(clip_by_global_norm)(max_norm=schedule)
    state, found = tx.init([VALUES]), []
    for _ in range(3):
        updates, state = jax.jit(tx.update)([VALUES], state)
        found.append(oracle.norm(updates))
    np.testing.assert_allclose(found, [2, 1, 0], 1e-5)


@pytest_promotes
def test_injected_max_norm_of_a_skip():
    inject = optax.inject_hyperparams(skip_by_global_norm, static_args=("inner",))
    tx = inject(optax.scale(0.5), max_norm=1.0)
    found = norms_of_steps(tx, "max_norm", [1.0, 26.0, 0.25])
    np.testing.assert_allclose(found, [0, 6.5, 0], 1e-5)


@pytest_promotes
def test_injected_z_of_a_factory():
    def make(z, decay):
        return clip_by_global_norm(zscore_threshold(z, decay=decay, warmup_steps=2))

    scales, expected = (1, 1.5, 10), None
    for z in (0.5, 3.0):
        tx = optax.inject_hyperparams(make)(z=1.0, decay=0.9)
        plain, state = make(z, 0.9), None
        for scale in scales:
            expected, state = plain.update([VALUES * np.float32(scale)], state)
        found = norms_of_steps(tx, "z", [z] * 3, scales)
        np.testing.assert_allclose(found[-1], oracle.norm(expected), 1e-5)
        assert found[-1] < 130


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("window", lambda n: quantile_threshold(0.5, window=n)),
        ("warmup_steps", lambda n: quantile_threshold(0.5, warmup_steps=n)),
        ("q", lambda n: quantile_threshold(n / 5)),
        ("warmup_steps", lambda n: zscore_threshold(2.0, warmup_steps=n)),
    ],
)
def test_static_arguments_refuse_arrays_and_say_how_to_name_them(name, make):
    for number in (jnp.int32(3), jnp.float32(3)):
        with pytest.raises((TypeError, ValueError), match=f"(?s){name}.*static_args"):
            make(number)
    with pytest.raises((TypeError, ValueError), match=f"(?s){name}.*static_args"):
        jax.jit(lambda n: clip_by_global_norm(make(n)).init(None))(3)
