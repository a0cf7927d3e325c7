"""What importing the package imports, beside what Optax does."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OWN = [
    "optax_globalclip",
    "optax_globalclip._checks",
    "optax_globalclip._clip",
    "optax_globalclip._cpu",
    "optax_globalclip._errors",
    "optax_globalclip._mesh",
    "optax_globalclip._metrics",
    "optax_globalclip._norm",
    "optax_globalclip._range",
    "optax_globalclip._threshold",
    "optax_globalclip._transform",
    "optax_globalclip._tree",
]
BEFORE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import optax
before = set(sys.modules)
"""


def printed(program):
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_nothing_but_its_own_modules():
    """Everything of JAX that it needs, Optax has imported."""
    program = BEFORE + "import optax_globalclip\n"
    program += "print(*sorted(set(sys.modules) - before), sep='\\n')"
    assert printed(program) == OWN


STEP = """
import jax.numpy as jnp
import optax_globalclip as og
def loaded(): return [name in set(sys.modules) - before for name in NAMES]
NAMES = ["jax.experimental.sparse", "jax.experimental.checkify"]
tx = og.skip_by_global_norm(og.clip_by_global_norm(og.zscore_threshold()), 9.0)
grads = {"w": jnp.array([3.0, 4.0]), "b": 0.0, "none": None}
updates, state = tx.update(grads, tx.init(grads))
og.clip_updates(grads, 1.0, ord=3)
og.leaf_norms(grads)
og.metrics(state)
print(*loaded())
"""


def test_steps_need_no_more():
    assert printed(BEFORE + STEP) == ["False False"]


@pytest.mark.slow
def test_sparse_leaves_and_checks_import_what_they_need():
    """Also if jax.experimental.sparse is imported after the package has run."""
    program = """
from jax.experimental import sparse
indices = jnp.array([[0], [1], [1]])
matrix = sparse.BCOO((jnp.array([3.0, 1.0, 3.0]), indices), shape=(2,))
clipped, norm = og.clip_updates([matrix], 2.5)
print(norm, clipped[0].todense())
try:
    og.global_norm([sparse.COO.fromdense(jnp.eye(2))])
except TypeError as error:
    print(error)
print(*loaded())
from jax.experimental import checkify
error, _ = checkify.checkify(lambda x: og.clip_updates(x, 1.0, nonfinite="error"))(
    jnp.array([jnp.nan])
)
print(error.get() is None)
"""
    found = printed(BEFORE + STEP + program)
    assert found[1] == "5.0 [1.5 2. ]"
    assert found[2].startswith("updates[0] is a COO, but sparse leaves are BCOO")
    assert found[3:] == ["True False", "False"]
