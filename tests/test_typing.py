"""A user's program passes a type checker, and its mistakes do not."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

PROGRAM = """
from typing import assert_type

import jax
import jax.numpy as jnp
import optax

import optax_globalclip as og

params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
clip = og.clip_by_global_norm(1.0, nonfinite="zero", ord=jnp.float32(2))
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


def errors(program, directory):
    """The lines, counted from 1, on which the type checker finds an error."""
    (directory / "program.py").write_text(program)
    config = {"include": ["program.py"], "extraPaths": [str(ROOT)]}
    (directory / "pyrightconfig.json").write_text(json.dumps(config))
    command = ["-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    ran = subprocess.run(
        [sys.executable, *command], cwd=directory, capture_output=True, text=True
    )
    found = json.loads(ran.stdout)["generalDiagnostics"]
    return {
        each["range"]["start"]["line"] + 1: each["message"]
        for each in found
        if each["severity"] == "error"
    }


def test_users_program_passes_and_each_mistake_is_found(tmp_path):
    asked = [sys.executable, "-m", "pyright", "--version"]
    if subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("pyright is not installed, or cannot be started")
    found = errors(PROGRAM, tmp_path)
    lines = PROGRAM.splitlines()
    wrong = next(i for i, line in enumerate(lines, 1) if line.startswith("# rejected"))
    assert not {line: found[line] for line in found if line <= wrong}
    mistakes = lines[wrong:]
    assert [lines[line - 1] for line in sorted(found)] == mistakes
