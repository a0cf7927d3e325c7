"""The rows of docs/coming-from.md: each pair of expressions run, and compared.

The peers that are not installed (extra ``peers``; PyTorch by itself) are left out.
"""

import importlib.util
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify, sparse

import optax_globalclip
from optax_globalclip import clip_updates, global_norm

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "coming-from.md"
ROWS = re.findall(r"^\| `(.*?)` \| `(.*?)` \|", PAGE.read_text(), re.MULTILINE)

if not any(map(importlib.util.find_spec, ("tensorflow", "torch"))):
    pytest.skip("no peer: pip install -e '.[peers]'", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("optax_promotes")

ARRAYS = [np.float32([3, 0, -1]), np.float32([[4.0], [0.5]])]
NORM = oracle.norm(ARRAYS)


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow", reason="pip install '.[peers]'")


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="pip install torch")


def ours():
    """What the right-hand sides are written in."""
    grads = jax.tree.map(jnp.asarray, ARRAYS)
    names = {"grads": grads, "t_list": grads, "norm": jnp.float32(NORM)}
    return vars(optax_globalclip) | {"checkify": checkify, "optax": optax} | names


def rows_of(peer):
    rows = [row for row in ROWS if row[0].startswith(peer)]
    assert rows
    return pytest.mark.parametrize(("theirs", "here"), rows)


def assert_close(found, expected, tolerance=1e-6):
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(f), np.asarray(e), tolerance)


def clipped_by(tx):
    """The first update, of a transformation that descends or one that does not."""
    updates, _ = tx.update(ours()["grads"], tx.init(ours()["grads"]))
    return updates


@rows_of("optax")
def test_optax(theirs, here):
    found, expected = (eval(each, ours()) for each in (here, theirs))
    if isinstance(found, optax.GradientTransformation):
        found, expected = clipped_by(found), clipped_by(expected)
    assert_close(found, expected)


@rows_of("torch")
def test_torch(torch, theirs, here):
    params = [torch.nn.Parameter(torch.zeros(array.shape)) for array in ARRAYS]
    for param, array in zip(params, ARRAYS, strict=True):
        param.grad = torch.tensor(array)
    names = {"torch": torch, "params": params, "grads": [p.grad for p in params]}
    norm = eval(theirs, names | {"norm": torch.tensor(NORM, dtype=torch.float32)})
    found = eval(here, ours())
    if "checkify" in here:
        error, found = found
        error.throw()
    clipped, found_norm = found if isinstance(found, tuple) else (None, found)
    if norm is not None:
        assert_close(found_norm, norm.numpy())
    if clipped is not None:
        # PyTorch divides by the norm and 1e-6.
        assert_close(clipped, [param.grad.numpy() for param in params], 1e-6)
        shorter = oracle.norm([param.grad.numpy() for param in params])
        assert shorter <= oracle.norm(clipped)


def test_checked_clip_raises_where_torch_does(request):
    ((_, here),) = [row for row in ROWS if "error_if_nonfinite=True" in row[0]]
    names = ours()
    names["grads"][0] = names["grads"][0].at[1].set(jnp.nan)
    error, _ = eval(here, names)
    with pytest.raises(checkify.JaxRuntimeError, match="an entry is inf or NaN"):
        error.throw()
    torch = request.getfixturevalue("torch")
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, np.nan])
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)


@rows_of("tf")
def test_tensorflow(tf, theirs, here):
    t_list = [tf.constant(array) for array in ARRAYS]
    names = {"tf": tf, "t_list": t_list, "norm": tf.constant(NORM, tf.float32)}
    clipped, norm = eval(theirs, names)
    assert_close(eval(here, ours()), ([t.numpy() for t in clipped], norm.numpy()))


@rows_of("keras")
def test_keras(theirs, here):
    keras = pytest.importorskip("keras", reason="pip install '.[peers]'")
    tx = eval(here, ours())
    variables = [keras.Variable(np.zeros_like(array)) for array in ARRAYS]
    optimizer = eval(theirs, {"keras": keras})
    optimizer.apply([keras.ops.convert_to_tensor(a) for a in ARRAYS], variables)
    assert_close(clipped_by(tx), [np.asarray(v) for v in variables])


# --- tf.clip_by_global_norm: its examples, and where we differ on purpose.

T_LIST = [np.array([1.0, 2.0, 3.0, 4.0]), np.array([5.0, 6.0, 7.0, 8.0])]


def test_examples_of_tensorflow():
    with jax.enable_x64(True):
        clipped, norm = clip_updates(T_LIST, 0.8, use_norm=jnp.float64(1.0))
        assert (norm, norm.dtype) == (1.0, jnp.float64)
        assert_close(clipped, [0.8 * t for t in T_LIST], 1e-12)
        clipped, norm = clip_updates(T_LIST, 0.8)
        # As printed in the example, to eight digits.
        printed = [0.0560112, 0.11202241, 0.16803361, 0.22404481]
        np.testing.assert_allclose(clipped[0], printed, 0, 5e-9)
        np.testing.assert_allclose(norm, 14.2828568570857, 0, 5e-14)


LEAF, LARGE = np.float32([3, 4]), np.full(4, 1e20, np.float32)
# What is clipped, to which threshold, what it gives there, and here.
DIFFERENCES = {
    "zero threshold and norm": (np.zeros(2, np.float32), 0.0, [math.nan] * 2, [0, 0]),
    "infinite threshold": (LEAF, math.inf, [math.nan] * 2, LEAF),
    "negative threshold": (LEAF, -1.0, LEAF, None),
    "squares that overflow": (LARGE, 1.0, [math.nan] * 4, [0.5] * 4),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_results_differ_from_tensorflow_on_purpose(case, request):
    leaf, max_norm, theirs, here = DIFFERENCES[case]
    if here is None:
        with pytest.raises(ValueError, match="max_norm=-1.0"):
            clip_updates(leaf, max_norm)
    else:
        np.testing.assert_allclose(clip_updates(leaf, max_norm)[0], here, 1e-6)
    tf = request.getfixturevalue("tf")
    version = tuple(map(int, tf.__version__.split(".")[:2]))
    if max_norm == math.inf and version > (2, 21):
        pytest.skip("TensorFlow up to 2.21")
    (clipped,), _ = tf.clip_by_global_norm([tf.constant(leaf)], max_norm)
    np.testing.assert_array_equal(clipped.numpy(), theirs)


def test_unclipped_entries_differ_from_tensorflow_on_purpose(request):
    leaf = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    thresholds = np.linspace(40, 1000, 500)
    clip = jax.jit(lambda max_norm: clip_updates(leaf, max_norm)[0])
    assert all((clip(c) == leaf).all() for c in thresholds)
    tf = request.getfixturevalue("tf")
    theirs = (tf.clip_by_global_norm([leaf], float(c))[0][0] for c in thresholds)
    assert 0.1 < np.mean([(t.numpy() != leaf).any() for t in theirs]) < 0.2


def test_half_precision_differs_from_tensorflow_on_purpose(request):
    leaves = oracle.normals([(1000,)] * 100, "bfloat16")
    oracle.assert_norm(global_norm(leaves), leaves, tolerance=oracle.SUMMED)
    tf = request.getfixturevalue("tf")
    tensors = [tf.cast(np.asarray(leaf, np.float32), tf.bfloat16) for leaf in leaves]
    norm = tf.linalg.global_norm(tensors)
    assert norm.dtype == tf.bfloat16
    assert abs(float(norm) / oracle.norm(leaves) - 1) > 5e-4


def test_given_norms_and_repeated_rows_differ_from_tensorflow_on_purpose(request):
    clipped, norm = clip_updates(LEAF, 1.0, use_norm=10.0)
    assert norm == 10
    np.testing.assert_allclose(clipped, [0.3, 0.4], 1e-6)
    rows = sparse.BCOO((jnp.array([[3.0], [4.0]]), jnp.array([[2], [2]])), shape=(5, 1))
    assert global_norm(rows) == 7
    tf = request.getfixturevalue("tf")
    with pytest.raises(AttributeError, match="dtype"):
        tf.clip_by_global_norm([tf.constant(LEAF)], 1.0, use_norm=10.0)
    slices = tf.IndexedSlices(tf.constant([[3.0], [4.0]]), tf.constant([2, 2]), (5, 1))
    assert tf.clip_by_global_norm([slices], 1.0)[1].numpy() == 5
