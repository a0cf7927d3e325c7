"""Wrong calls: an error of the package's own says what is wrong, and what to pass.

``test_transform.py`` has the numbers: every kind, at every place.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse
from scipy.sparse import csr_array

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
SGD = optax.sgd(1.0)


def update(tx, updates=GRADS, state=STATE):
    return tx.update(updates, state)


def own(init, new):
    """An update with a threshold of one's own, whose update returns ``new``."""
    tx = clip(Threshold(lambda: init, lambda norm, state, count: new))
    return update(tx, state=tx.init(None))


def kept(threshold, other):
    """An update with the state that another threshold kept."""
    return update(clip(threshold), state=clip(other).init(None))


class Foreign:
    """An array of another framework, as JAX sees one: it knows its dtype only."""

    shape, dtype = (2,), "torch.float32"


NUMBER, THREE = jnp.float32(0), jnp.int32(3)


def window(array):
    return {"mean": NUMBER, "window": array}


WINDOW = window(jnp.zeros(3))

T, V = TypeError, ValueError
# The call, the error, and what its message has in it, in whatever case.
ROWS = [
    # What a schedule returns.
    (lambda: update(clip(lambda count: None)), T, "max_norm None pass math.inf"),
    (lambda: update(clip(zscore_threshold)), T, "max_norm Threshold pass"),
    # The policy.
    (lambda: clip(1.0, nonfinite="skip"), V, "nonfinite 'skip' nan zero error"),
    (lambda: clip(1.0, nonfinite=None), V, "nonfinite None zero"),
    (lambda: clip(1.0, nonfinite=True), V, "nonfinite True zero"),
    (lambda: clip(1.0, nonfinite=np.array(["nan"])), V, "nonfinite zero"),
    (lambda: clip(None, nonfinite="zero"), V, "max_norm nonfinite math.inf"),
    (lambda: clip_updates(GRADS, None, nonfinite="error"), V, "math.inf"),
    # The order, which decides what is compiled.
    (lambda: clip(1.0, ord=jnp.float32(2)), T, "ord array static_args"),
    (lambda: skip(SGD, ord=jnp.int32(1)), T, "ord array static_args"),
    (lambda: clip_updates(GRADS, 1.0, ord=jnp.ones(2)), T, "ord static_args"),
    (lambda: leaf_norms(GRADS, ord=jnp.float32(2)), T, "ord static_args"),
    (lambda: jax.jit(lambda p: global_norm(GRADS, ord=p))(2), T, "ord static_args"),
    # Mesh axes.
    (lambda: update(clip(1.0, axis_name=3)), V, "axis_name 3 tuple"),
    (
        lambda: global_norm(GRADS, axis_name={"w": "x", "b": 3}),
        V,
        "axis_name 'b' 3 tuple",
    ),
    (lambda: global_norm(GRADS, axis_name={"w": "x"}), V, "axis_name prefix"),
    (lambda: global_norm(GRADS, axis_name=["x", "y"]), V, "axis_name"),
    (
        lambda: global_norm({"w": GRADS["w"]}, axis_name={"w": (), "typo": "x"}),
        V,
        "axis_name 'typo'",
    ),
    (
        lambda: update(clip(1.0, axis_name="data")),
        NameError,
        "axis_name 'data' shard_map",
    ),
    (
        lambda: jax.jit(lambda x: leaf_norms(x, axis_name="i"))(GRADS),
        NameError,
        "axis_name 'i' shard_map",
    ),
    # Leaves.
    (lambda: global_norm({"w": [jnp.arange(3)]}), T, "['w'][0] int32 masked"),
    (lambda: leaf_norms({"w": 3}), T, "updates['w'] int masked"),
    (lambda: clip_updates(True, 1.0), T, "updates True bool masked"),
    (lambda: update(clip(1.0), {"w": "abc"}), T, "updates['w'] 'abc' str"),
    (lambda: update(skip(SGD), {"w": np.ones(2, bool)}, None), T, "['w'] bool"),
    (lambda: global_norm({"k": jax.random.key(0)}), T, "['k'] key masked"),
    (lambda: global_norm(np.array([1.0, None])), T, "updates object masked"),
    (lambda: global_norm([np.zeros(1, [("a", "f4")])]), T, "updates[0] masked"),
    (lambda: global_norm([np.float32]), T, "updates[0] type masked"),
    (lambda: global_norm({"w": Foreign()}), T, "['w'] torch.float32"),
    (lambda: global_norm({"w": csr_array(np.eye(2))}), T, "['w'] csr_array float64"),
    (lambda: global_norm({"w": jax.new_ref(np.ones(2))}), T, "['w'] Ref pass"),
    (
        lambda: global_norm({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}),
        T,
        "updates['w'] float32 eval_shape",
    ),
    (lambda: global_norm([np.ones(2, np.longdouble)]), T, "updates[0] .astype"),
    (lambda: global_norm([sparse.CSR.fromdense(jnp.eye(2))]), T, "updates[0] CSR BCOO"),
    (
        lambda: global_norm([sparse.BCOO.fromdense(jnp.eye(2, dtype=jnp.int32))]),
        T,
        "updates[0] int32 masked",
    ),
    # States.
    (
        lambda: update(clip(1.0), state=STATE._replace(num_updates=None)),
        V,
        "state None init",
    ),
    (
        lambda: update(clip(1.0), state=STATE._replace(clip_scale="1")),
        T,
        "clip_scale str init",
    ),
    (
        lambda: update(clip(1.0), state=jax.vmap(lambda _: STATE)(jnp.ones(3))),
        V,
        "state.global_norm [3] init",
    ),
    (
        lambda: kept(zscore_threshold(), quantile_threshold(0.5)),
        V,
        "threshold_state QuantileState ZScoreState init",
    ),
    (
        lambda: kept(quantile_threshold(0.5), zscore_threshold()),
        V,
        "threshold_state ZScoreState QuantileState init",
    ),
    (
        lambda: kept(
            quantile_threshold(0, window=10), quantile_threshold(0, window=20)
        ),
        V,
        "recent_norms [20] [10] init",
    ),
    # Thresholds of one's own.
    (lambda: own(NUMBER, (None, NUMBER)), T, "Threshold.update None pass"),
    (lambda: own(THREE, (1.0, jnp.asarray(1.0))), T, "Threshold.update float32 int32"),
    (lambda: own(True, (1.0, 2.5)), T, "Threshold.update 2.5 float bool"),
    (
        lambda: own({"mean": NUMBER}, (1.0, {"mean": "a"})),
        T,
        "Threshold.update ['mean'] str return",
    ),
    # The arguments of the adaptive thresholds.
    (lambda: zscore_threshold("a"), T, "z 'a' str pass"),
    (lambda: zscore_threshold(-1.0), V, "z= -1.0 pass"),
    (lambda: zscore_threshold(math.inf), V, "z= inf pass"),
    (lambda: zscore_threshold(decay=1.1), V, "decay= 1.1 pass"),
    (lambda: zscore_threshold(decay=math.nan), V, "decay= nan pass"),
    (lambda: zscore_threshold(warmup_steps=-1), V, "warmup_steps= -1 pass"),
    (lambda: zscore_threshold(warmup_steps=2.5), V, "warmup_steps= 2.5 pass"),
    (lambda: zscore_threshold(warmup_steps=2**31), V, "warmup_steps= pass"),
    (lambda: quantile_threshold(None), T, "q None pass"),
    (lambda: quantile_threshold(90), V, "q= 90 pass"),
    (lambda: quantile_threshold(0, window=0), V, "window= 0 pass"),
    (lambda: quantile_threshold(0, warmup_steps=None), T, "warmup_steps None"),
    # What is static there.
    (lambda: quantile_threshold(jnp.float32(1)), T, "q array static_args"),
    (lambda: quantile_threshold(0, window=THREE), T, "window static_args"),
    (lambda: zscore_threshold(warmup_steps=THREE), T, "warmup_steps static_args"),
    (
        lambda: jax.jit(lambda n: quantile_threshold(0, window=n).init())(3),
        T,
        "window static_args",
    ),
    (
        lambda: skip(SGD, max_consecutive_skips=THREE),
        T,
        "max_consecutive_skips static_args",
    ),
    # The inner transformation of a skip, and what it returns.
    (lambda: skip(1.0), T, "inner 1.0 optimizer first"),
    (lambda: skip(None), T, "inner None optimizer first"),
    (lambda: skip(SGD, max_consecutive_skips=-1), V, "max_consecutive_skips=-1 pass"),
    (lambda: skip(SGD, max_consecutive_skips=1.5), V, "max_consecutive_skips=1.5 pass"),
    # Metrics.
    (lambda: metrics(clip(1.0)), V, "opt_state pass state"),
    (lambda: metrics(STATE._replace(num_updates=None)), T, "num_updates None"),
]


@pytest.mark.whole
@pytest.mark.parametrize(("call", "error", "words"), ROWS, ids=[row[2] for row in ROWS])
def test_wrong_call_is_refused(call, error, words):
    """By the package itself: no traceback ends inside JAX."""
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    message = str(raised.value).lower()
    assert not [word for word in words.lower().split() if word not in message], message
    assert "optax_globalclip" in str(raised.traceback[-1].path)


# Of a threshold, and of the inner of a skip: a leaf by its path, and the two types.
CHANGED = {
    "shorter": (ValueError, window(jnp.zeros(2)), "['window'] float32[2] [3]"),
    "broadcast": (ValueError, window(jnp.zeros(())), "['window'] float32[3]"),
    "by a row": (ValueError, window(jnp.zeros((1, 3))), "['window'] float32[3]"),
    "None": (ValueError, None, "state"),
    "a tuple": (ValueError, (NUMBER, jnp.zeros(3)), "state"),
    "a leaf less": (ValueError, {"mean": NUMBER}, "state window"),
    "a leaf more": (ValueError, WINDOW | {"count": NUMBER}, "state count"),
    "another name": (ValueError, {"mean": NUMBER, "ring": jnp.zeros(3)}, "state ring"),
    "a leaf of None": (ValueError, window(None), "state window"),
}
RETYPED = {
    dtype: (TypeError, window(jnp.zeros(3, dtype)), "['window'] float32")
    for dtype in ("bfloat16", "int32", "bool", "complex64")
}


@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("case", CHANGED | RETYPED)
def test_state_that_changes_is_refused(case, compile):
    error, new, words = (CHANGED | RETYPED)[case]
    threshold = Threshold(lambda: WINDOW, lambda norm, state, count: (1.0, new))
    inner = optax.GradientTransformation(lambda _: WINDOW, lambda g, *_: (g, new))
    for tx in (clip(threshold), skip(SGD, threshold), skip(inner)):
        if tx.init(GRADS).threshold_state is None and case in RETYPED:
            continue  # the inner's is cast: Optax has transformations that do this
        with pytest.raises(error) as raised:
            compile(tx.update)(GRADS, tx.init(GRADS))
        assert not [word for word in words.split() if word not in str(raised.value)]


def test_threshold_state_that_appears_is_refused():
    with pytest.raises(ValueError, match="(?i)state"):
        own((), (1.0, NUMBER))


def test_max_norm_is_required():
    for call in (clip, lambda: clip_updates(GRADS)):
        with pytest.raises(TypeError, match="max_norm"):
            call()  # pyright: ignore


def test_error_of_a_users_function_is_left_as_it_is():
    def raises(*_):
        raise LookupError("the user's own")

    inner = optax.GradientTransformation(lambda params: (), raises)
    for tx in (skip(inner, 1.0), clip(raises), clip(Threshold(lambda: (), raises))):
        with pytest.raises(LookupError, match="^the user's own$") as raised:
            tx.update(GRADS, tx.init(GRADS))
        assert raised.value.__cause__ is None
