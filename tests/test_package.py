"""What importing the package imports, where its version stands, what its types say."""

import json
import pathlib
import subprocess
import sys

import pytest

import optax_globalclip

ROOT = pathlib.Path(__file__).parent.parent
MODULES = {path.stem for path in (ROOT / "optax_globalclip").glob("*.py")}


def printed(program, directory=ROOT):
    """What a fresh interpreter prints, line by line."""
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{program}"
    command = [sys.executable, "-c", program]
    ran = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=True
    )
    return ran.stdout.splitlines()


# --- Imports, beside those of Optax.


def test_nothing_is_imported_but_its_own_modules():
    """Everything of JAX that it needs, Optax has imported."""
    program = "import optax\nbefore = set(sys.modules)\nimport optax_globalclip\n"
    found = printed(program + "print(*set(sys.modules) - before, sep='\\n')")
    own = MODULES - {"__init__", "__main__", "_demo"}
    assert set(found) == {"optax_globalclip"} | {f"optax_globalclip.{m}" for m in own}


STEP = """
import jax.numpy as jnp
import optax
before = set(sys.modules)  # Optax 0.2.5 imports checkify.
import optax_globalclip as og
def loaded():
    names = {"jax.experimental.sparse", "jax.experimental.checkify"}
    return sorted(names & set(sys.modules) - before) or ["none"]
tx = og.skip_by_global_norm(og.clip_by_global_norm(og.zscore_threshold()), 9.0)
grads = {"w": jnp.array([3.0, 4.0]), "b": 0.0, "none": None}
updates, state = tx.update(grads, tx.init(grads))
og.clip_updates(grads, 1.0, ord=3)
og.leaf_norms(grads)
og.metrics(state)
print(*loaded())
"""


def test_steps_import_no_more():
    assert printed(STEP) == ["none"]


@pytest.mark.slow
def test_sparse_leaves_and_checks_import_what_they_need():
    """Also if jax.experimental.sparse is imported after the package has run."""
    program = """
from jax.experimental import sparse
indices = jnp.array([[0], [1], [1]])
matrix = sparse.BCOO((jnp.array([3.0, 1.0, 3.0]), indices), shape=(2,))
clipped, norm = og.clip_updates([matrix], 2.5)
print(norm, clipped[0].todense())
print(*loaded())
from jax.experimental import checkify
error, _ = checkify.checkify(lambda x: og.clip_updates(x, 1.0, nonfinite="error"))(
    jnp.array([jnp.nan])
)
print(error.get() is None)
"""
    found = printed(STEP + program)
    assert found[1:] == ["5.0 [1.5 2. ]", "jax.experimental.sparse", "False"]


# --- The version.


def test_version_needs_no_installed_metadata(tmp_path):
    """As in a folder on PYTHONPATH, or in an archive."""
    program = (
        "import importlib.metadata\n"
        "def missing(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = importlib.metadata.distribution = missing\n"
        "import optax_globalclip\n"
        "print(optax_globalclip.__version__)\nprint(optax_globalclip.__file__)\n"
    )
    version, where = printed(program, tmp_path)
    assert (version, str(ROOT) in where) == (optax_globalclip.__version__, True)


def test_version_stands_in_one_place():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert optax_globalclip.__version__ not in pyproject
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{optax_globalclip.__version__}]" in changelog


# --- Types: a user's program passes a type checker, and its mistakes do not.

PROGRAM = """
from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import optax_globalclip as og

params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
clip = og.clip_by_global_norm(1.0, nonfinite="zero", ord=2)
clip = og.clip_by_global_norm(None)
clip = og.clip_by_global_norm(jnp.float32(1), axis_name=("x", "y"))
clip = og.clip_by_global_norm(optax.linear_schedule(1.0, 0.1, 100))
clip = og.clip_by_global_norm(lambda count: jnp.where(count < 10, 1.0, 2.0))
clip = og.clip_by_global_norm(og.zscore_threshold(2.5, warmup_steps=10))
assert_type(clip, optax.GradientTransformationExtraArgs)

tx = og.skip_by_global_norm(
    optax.chain(clip, optax.adamw(1e-3)),
    og.quantile_threshold(0.9, window=100),
    max_consecutive_skips=3,
)
state = tx.init(params)
updates, state = tx.update(params, state, params, use_norm=jnp.float32(2))
params = optax.apply_updates(params, updates)

clipped, norm = og.clip_updates(params, 1.0, use_norm=2.0)
assert_type(norm, jax.Array)
assert_type(og.global_norm(params, ord=1), jax.Array)
assert_type(og.metrics(state), dict[str, jax.Array])
for name, value in og.metrics(state).items():
    print(f"{name}: {value:.3f}")

double = og.Threshold(
    init=lambda: jnp.float32(jnp.inf),
    update=lambda norm, last, count: (2 * last, norm),
)
clip = og.clip_by_global_norm(double)
first = og.ClipByGlobalNormState(norm, norm, norm, norm, norm, norm, None)
assert_type(first.clip_scale, jax.Array)

# rejected: what follows is wrong, line by line
og.clip_by_global_norm()
og.clip_by_global_norm("1.0")
og.clip_by_global_norm(1.0, nonfinite="skip")
og.clip_by_global_norm(1.0, 2)
og.clip_updates(params, og.zscore_threshold())
og.clip_updates(params, lambda count: 1.0)
og.skip_by_global_norm(1.0)
og.zscore_threshold("2.5")
og.quantile_threshold(0.5, window=2.5)
og.Threshold(init=0.0, update=lambda norm, last, count: (last, last))
og.metrics()
first.norm
"""


def test_users_program_passes_and_each_mistake_is_found(tmp_path):
    pyright = [sys.executable, "-m", "pyright"]
    if subprocess.run([*pyright, "--version"], capture_output=True).returncode:
        pytest.skip("pip install -e '.[lint]' installs pyright")
    (tmp_path / "program.py").write_text(PROGRAM)
    config = {"include": ["program.py"], "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [*pyright, "--outputjson", "--pythonpath", sys.executable]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = {
        each["range"]["start"]["line"]: each["message"]
        for each in json.loads(ran.stdout)["generalDiagnostics"]
        if each["severity"] == "error"
    }
    lines = PROGRAM.splitlines()
    wrong = next(i for i, line in enumerate(lines) if line.startswith("# rejected"))
    assert not {line: found[line] for line in found if line <= wrong}
    assert [lines[line] for line in sorted(found)] == lines[wrong + 1 :]
