"""The rows of docs/coming-from.md: each pair of expressions run, and compared.

The peers that are not installed (extra ``peers``; PyTorch by itself) are left out.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import checkify

import optax_globalclip

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "coming-from.md"
SECTION = PAGE.read_text()
ROWS = re.findall(r"^\| `(.*?)` \| `(.*?)` \|", SECTION, re.MULTILINE)

pytestmark = pytest.mark.usefixtures("optax_promotes")

ARRAYS = [np.float32([3, 0, -1]), np.float32([[4.0], [0.5]])]
NORM = oracle.norm(ARRAYS)


def ours():
    """What the right-hand sides are written in."""
    grads = jax.tree.map(jnp.asarray, ARRAYS)
    return vars(optax_globalclip) | {
        "checkify": checkify,
        "optax": optax,
        "grads": grads,
        "t_list": grads,
        "norm": jnp.float32(NORM),
    }


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
    found = eval(here, ours())
    expected = eval(theirs, ours())
    if isinstance(found, optax.GradientTransformation):
        found, expected = clipped_by(found), clipped_by(expected)
    assert_close(found, expected)


@rows_of("torch")
def test_torch(theirs, here):
    torch = pytest.importorskip("torch", reason="pip install torch")
    params = [torch.nn.Parameter(torch.zeros(array.shape)) for array in ARRAYS]
    for param, array in zip(params, ARRAYS, strict=True):
        param.grad = torch.tensor(array)
    names = {
        "torch": torch,
        "params": params,
        "grads": [param.grad for param in params],
        "norm": torch.tensor(NORM, dtype=torch.float32),
    }
    norm = eval(theirs, names)
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


def test_torch_raises_where_ours_checks():
    torch = pytest.importorskip("torch", reason="pip install torch")
    assert "error_if_nonfinite=True" in SECTION
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, np.nan])
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)


def test_checked_clip_raises_where_torch_does():
    ((_, here),) = [row for row in ROWS if "error_if_nonfinite=True" in row[0]]
    names = ours()
    error, (clipped, norm) = eval(here, names)
    error.throw()
    assert_close(norm, NORM)
    assert_close(clipped, oracle.clipped(ARRAYS, 1.0))
    names["grads"][0] = names["grads"][0].at[1].set(jnp.nan)
    error, _ = eval(here, names)
    with pytest.raises(checkify.JaxRuntimeError, match="an entry is inf or NaN"):
        error.throw()


@rows_of("tf")
def test_tensorflow(theirs, here):
    tf = pytest.importorskip("tensorflow", reason="pip install '.[peers]'")
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
