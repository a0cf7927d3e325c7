"""What shows the package at work: the demo, the notebooks, the example with loggers."""

import csv
import pathlib
import subprocess
import sys

import jax
import nbclient
import nbformat
import pytest
import tensorboardX

from examples import loggers
from optax_globalclip import _demo as demo

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


# --- The demo.


def test_demo_prints_a_table_and_how_to_do_it_oneself(capsys, tmp_path):
    picture = tmp_path / "demo.png"
    arguments = ["--steps", "3", "--max-norm", "0.5", "--plot", str(picture)]
    runs = demo.main(arguments)
    printed = capsys.readouterr().out
    for words in ("no clipping", "clipped to 0.5", "test accuracy", "steps clipped"):
        assert words in printed
    assert "clip_by_global_norm(0.5)" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The first gradients are those of one network on one batch; later ones differ.
    one, other = (run.norms for run in runs.values())
    assert len(one) == len(other) == 3
    assert one[0] == other[0]
    assert one[2] != other[2]


def test_demo_says_which_extra_it_needs():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import runpy; runpy.run_module('optax_globalclip', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "pip install 'optax_globalclip[demo]'" in ran.stderr


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clipping_is_what_makes_the_demo_train(seed):
    runs = demo.main(["--seed", str(seed)])
    clipped, unclipped = runs["clipped"], runs["no clipping"]
    assert clipped.accuracy > 0.85
    assert clipped.accuracy - unclipped.accuracy >= 0.3
    assert unclipped.clip_fraction == 0 < clipped.clip_fraction


# --- The notebooks.


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_asserts_shows_its_outputs_and_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    source = "\n".join(cell.source for cell in cells)
    assert len(cells) <= 12
    assert len(source.splitlines()) <= 120
    assert "assert" in source
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)

    # Without its outputs, so that only what it computes now can be right.
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    )
    client.execute()
    assert all(cell.execution_count for cell in code_cells(notebook))


def test_assertion_of_a_notebook_that_fails_is_an_error():
    assert [path.stem[0] for path in NOTEBOOKS] == list("12345")
    notebook = nbformat.v4.new_notebook()
    notebook.cells.append(nbformat.v4.new_code_cell("assert 1 + 1 == 3"))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        nbclient.NotebookClient(notebook, kernel_name="python3").execute()


# --- The example with loggers: what each gets, and how seldom it is fetched.


@pytest.fixture
def fetches(monkeypatch):
    """Counts the transfers to the host."""
    found, device_get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda t: found.append(t) or device_get(t))
    return found


def test_every_logger_gets_every_step(tmp_path, fetches, optax_promotes):
    class Run:
        rows = []

        def log(self, row, step):
            self.rows.append((step, row))

    events, file = tmp_path / "events", tmp_path / "metrics.csv"
    with tensorboardX.SummaryWriter(str(events)) as board, file.open("w") as opened:
        logs = [loggers.to_tensorboard(board), loggers.to_csv(opened)]
        loggers.train(130, [*logs, loggers.to_wandb(Run())])

    assert len(fetches) == 2
    assert [step for step, _ in Run.rows] == list(range(130))
    names = {"loss", "global_norm", "clipped_norm", "clip_scale", "clip_fraction"}
    assert names <= set(Run.rows[0][1])
    assert Run.rows[-1][1]["global_norm"] > Run.rows[-1][1]["clipped_norm"] > 0
    with file.open() as opened:
        written = list(csv.DictReader(opened))
    assert [
        {name: float(value) for name, value in row.items() if name != "step"}
        for row in written
    ] == [row for _, row in Run.rows]
    (event_file,) = events.iterdir()
    assert event_file.stat().st_size > 130 * len(names) * 20


def test_loggers_from_the_command_line(tmp_path, capsys, optax_promotes):
    loggers.main(["--steps", "3", "--out", str(tmp_path / "runs")])
    lines = (tmp_path / "runs" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4
    assert "metrics.csv" in capsys.readouterr().out
