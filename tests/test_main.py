"""The demo: its table, its picture, and what it is there to show."""

import subprocess
import sys

import pytest

from optax_globalclip import _demo as demo

pytestmark = pytest.mark.slow


def test_prints_a_table_and_how_to_do_it_oneself(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    arguments = ["--steps", "3", "--max-norm", "0.5", "--plot", str(picture)]
    runs = demo.main(arguments)
    printed = capsys.readouterr().out
    for words in ("no clipping", "clipped to 0.5", "test accuracy", "steps clipped"):
        assert words in printed
    assert "clip_by_global_norm(0.5)" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [len(run.norms) for run in runs.values()] == [3, 3]
    # The first gradients are those of one network on one batch; later ones differ.
    norms = [run.norms for run in runs.values()]
    assert norms[0][0] == norms[1][0]
    assert norms[0][2] != norms[1][2]


def test_says_which_extra_it_needs():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import runpy; runpy.run_module('optax_globalclip', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "pip install 'optax_globalclip[demo]'" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clipping_is_what_makes_it_train(seed):
    runs = demo.main(["--seed", str(seed)])
    clipped, unclipped = runs["clipped"], runs["no clipping"]
    assert clipped.accuracy > 0.85
    assert clipped.accuracy - unclipped.accuracy >= 0.3
    assert unclipped.clip_fraction == 0 < clipped.clip_fraction
