"""Wrong calls: each is refused with an error that says what is wrong and what to pass.

Every row holds the whole message, so that whoever changes one reads it.
"""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
    Threshold,
    clip_by_global_norm as clip,
    clip_updates,
    global_norm,
    leaf_norms,
    metrics,
    quantile_threshold,
    skip_by_global_norm as skip,
    zscore_threshold,
)

GRADS = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0])}
STATE = clip(1.0).init(None)


# --- Objects to pass where they do not belong.


class Foreign:
    """An array of another framework, as JAX sees one: it knows its dtype only."""

    shape = (2,)

    def __init__(self, dtype):
        self.dtype = dtype


class Named:
    """An object whose representation is the same in every process."""

    def __repr__(self):
        return "an object"


def leaked(shape=()):
    """A tracer whose function has returned."""
    tracers = []
    jax.jit(lambda x: tracers.append(x) or x)(jnp.zeros(shape))
    return tracers[0]


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


def on(device, tree):
    return jax.device_put(tree, jax.devices()[device])


def on_mesh(first, axis_type=AxisType.Explicit):
    """An array on a mesh of four devices."""
    devices = jax.devices()[first : first + 4]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=devices)
    return jax.device_put(jnp.ones(4), NamedSharding(mesh, P("x")))


# --- Calls.


def update(tx, updates=GRADS, state=STATE):
    return tx.update(updates, state)


def scheduled(value):
    return update(clip(lambda count: value))


def own(init, new):
    """An update with a threshold of one's own, whose update returns ``new``."""
    threshold = Threshold(lambda: init, lambda norm, state, count: new)
    tx = clip(threshold)
    return update(tx, state=tx.init(None))


def keeping(state):
    return STATE._replace(threshold_state=state)


def around(init, new):
    """A skip around a transformation of the user's."""
    inner = optax.GradientTransformation(lambda params: init, lambda *args: new)
    tx = skip(inner, 1.0)
    return update(tx, state=tx.init(GRADS))


# --- Ends of messages that rows share.

NUMBER = "Pass a real number or a scalar array."
REAL = "an array, but not of floats or integers. Pass a real number or a scalar array"
REAL = f"{REAL} of real numbers."
NO_NORM = (
    "but a global norm takes float or complex arrays. Leave such leaves out with "
    "optax.masked or optax.partition, or put None in their place."
)
AT_LEAST_0 = (
    "a norm is at least 0. Pass a number of at least 0, or math.inf never to clip."
)
ONE = "but it is one number for the whole tree. Pass a scalar, of shape ()."
ORDER = (
    "the order of a norm is a real number of at least 1, or math.inf for the largest "
    "entry."
)
POLICY = "it is one of nan, zero, error."
NAMES = (
    "Pass a name, a tuple of names, or a tree prefix of the updates with one of them "
    "for each leaf; () says that every device holds the whole leaf."
)
UNBOUND = (
    "is not bound here, where the manual mesh axes are []. Pass one of those, in pmap "
    "or in shard_map with check_vma=False. Leave axis_name out elsewhere: under plain "
    "jit the norm is global already."
)
FOREIGN = (
    "but a global norm takes arrays of JAX or NumPy. Pass jax.dlpack.from_dlpack of it."
)
LEAKED = (
    "that has left the function it belongs to, such as one in jax.jit. Return it from "
    "that function, and pass what the function returns."
)
DELETED = (
    "but it has been deleted, as donated arrays are. Pass the arrays that the step "
    "returned, or call jax.jit without donate_argnums."
)
APART = (
    "A global norm is one computation over all of them: bring them to one mesh with "
    "jax.device_put."
)
EXTENDED = (
    "which JAX has no arrays of. Pass it .astype of numpy.float64 or numpy.complex128."
)
SPARSE = (
    "but sparse leaves are BCOO or BCSR. Pass jax.experimental.sparse.BCOO.fromdense "
    "of its todense()."
)
STATIC = (
    "is an array, but it is static: it decides about shapes and what is compiled. Pass "
    "a Python number; in optax.inject_hyperparams, name"
)
INNER = "Pass the optimizer first: skip_by_global_norm(optax.adam(1e-3), max_norm)."
SCALAR_KEPT = (
    "but a scalar array is kept there. Pass the state that init or the last update "
    "returned, or None to begin anew."
)
BATCH = (
    "but it is a scalar. Pass the state of one optimizer; for a batch of them, call "
    "update in jax.vmap or jax.pmap."
)
ANEW = "Pass the state that init returns, or one with threshold_state=None, to begin"
ANEW = f"{ANEW} anew."
WINDOW = "Pass the window that the state was made with, or a state with"
WINDOW = f"{WINDOW} threshold_state=None, to begin anew."
ARRAYS = (
    "but every leaf of both must be an array. Pass an inner whose init and update "
    "return arrays."
)
STRUCTURE = (
    "A step cannot be skipped if the inner state changes: pass the state that "
    "inner.init returns, and an inner that keeps its structure and its shapes."
)
KEPT = "Return the structure and the shapes that init returns."

ROWS = [
    # The threshold.
    (lambda: clip("1.0"), TypeError, f"max_norm='1.0' is a str. {NUMBER}"),
    (lambda: clip([1.0]), TypeError, f"max_norm=[1.0] is a list. {NUMBER}"),
    (lambda: clip({"w": 1.0}), TypeError, f"max_norm={{'w': 1.0}} is a dict. {NUMBER}"),
    (lambda: clip(True), TypeError, f"max_norm=True is a bool. {NUMBER}"),
    (lambda: clip(1j), TypeError, f"max_norm=1j is a complex. {NUMBER}"),
    (lambda: clip(Named()), TypeError, f"max_norm=an object is a Named. {NUMBER}"),
    (
        lambda: clip(optax.EmptyState()),
        TypeError,
        f"max_norm=EmptyState() is a EmptyState. {NUMBER}",
    ),
    (
        lambda: clip(np.timedelta64(1, "s")),
        TypeError,
        "max_norm=np.timedelta64(1,'s') is a timedelta64. Pass a real number.",
    ),
    (lambda: clip(jax.random.key(0)), TypeError, f"max_norm=key<fry>[]: {REAL}"),
    (lambda: clip(jnp.bool_(True)), TypeError, f"max_norm=bool[]: {REAL}"),
    (lambda: clip(np.array(1j)), TypeError, f"max_norm=complex128[]: {REAL}"),
    (lambda: clip(np.array("1")), TypeError, f"max_norm=<U1[]: {REAL}"),
    (lambda: clip(-1.0), ValueError, f"max_norm=-1.0: {AT_LEAST_0}"),
    (lambda: clip(math.nan), ValueError, f"max_norm=nan: {AT_LEAST_0}"),
    (lambda: clip(jnp.ones(1)), ValueError, f"max_norm has shape (1,), {ONE}"),
    (
        lambda: clip(10**400),
        ValueError,
        "max_norm is too large for a float. Pass math.inf never to clip.",
    ),
    (
        lambda: clip_updates(GRADS, leaked()),
        TypeError,
        f"max_norm is a tracer of float32[] {LEAKED}",
    ),
    (
        lambda: update(clip(leaked())),
        TypeError,
        f"max_norm is a tracer of float32[] {LEAKED}",
    ),
    # What a schedule returns.
    (
        lambda: scheduled(None),
        TypeError,
        "The schedule max_norm returned None as the threshold. Return a real scalar, "
        "or math.inf never to clip.",
    ),
    (lambda: scheduled("1"), TypeError, f"the threshold='1' is a str. {NUMBER}"),
    (
        lambda: scheduled((1.0, 2.0)),
        TypeError,
        f"the threshold=(1.0, 2.0) is a tuple. {NUMBER}",
    ),
    (lambda: scheduled(-1), ValueError, f"the threshold=-1.0: {AT_LEAST_0}"),
    (
        lambda: scheduled(jnp.ones(2)),
        ValueError,
        f"the threshold has shape (2,), {ONE}",
    ),
    (
        lambda: update(clip(zscore_threshold)),
        TypeError,
        "The schedule max_norm returned a Threshold, so it is a function that makes "
        "one. Pass what it returns, such as max_norm=zscore_threshold().",
    ),
    # The order of the norm, and the policy.
    (lambda: clip(1.0, ord=0), ValueError, f"ord=0: {ORDER}"),
    (lambda: clip(1.0, ord=-math.inf), ValueError, f"ord=-inf: {ORDER}"),
    (lambda: clip(1.0, ord=math.nan), ValueError, f"ord=nan: {ORDER}"),
    (lambda: clip(1.0, ord="fro"), ValueError, f"ord='fro': {ORDER}"),
    (lambda: clip(1.0, ord=None), ValueError, f"ord=None: {ORDER}"),
    (lambda: global_norm(GRADS, ord=True), ValueError, f"ord=True: {ORDER}"),
    (lambda: leaf_norms(GRADS, ord=jnp.ones(2)), ValueError, f"ord=array: {ORDER}"),
    (
        lambda: clip(1.0, nonfinite="skip"),
        ValueError,
        f"nonfinite='skip': {POLICY}",
    ),
    (lambda: clip(1.0, nonfinite=None), ValueError, f"nonfinite=None: {POLICY}"),
    (lambda: clip(1.0, nonfinite=True), ValueError, f"nonfinite=True: {POLICY}"),
    (
        lambda: clip(1.0, nonfinite=np.array(["nan", "zero"])),
        ValueError,
        f"nonfinite=array(['nan', 'zero'], dtype='<U4'): {POLICY}",
    ),
    (
        lambda: clip(1.0, nonfinite=np.array(["nan"])),
        ValueError,
        f"nonfinite=array(['nan'], dtype='<U3'): {POLICY}",
    ),
    (
        lambda: clip(None, nonfinite="zero"),
        ValueError,
        "max_norm=None passes every update through, so nonfinite='zero' would do "
        "nothing. Pass max_norm=math.inf: it never clips finite updates.",
    ),
    # The norm that is given.
    (
        lambda: clip_updates(GRADS, 1.0, use_norm="5"),
        TypeError,
        f"use_norm='5' is a str. {NUMBER}",
    ),
    (
        lambda: clip_updates(GRADS, 1.0, use_norm={"w": 5.0}),
        TypeError,
        f"use_norm={{'w': 5.0}} is a dict. {NUMBER}",
    ),
    (
        lambda: clip_updates(GRADS, 1.0, use_norm=-5.0),
        ValueError,
        f"use_norm=-5.0: {AT_LEAST_0}",
    ),
    (
        lambda: clip(1.0).update(GRADS, None, use_norm=np.ones((1, 1))),
        ValueError,
        f"use_norm has shape (1, 1), {ONE}",
    ),
    (
        lambda: clip_updates(GRADS, 1.0, use_norm=leaked()),
        TypeError,
        f"use_norm is a tracer of float32[] {LEAKED}",
    ),
    # Mesh axes.
    (
        lambda: update(clip(1.0, axis_name=3)),
        ValueError,
        f"axis_name is 3. {NAMES}",
    ),
    (
        lambda: global_norm(GRADS, axis_name={"w": "x", "b": 3}),
        ValueError,
        f"axis_name['b'] is 3. {NAMES}",
    ),
    (
        lambda: global_norm(GRADS, axis_name=["x", "y"]),
        ValueError,
        f"axis_name=['x', 'y'] has no names for updates['b']. {NAMES}",
    ),
    (
        lambda: global_norm(GRADS, axis_name={"w": "x"}),
        ValueError,
        f"axis_name={{'w': 'x'}} has no names for updates['b']. {NAMES}",
    ),
    (
        lambda: global_norm(GRADS, axis_name=(("x",), None)),
        ValueError,
        f"axis_name=(('x',), None) has no names for updates['b']. {NAMES}",
    ),
    (
        lambda: update(clip(1.0, axis_name="data")),
        NameError,
        f"axis_name='data' {UNBOUND}",
    ),
    (
        lambda: jax.jit(lambda x: leaf_norms(x, axis_name="i"))(GRADS),
        NameError,
        f"axis_name='i' {UNBOUND}",
    ),
    # Leaves.
    (
        lambda: global_norm({"w": [jnp.arange(3)]}),
        TypeError,
        f"updates['w'][0] is int32[3], {NO_NORM}",
    ),
    (
        lambda: leaf_norms({"w": 3}),
        TypeError,
        f"updates['w'] is 3, of type int, {NO_NORM}",
    ),
    (
        lambda: clip_updates(True, 1.0),
        TypeError,
        f"updates is True, of type bool, {NO_NORM}",
    ),
    (
        lambda: update(clip(1.0), {"w": "abc"}),
        TypeError,
        f"updates['w'] is 'abc', of type str, {NO_NORM}",
    ),
    (
        lambda: update(skip(optax.sgd(1.0), 1.0), {"w": np.ones(2, bool)}),
        TypeError,
        f"updates['w'] is bool[2], {NO_NORM}",
    ),
    (
        lambda: global_norm({"key": jax.random.key(0)}),
        TypeError,
        f"updates['key'] is key<fry>[], {NO_NORM}",
    ),
    (
        lambda: global_norm({"key": jax.random.PRNGKey(0)}),
        TypeError,
        f"updates['key'] is uint32[2], {NO_NORM}",
    ),
    (
        lambda: global_norm(np.array([1.0, None])),
        TypeError,
        f"updates is object[2], {NO_NORM}",
    ),
    (
        lambda: global_norm([np.zeros(1, [("a", "f4")])]),
        TypeError,
        f"updates[0] is [('a', '<f4')][1], {NO_NORM}",
    ),
    (
        lambda: global_norm([np.float32]),
        TypeError,
        f"updates[0] is <class 'numpy.float32'>, of type type, {NO_NORM}",
    ),
    (
        lambda: global_norm([Named()]),
        TypeError,
        f"updates[0] is an object, of type Named, {NO_NORM}",
    ),
    (
        lambda: global_norm({"w": Foreign("torch.float32")}),
        TypeError,
        f"updates['w'] is torch.float32[2], a test_bad_input.Foreign, {FOREIGN}",
    ),
    (
        lambda: clip_updates([Foreign(types.SimpleNamespace(name="float32"))], 1.0),
        TypeError,
        "updates[0] is namespace(name='float32')[2], a test_bad_input.Foreign, "
        f"{FOREIGN}",
    ),
    (
        lambda: global_norm({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}),
        TypeError,
        "updates['w'] is float32[2], but abstract: it has no entries. Pass it through "
        "jax.eval_shape of this function.",
    ),
    (
        lambda: global_norm([np.ones(2, np.longdouble)]),
        TypeError,
        f"updates[0] is {np.dtype(np.longdouble)}[2], {EXTENDED}",
    ),
    (
        lambda: clip_updates([np.ones(2, np.clongdouble)], 1.0),
        TypeError,
        f"updates[0] is {np.dtype(np.clongdouble)}[2], {EXTENDED}",
    ),
    (
        lambda: global_norm([sparse.COO.fromdense(jnp.eye(2))]),
        TypeError,
        f"updates[0] is a COO, {SPARSE}",
    ),
    (
        lambda: global_norm([sparse.BCOO.fromdense(jnp.eye(2, dtype=jnp.int32))]),
        TypeError,
        f"updates[0] is int32[2,2], {NO_NORM}",
    ),
    (
        lambda: global_norm({1: jnp.ones(2), "a": jnp.ones(2)}),
        ValueError,
        "updates cannot be flattened: a dictionary in it has keys that cannot be "
        "compared, such as 1 and 'a'. Pass keys of one type.",
    ),
    (
        lambda: global_norm({"w": leaked((2,))}),
        TypeError,
        f"updates['w'] is a tracer of float32[2] {LEAKED}",
    ),
    (
        lambda: update(clip(1.0), {"w": leaked((2,))}),
        TypeError,
        f"updates['w'] is a tracer of float32[2] {LEAKED}",
    ),
    (
        lambda: global_norm({"w": deleted()}),
        RuntimeError,
        f"updates['w'] is float32[3], {DELETED}",
    ),
    (
        lambda: update(skip(optax.sgd(1.0), 1.0), {"w": deleted()}, None),
        RuntimeError,
        f"updates['w'] is float32[3], {DELETED}",
    ),
    # Places that one computation cannot reach.
    (
        lambda: clip_updates({"a": on_mesh(0), "b": on_mesh(4)}, 1.0),
        ValueError,
        "updates['a'] lies on devices [0, 1, 2, 3], but updates['b'] on devices "
        f"[4, 5, 6, 7]. {APART}",
    ),
    (
        lambda: update(clip(1.0), [on_mesh(0), on_mesh(0, AxisType.Auto)]),
        ValueError,
        "updates[0] lies on a mesh (x: Explicit), but updates[1] on a mesh (x: Auto). "
        f"{APART}",
    ),
    (
        lambda: leaf_norms([on(0, jnp.ones(2)), on(1, jnp.ones(2))]),
        ValueError,
        f"updates[0] lies on devices [0], but updates[1] on devices [1]. {APART}",
    ),
    (
        lambda: clip_updates([on(0, jnp.ones(2))], on(1, jnp.float32(1))),
        ValueError,
        f"updates[0] lies on devices [0], but max_norm on devices [1]. {APART}",
    ),
    (
        lambda: update(clip(1.0), [on(0, jnp.ones(2))], on(1, STATE)),
        ValueError,
        "updates[0] lies on devices [0], but state.global_norm on devices [1]. "
        f"{APART}",
    ),
    # States.
    (
        lambda: update(clip(1.0), state=STATE._replace(num_updates=None)),
        TypeError,
        f"state.num_updates is None, of type NoneType, {SCALAR_KEPT}",
    ),
    (
        lambda: update(clip(1.0), state=STATE._replace(clip_scale="1")),
        TypeError,
        f"state.clip_scale is '1', of type str, {SCALAR_KEPT}",
    ),
    (
        lambda: update(clip(1.0), state=jax.vmap(lambda _: STATE)(jnp.ones(3))),
        ValueError,
        f"state.global_norm has shape (3,), {BATCH}",
    ),
    (
        lambda: update(
            clip(zscore_threshold()), state=clip(quantile_threshold(0.5)).init(None)
        ),
        TypeError,
        "threshold_state is a QuantileState, but this threshold keeps a ZScoreState "
        f"with the fields norm_mean, norm_std, num_norms, spike_sum. {ANEW}",
    ),
    (
        lambda: update(
            clip(quantile_threshold(0.5)), state=clip(zscore_threshold()).init(None)
        ),
        TypeError,
        "threshold_state is a ZScoreState, but this threshold keeps a QuantileState "
        f"with the fields recent_norms, num_norms. {ANEW}",
    ),
    (
        lambda: update(clip(zscore_threshold()), state=keeping((jnp.float32(0),))),
        TypeError,
        "threshold_state is a tuple, but this threshold keeps a ZScoreState with the "
        f"fields norm_mean, norm_std, num_norms, spike_sum. {ANEW}",
    ),
    (
        lambda: update(
            clip(quantile_threshold(0.5, window=10)),
            state=clip(quantile_threshold(0.5, window=20)).init(None),
        ),
        ValueError,
        f"threshold_state.recent_norms has shape (20,), but window=10. {WINDOW}",
    ),
    # Thresholds of one's own.
    (
        lambda: clip(Threshold(0.0, lambda norm, state, count: (norm, state))),
        TypeError,
        "Threshold.init=0.0 is no function. Pass Threshold(init, update), with init() "
        "and update(norm, state, count).",
    ),
    (
        lambda: own(jnp.float32(0), 1.0),
        TypeError,
        "Threshold.update returned float, but not a pair. Return (threshold, state).",
    ),
    (
        lambda: own(jnp.float32(0), None),
        TypeError,
        "Threshold.update returned NoneType, but not a pair. Return (threshold, "
        "state).",
    ),
    (
        lambda: own(jnp.float32(0), (1.0, 2.0, 3.0)),
        TypeError,
        "Threshold.update returned tuple, but not a pair. Return (threshold, state).",
    ),
    (
        lambda: own(jnp.float32(0), ("1", jnp.float32(0))),
        TypeError,
        f"the threshold='1' is a str. {NUMBER}",
    ),
    (
        lambda: own(jnp.float32(0), (None, jnp.float32(0))),
        TypeError,
        "Threshold.update returned None as the threshold. Return a real scalar, or "
        "math.inf never to clip.",
    ),
    (
        lambda: own("a", (1.0, "a")),
        TypeError,
        "Threshold.init returned state of type str. Return a tree of arrays and "
        "numbers.",
    ),
    (
        lambda: own({"mean": jnp.float32(0)}, (1.0, {"mean": "a"})),
        TypeError,
        "Threshold.update returned state['mean'] of type str. Return a tree of arrays "
        "and numbers.",
    ),
    (
        lambda: own(jnp.zeros(2), (1.0, jnp.zeros(3))),
        ValueError,
        f"Threshold.update returned state of shape (3,) for one of (2,). {KEPT}",
    ),
    (
        lambda: own(jnp.zeros(2), (1.0, (jnp.zeros(2), jnp.zeros(2)))),
        ValueError,
        "Threshold.update returned a state of the structure PyTreeDef((*, *)) for one "
        f"of PyTreeDef(*). {KEPT}",
    ),
    (
        lambda: own(jnp.int32(2), (1.0, jnp.float32(2))),
        TypeError,
        "Threshold.update returned state of float32 for one of int32. Return it "
        ".astype('int32'), or have init return float32.",
    ),
    # The arguments of the adaptive thresholds.
    (
        lambda: zscore_threshold("a"),
        ValueError,
        "z='a': pass a finite number of at least 0.",
    ),
    (
        lambda: zscore_threshold(decay=2),
        ValueError,
        "decay=2: pass a finite number from 0 to 1.",
    ),
    (
        lambda: zscore_threshold(warmup_steps=2.5),
        ValueError,
        "warmup_steps=2.5: pass an integer from 0 to 2**31 - 1.",
    ),
    (
        lambda: zscore_threshold(warmup_steps=jnp.int32(3)),
        TypeError,
        f"warmup_steps {STATIC} 'warmup_steps' in static_args.",
    ),
    (
        lambda: quantile_threshold(None),
        ValueError,
        "q=None: pass a finite number from 0 to 1.",
    ),
    (
        lambda: quantile_threshold(0.5, window=0),
        ValueError,
        "window=0: pass an integer from 1 to 2**31 - 1.",
    ),
    # The inner transformation of a skip, and what it returns.
    (lambda: skip(1.0), TypeError, f"inner=1.0 is no gradient transformation. {INNER}"),
    (
        lambda: skip(None),
        TypeError,
        f"inner=None is no gradient transformation. {INNER}",
    ),
    (
        lambda: skip([Named()]),
        TypeError,
        f"inner=[an object] is no gradient transformation. {INNER}",
    ),
    (
        lambda: skip(optax.sgd(1.0), max_consecutive_skips=-1),
        ValueError,
        "max_consecutive_skips=-1: pass an integer from 0 to 2**31 - 1, or None for "
        "no limit.",
    ),
    (
        lambda: skip(optax.sgd(1.0), max_consecutive_skips=2**31),
        ValueError,
        "max_consecutive_skips=2147483648: pass an integer from 0 to 2**31 - 1, or "
        "None for no limit.",
    ),
    (
        lambda: zscore_threshold(warmup_steps=2**31),
        ValueError,
        "warmup_steps=2147483648: pass an integer from 0 to 2**31 - 1.",
    ),
    (
        lambda: skip(optax.sgd(1.0), max_consecutive_skips=jnp.int32(2)),
        TypeError,
        f"max_consecutive_skips {STATIC} 'max_consecutive_skips' in static_args.",
    ),
    (
        lambda: around((), GRADS),
        TypeError,
        "The inner update returned dict, but not a pair. Pass an inner whose update "
        "returns (updates, state).",
    ),
    (
        lambda: around((), ({"w": "a"}, ())),
        TypeError,
        f"The inner update returned updates['w'] of type str, {ARRAYS}",
    ),
    (
        lambda: around("a", (GRADS, "a")),
        TypeError,
        f"The inner update returned inner_state of type str, {ARRAYS}",
    ),
    (
        lambda: around((), (GRADS, jnp.ones(1))),
        ValueError,
        "The inner update returned a state of the structure PyTreeDef(*) for one of "
        f"PyTreeDef(()). {STRUCTURE}",
    ),
    (
        lambda: around(jnp.ones(2), (GRADS, jnp.ones(1))),
        ValueError,
        "The inner update returned inner_state of shape (1,) for one of (2,). "
        f"{STRUCTURE}",
    ),
    # Metrics.
    (
        lambda: metrics(clip(1.0)),
        TypeError,
        "opt_state is a gradient transformation. Pass the state that its init or "
        "update returned.",
    ),
    (
        lambda: metrics(STATE._replace(num_updates=None)),
        TypeError,
        "opt_state has num_updates=None, but a scalar array is kept there. Pass the "
        "state that init or the last update returned.",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), ROWS, ids=[message[:40] for *_, message in ROWS]
)
def test_wrong_call_is_refused(call, error, message):
    """By the package itself: no traceback ends inside JAX."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert str(raised.value) == message
    assert "optax_globalclip" in str(raised.traceback[-1].path)


def test_error_from_jax_is_kept_as_the_cause():
    with pytest.raises(TypeError, match="tracer") as raised:
        global_norm(leaked())
    assert isinstance(raised.value.__cause__, jax.errors.UnexpectedTracerError)


def test_error_of_the_inner_update_is_left_as_it_is():
    def update_fn(updates, state, params=None):
        raise ValueError("the user's own")

    tx = skip(optax.GradientTransformation(lambda params: (), update_fn), 1.0)
    with pytest.raises(ValueError, match="^the user's own$") as raised:
        update(tx, state=tx.init(GRADS))
    assert raised.value.__cause__ is None


def test_threshold_may_keep_a_random_key():
    threshold = Threshold(
        lambda: jax.random.key(0),
        lambda norm, key, count: (
            1 + jax.random.uniform(key),
            jax.random.split(key)[0],
        ),
    )
    tx = clip(threshold)
    state, thresholds = tx.init(None), []
    for _ in range(2):
        _, state = jax.jit(tx.update)(GRADS, state)
        thresholds.append(float(state.threshold))
    first, second = jax.random.key(0), jax.random.split(jax.random.key(0))[0]
    expected = [1 + jax.random.uniform(first), 1 + jax.random.uniform(second)]
    np.testing.assert_array_equal(thresholds, np.float64(expected))


@pytest.mark.parametrize("array", [leaked, deleted])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda array: clip_updates(array), "missing 1 required positional argument"),
        (lambda array: global_norm(array, 2), "takes 1 positional argument but 2"),
        (lambda array: clip(1.0).update(array), "missing 1 required positional"),
        (lambda array: leaf_norms(array, order=2), "unexpected keyword argument"),
    ],
)
def test_call_that_fits_no_signature_is_told_so_whatever_it_is_given(
    call, message, array
):
    with pytest.raises(TypeError, match=message):
        call(array())
