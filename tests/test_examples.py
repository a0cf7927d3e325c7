"""The example with loggers: what each gets, and how seldom it is fetched."""

import csv

import jax
import pytest
import tensorboardX

from examples import loggers

pytestmark = pytest.mark.slow


@pytest.fixture
def fetches(monkeypatch):
    """Counts the transfers to the host."""
    found, device_get = [], jax.device_get

    def counted(tree):
        found.append(tree)
        return device_get(tree)

    monkeypatch.setattr(jax, "device_get", counted)
    return found


def test_every_logger_gets_every_step(tmp_path, fetches, optax_promotes):
    class Run:
        rows = []

        def log(self, row, step):
            self.rows.append((step, row))

    events, file = tmp_path / "events", tmp_path / "metrics.csv"
    with tensorboardX.SummaryWriter(str(events)) as board, file.open("w") as opened:
        logs = [
            loggers.to_tensorboard(board),
            loggers.to_csv(opened),
            loggers.to_wandb(Run()),
        ]
        loggers.train(130, logs)

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


def test_from_the_command_line(tmp_path, capsys, optax_promotes):
    loggers.main(["--steps", "3", "--out", str(tmp_path / "runs")])
    lines = (tmp_path / "runs" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4
    assert "metrics.csv" in capsys.readouterr().out
