"""clip_by_global_norm: its state, and the numbers and functions that users give."""

import collections
import gc
import math
import weakref
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify

from optax_globalclip import (
    ClipByGlobalNormState,
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
COMPILE = {"eager": lambda function: function, "jit": jax.jit}


def updated(tx, state=None, scale=1.0):
    """The updates and the state after ``VALUES``, from the state or the first one."""
    updates = [VALUES * np.float32(scale)]
    updates, state = tx.update(updates, tx.init(updates) if state is None else state)
    return updates[0], state


# --- The state.


def test_state_before_the_first_update():
    state = clip_by_global_norm(1.0).init([VALUES])
    assert state == ClipByGlobalNormState(0, 1, jnp.inf, 0, 0, 0, None)  # pyright: ignore
    dtypes = [leaf.dtype.name for leaf in jax.tree.leaves(state)]
    assert dtypes == ["float32"] * 3 + ["int32"] * 3
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))


def test_state_after_updates():
    tx, state = clip_by_global_norm(1.0), None
    for scale in (1, 0.05, np.inf, 2):
        updates, state = updated(tx, state, scale)
    np.testing.assert_allclose(oracle.norm(updates), 1, 1e-6)
    np.testing.assert_allclose(state[:-1], (26, 1 / 26, 1, 4, 2, 1), 1e-6)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_updates_are_counted_whatever_becomes_of_them(bad):
    for number in (None, 1.0, math.inf, jnp.float32(math.inf)):
        for policy in ("nan", "zero") if number is not None else ("nan",):
            tx = clip_by_global_norm(number, nonfinite=policy)
            updates, state = updated(tx, scale=bad)
            assert tuple(state[3:6]) == (1, 0, 1)
            assert not np.isfinite(state.global_norm)
            expected = {"nan": [math.nan] * 3, "zero": [0] * 3}[policy]
            expected = VALUES * np.float32(bad) if number is None else expected
            np.testing.assert_array_equal(updates, expected)


def test_error_policy_raises_and_names_what_to_do():
    tx = clip_by_global_norm(1.0, nonfinite="error")
    step = checkify.checkify(jax.jit(lambda scale: tx.update(VALUES * scale, None)))
    error, _ = step(jnp.float32(math.nan))
    with pytest.raises(checkify.JaxRuntimeError, match="leaf_norms tells which"):
        error.throw()
    error, (updates, _) = step(jnp.float32(1))
    error.throw()
    np.testing.assert_allclose(updates, VALUES / 13, 1e-6)


def test_counters_saturate():
    last = jnp.int32(2**31 - 1)
    quantile = quantile_threshold(0.5, window=3, warmup_steps=1)
    for threshold in (1.0, zscore_threshold(warmup_steps=1), quantile):
        tx, state = clip_by_global_norm(threshold), None
        for scale in (1, 1.1, 0.9, 1):
            _, state = updated(tx, state, scale)
        state = state._replace(num_updates=last, num_clipped=last)
        if (own := state.threshold_state) is not None:
            state = state._replace(threshold_state=own._replace(num_norms=last))
        updates, state = updated(tx, state, 100)
        assert (state.num_updates, state.num_clipped) == (last, last)
        np.testing.assert_allclose(oracle.norm(updates), state.threshold, 1e-6)


def test_state_is_float32_where_the_norm_is_float64():
    with jax.enable_x64(True):
        tree = [np.array([0.1, 0.2, 0.9])]
        updates, state = clip_by_global_norm(0.3).update(tree, None)
        np.testing.assert_allclose(updates[0], oracle.clipped(tree, 0.3)[0], 1e-15)
        assert state.global_norm.dtype == jnp.float32


def test_drop_in_for_optax():
    ours, theirs = clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)
    tree = oracle.normals([(50,), (3, 4)])
    expected, _ = theirs.update(tree, theirs.init(tree))
    found, _ = ours.update(tree, ours.init(tree))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, 1e-6), found, expected)


@pytest.mark.parametrize("given", [{}, {"use_norm": 3.0}])
def test_one_program_outside_jit_and_none_on_later_calls(given):
    tree = oracle.normals([(11,), (3, 5), (2,)])
    tx = clip_by_global_norm(1.0)
    state = tx.init(tree)
    with oracle.compilations() as first:
        updates, state = tx.update(tree, state, **given)
    assert len(first) == 1
    with oracle.compilations() as later:
        tx.update(updates, state, **given)
        clip_by_global_norm(2.0).update(tree, state, **given)
    assert not later


# --- Where a number may stand: functions of updates and the number.


def clip(max_norm, **options):
    return clip_by_global_norm(max_norm, **options)


def skip(max_norm):
    return skip_by_global_norm(optax.identity(), max_norm)


def update(tx, updates, **extra):
    return tx.update(updates, tx.init(updates), **extra)[0]


def returned(number):
    return lambda count: number


def own(number):
    return Threshold(lambda: None, lambda norm, state, count: (number, state))


PLACES = {
    "max_norm of clip_updates": lambda x, n: clip_updates(x, n)[0],
    "max_norm of clip": lambda x, n: update(clip(n), x),
    "max_norm of skip": lambda x, n: update(skip(n), x),
    "schedule of clip": lambda x, n: update(clip(returned(n)), x),
    "schedule of skip": lambda x, n: update(skip(returned(n)), x),
    "threshold of clip": lambda x, n: update(clip(own(n)), x),
    "threshold of skip": lambda x, n: update(skip(own(n)), x),
    "use_norm of clip_updates": lambda x, n: clip_updates(x, 1.0, use_norm=n)[0],
    "use_norm of clip": lambda x, n: update(clip(1.0), x, use_norm=n),
    "use_norm of skip": lambda x, n: update(skip(1.0), x, use_norm=n),
    "ord of global_norm": lambda x, n: global_norm(x, ord=n),
    "ord of leaf_norms": lambda x, n: leaf_norms(x, ord=n),
    "ord of clip_updates": lambda x, n: clip_updates(x, 2.0, ord=n)[0],
    "ord of clip": lambda x, n: update(clip(2.0, ord=n), x),
}


def places(*roles):
    return [place for place in PLACES if place.split()[0] in roles]


MAX_NORMS, RETURNED = places("max_norm"), places("schedule", "threshold")
NORMS, ORDERS = places("use_norm"), places("ord")


def expected(place, value):
    """What comes out at one place, in float64."""
    norm, threshold = (value, 1.0) if place in NORMS else (NORM, value)
    if place in ORDERS:
        norm, threshold = oracle.norm(VALUES, value), 2.0
        if "norm" in place:
            return norm
    if "skip" in place:
        return VALUES * float(norm <= threshold)
    # An infinite norm is that of updates that are not finite.
    scale = 1.0 if norm <= threshold else threshold / norm
    return VALUES * scale if norm < math.inf else np.full(3, math.nan)


def crossed(*tables):
    """Each number at one place of each role, in turn; eager and compiled in turn.

    Places of one role check their numbers with the same function, so no bug hides in a
    pair of place and number. A table: its places, and the numbers.
    """
    cases = [
        (where[i % len(where)], number, list(COMPILE)[i // len(where) % 2])
        for where, numbers in tables
        for i, number in enumerate(numbers)
    ]
    ids = [f"{place}-{type(n).__name__}-{how}" for place, n, how in cases]
    return pytest.mark.parametrize(("place", "number", "compile"), cases, ids=ids)


def assert_value(place, found, number):
    (found,) = jax.tree.leaves(found)
    with np.errstate(over="ignore"):
        right = expected(place, np.longdouble(number))
    np.testing.assert_allclose(np.float64(found), right, 1e-5)


def closed_over(place, number, compile):
    return COMPILE[compile](lambda updates: PLACES[place](updates, number))


FLOATS = (np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16)
INTEGERS = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64)
NUMBERS = [3, 2.5, Fraction(5, 2), math.inf, np.float32(math.inf)]
NUMBERS += [dtype(2.5) for dtype in FLOATS] + [dtype(3) for dtype in INTEGERS]
ARRAYS = [np.array(2.5, dtype) for dtype in FLOATS]
ARRAYS += [np.array(3), np.array(3, np.uint8), jnp.int32(3), jnp.uint8(3)]
ARRAYS += [jnp.float32(2.5), jnp.bfloat16(2.5), jnp.float16(2.5), jnp.asarray(2.5)]
ARRAYS += [jnp.float32(math.inf)]
# Not as ord: no float32 norm of such an order differs from the largest entry.
LARGE = [2**70, Fraction(10**30, 7), np.int64(2**63 - 1), np.uint32(2**32 - 1)]
LARGE += [np.uint64(2**63), np.array(2**40), np.longdouble(1e30)]
# Not as use_norm: whether such a norm is finite is a question of its own.
BEYOND_FLOAT32 = [10**40, 1e300, np.float64(1e300), 10**300, 10**400]
FITS = NUMBERS + ARRAYS


@crossed(
    (MAX_NORMS, FITS + LARGE + BEYOND_FLOAT32),
    (RETURNED, FITS + LARGE + BEYOND_FLOAT32),
    (NORMS, FITS + LARGE),
    (ORDERS, NUMBERS),
)
def test_every_kind_of_number_counts_by_its_value(place, number, compile):
    run = closed_over(place, number, compile)
    assert_value(place, run([VALUES]), number)
    abstract = [jax.ShapeDtypeStruct(VALUES.shape, VALUES.dtype)]
    (leaf,) = jax.tree.leaves(jax.eval_shape(run, abstract))
    assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("place", MAX_NORMS + RETURNED + NORMS)
def test_numbers_may_be_traced_captured_and_differ_by_example(place):
    run, jitted = PLACES[place], jax.jit(PLACES[place])
    for number in (2.5, np.float32(1.5), 3, jnp.int32(2)):
        assert_value(place, jitted([VALUES], number), number)

    numbers, captured = np.float32([1.0, 2.5, 14.0]), jnp.float32(2.5)
    (found,) = jax.vmap(lambda number: run([VALUES], number))(numbers)

    def step(carry, _):
        return carry, run([VALUES * carry], captured)

    _, (rows,) = jax.lax.scan(step, jnp.float32(1), length=2)
    for row, number in zip((*found, *rows), (*numbers, 2.5, 2.5), strict=True):
        assert_value(place, row, number)


@pytest.mark.parametrize("place", MAX_NORMS + RETURNED)
def test_numbers_are_compared_in_the_accumulators_dtype(place):
    with jax.enable_x64(True):
        updates = [VALUES.astype(np.float64)]
        above = np.nextafter(NORM, 99)
        for number in (NORM, above, np.float64(NORM), np.longdouble(above)):
            (found,) = PLACES[place](updates, number)
            np.testing.assert_array_equal(found, updates[0])


@crossed((MAX_NORMS + RETURNED, [jnp.float32(-1)] * 14))
def test_negative_arrays_count_as_zero(place, number, compile):
    (found,) = closed_over(place, number, compile)([VALUES])
    np.testing.assert_array_equal(found, np.zeros(3))


@crossed(
    (MAX_NORMS + RETURNED, [jnp.float32(math.nan)] * 14),
    (NORMS, [math.nan, np.array(math.nan), np.float16(math.nan)]),
)
def test_nan_arrays_and_nan_norms_clip_to_nan_and_skip(place, number, compile):
    (found,) = closed_over(place, number, compile)([VALUES])
    np.testing.assert_array_equal(found, np.full(3, 0 if "skip" in place else math.nan))


# --- What is no such number.

NOT_NUMBERS = [True, 1j, "2", b"2", object(), [2.0], {"max_norm": 2.0}]
NOT_NUMBERS += [np.bool_(True), np.complex64(2), np.str_("2"), optax.EmptyState()]
NOT_NUMBERS += [np.array(bad) for bad in (True, 2j, "2")]
NOT_NUMBERS += [np.array(2.0, object), np.array(Fraction(5, 2), object)]
NOT_NUMBERS += [np.timedelta64(2, "s"), np.datetime64("2025-01-01")]
NOT_NUMBERS += [jnp.array(True), jnp.complex64(2), jax.random.key(0)]
NOT_SCALARS = [np.ones(1), jnp.ones(1), np.ones((2, 2)), np.ones(0)]
NEGATIVE = [-1, -math.inf, Fraction(-1, 2), -5e-324, np.array(-1.0), -(10**400)]
NEGATIVE += [np.int64(-1), np.array(-1, np.int8), *(dtype(-1) for dtype in FLOATS)]
NANS = [math.nan, *(dtype(math.nan) for dtype in FLOATS), np.array(math.nan)]
BELOW_ONE = [0, 0.5, Fraction(1, 2), np.float16(0.5)]


def refuses(place, number, errors, compile):
    """The error names the argument, and says what to pass."""
    role = place.split()[0]
    named = "(?i)schedule|threshold" if place in RETURNED else role
    with pytest.raises(errors, match=named) as error:
        closed_over(place, number, compile)([VALUES])
    remedies = ("pass", "return", "at least")
    assert any(word in str(error.value).lower() for word in remedies)


@crossed(*[(where, NOT_NUMBERS) for where in (MAX_NORMS, RETURNED, NORMS, ORDERS)])
def test_what_is_no_real_number_is_refused(place, number, compile):
    errors = (TypeError, ValueError) if place in ORDERS else TypeError
    refuses(place, number, errors, compile)


@crossed((list(PLACES), 4 * NOT_SCALARS))
def test_what_is_no_scalar_is_refused(place, number, compile):
    refuses(place, number, (TypeError, ValueError), compile)


@crossed(
    (MAX_NORMS, NEGATIVE + NANS),
    (RETURNED, NEGATIVE + NANS),
    (NORMS, NEGATIVE),
    (ORDERS, BELOW_ONE + NEGATIVE + NANS),
)
def test_numbers_out_of_range_are_refused(place, number, compile):
    refuses(place, number, ValueError, compile)


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


@pytest.mark.parametrize("place", MAX_NORMS + RETURNED + NORMS)
def test_arrays_are_never_waited_for(place, unready):
    # Two sums that differ, so that no constant is read from a cache.
    warm, number = jnp.float32(1) + 1.5, jnp.float32(1) + 1.25
    updates = [jnp.asarray(VALUES)]
    try:
        PLACES[place](updates, warm)
    finally:
        unready()
    PLACES[place](updates, number)


@pytest.mark.parametrize(
    "tx",
    [
        clip_by_global_norm(quantile_threshold(0.5, window=3)),
        clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 3), nonfinite="zero"),
        skip_by_global_norm(clip_by_global_norm(jnp.float32(1)), zscore_threshold()),
    ],
    ids=["quantile", "schedule", "skip"],
)
def test_init_update_and_metrics_wait_for_no_array(tx, unready):
    metrics(updated(tx)[1])
    unready()
    metrics(updated(tx)[1])


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
    "schedule": clip,
    "threshold": lambda schedule: clip(as_threshold(schedule)),
    "skip": skip,
    "skip by a threshold": lambda schedule: skip(as_threshold(schedule)),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
def test_second_fresh_function_compiles_nothing(form):
    _, state = updated(form(returned(1.0)))
    updated(form(optax.linear_schedule(1.0, 0.0, 5)), state)
    with oracle.compilations() as compiled:
        for value in (1.5, 2.5):
            updated(form(returned(value)), state)
        updated(form(optax.linear_schedule(2.0, 0.0, 5)), state)
    assert not compiled


@each_form
def test_function_is_called_once_an_update_followed_and_not_kept(form):
    schedule = Schedule(jnp.float32(26.0))
    tx, state = form(schedule), None
    for value in (6.5, np.float32(1.25), jnp.float32(3.0)):
        schedule.value = value
        _, state = updated(tx, state)
        assert state.threshold == value
    assert not any(isinstance(count, jax.core.Tracer) for count in schedule.counts)
    assert [int(count) for count in schedule.counts] == [0, 1, 2]
    kept = weakref.ref(schedule)
    del schedule, tx
    gc.collect()
    assert kept() is None


@each_form
def test_tracers_in_a_function_do_not_leak(form):
    @jax.jit
    def run(threshold):
        return updated(form(returned(threshold)))[1].threshold

    with jax.checking_leaks():
        assert run(2.0) == 2
    assert run(3.0) == 3


def test_change_of_a_schedule_inside_jit_does_not_leak():
    schedule = Schedule(1.0)
    tx = clip(schedule)

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
        return updated(clip(returned(threshold)))[0].sum()

    right = VALUES.sum() / NORM
    for grad in (jax.grad(total), jax.jit(jax.grad(total))):
        np.testing.assert_allclose(grad(2.0), right, 1e-6)
    thresholds = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.vmap(total)(thresholds), right * thresholds, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("calls", [300, 10_000])
def test_calls_with_fresh_objects_keep_nothing(calls):
    bases = collections.deque(maxlen=50)

    def call(i):
        base = Schedule(1.0 + i / 7)
        bases.append(weakref.ref(base))
        number, scale = base.value, 1.0 + i
        tx = [
            *(form(base) for form in FORMS.values()),
            clip(number),
            clip(zscore_threshold(number, decay=1 / (2 + i))),
            clip(quantile_threshold(1 / (1 + i), window=7)),
        ][i % 7]
        updated(tx, updated(tx, scale=scale)[1], scale)
        (found,), _ = clip_updates([jnp.asarray(VALUES)], number, use_norm=1 + scale)
        right = np.float64(VALUES) * min(1, number / (1 + scale))
        np.testing.assert_allclose(found, right, 1e-5)

    def objects():
        gc.collect()
        return len(gc.get_objects())

    for i in range(70):
        call(i)
    before, arrays = objects(), len(jax.live_arrays())
    with oracle.compilations() as compiled:
        for i in range(calls):
            call(i)
    assert not compiled
    assert objects() - before < calls / 10
    assert len(jax.live_arrays()) <= arrays
    assert not [base for base in bases if base() is not None]


# --- The state of a threshold of one's own.


def keeps(first, new):
    return Threshold(lambda: first, lambda norm, state, count: (1.0, new(norm, state)))


ZERO = jnp.float32(0)


@pytest.mark.parametrize(
    ("first", "new", "right"),
    [
        (ZERO, lambda *_: 2, 2),
        (ZERO, lambda *_: 2.0, 2),
        (ZERO, lambda *_: np.float64(2), 2),
        (ZERO, lambda *_: jnp.asarray(2.0), 2),
        (ZERO, lambda *_: jnp.float32(1) * 2.0, 2),
        ((0.0, 0), lambda norm, state: (norm, state[1] + 1), (NORM, 1)),
    ],
    ids=["int", "float", "np.float64", "weak", "product", "Python numbers at first"],
)
def test_weakly_typed_threshold_state_is_cast(first, new, right):
    for tx in (clip(keeps(first, new)), skip(keeps(first, new))):
        state = tx.init(None)
        for update in (tx.update, jax.jit(tx.update)):
            _, later = update([VALUES], state._replace(num_updates=0.0))
            assert later.threshold_state == right
            assert jax.tree.map(jax.typeof, later) == jax.tree.map(jax.typeof, state)
            assert not any(leaf.weak_type for leaf in jax.tree.leaves(later))


def test_threshold_without_memory_has_none_as_its_state():
    empty = [(), [], {}, None, ((), {"a": []}), [(), {}], optax.EmptyState()]
    max_norms = [1.0, np.float32(1), jnp.float32(1), optax.constant_schedule(1.0), None]
    for max_norm in max_norms + [keeps(each, lambda n, s: s) for each in empty]:
        for tx in (clip(max_norm), skip(max_norm)):
            state = tx.init([VALUES])
            assert state.threshold_state is None
            _, state = tx.update([VALUES], state)
            assert state.threshold_state is None
            assert jax.eval_shape(tx.update, [VALUES], state)[1].threshold_state is None


def test_threshold_may_keep_a_random_key():
    def draw(norm, key, count):
        return 1 + jax.random.uniform(key), jax.random.split(key)[0]

    tx = clip(Threshold(lambda: jax.random.key(0), draw))
    state, key = tx.init(None), jax.random.key(0)
    for _ in range(2):
        _, state = jax.jit(tx.update)(VALUES, state)
        assert state.threshold == 1 + jax.random.uniform(key)
        key = jax.random.split(key)[0]


# --- inject_hyperparams.


def zscore(z):
    return clip(zscore_threshold(z, decay=0.9, warmup_steps=2))


SCHEDULE = {"max_norm": optax.linear_schedule(2.0, 0.0, 2)}
ONE, HALF = {"max_norm": 1.0}, {"inner": optax.scale(0.5)}


@pytest.mark.parametrize(
    ("factory", "numbers", "static", "values", "right"),
    [
        (clip_by_global_norm, ONE, {}, [1, 26, 0.25], [1, 13, 0.25]),
        (clip_by_global_norm, ONE, {"ord": 2}, [1, 9, 0.25], [1, 9, 0.25]),
        (clip_by_global_norm, SCHEDULE, {}, [None] * 3, [2, 1, 0]),
        (skip_by_global_norm, ONE, HALF, [1, 26, 0], [0, 6.5, 0]),
    ],
    ids=["clip", "static ord", "schedule", "skip"],
)
@pytest.mark.usefixtures("optax_promotes")
def test_injected_numbers_are_followed(factory, numbers, static, values, right):
    inject = optax.inject_hyperparams(factory, static_args=tuple(static))
    tx = inject(**numbers, **static)
    for update in (tx.update, jax.jit(tx.update)):
        state, found = tx.init([VALUES]), []
        for value in values:
            if value is not None:
                state.hyperparams.update(dict.fromkeys(numbers, jnp.float32(value)))
            updates, state = update([VALUES], state)
            found.append(oracle.norm(updates))
        np.testing.assert_allclose(found, right, 1e-5)


@pytest.mark.usefixtures("optax_promotes")
def test_injected_z_is_that_of_the_step():
    norms = {}
    for z in (0.5, 3.0):
        tx, plain, right_state = (
            optax.inject_hyperparams(zscore)(z=1.0),
            zscore(z),
            None,
        )
        state = tx.init([VALUES])
        for scale in (1, 1.5, 10):
            state.hyperparams["z"] = jnp.float32(z)
            updates, state = updated(tx, state, scale)
            right, right_state = updated(plain, right_state, scale)
            np.testing.assert_allclose(updates, right, 1e-5)
        norms[z] = oracle.norm(updates)
    assert norms[0.5] < norms[3.0] < 130
