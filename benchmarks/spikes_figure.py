"""The figure of ``benchmarks.spikes``."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import matplotlib.axes  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from optax_globalclip._demo import COLOURS  # noqa: E402

if TYPE_CHECKING:
    from .spikes import Run

METHOD_COLOURS = {
    "no clipping": COLOURS["no clipping"],
    "constant": COLOURS["clipped"],
    "z-score": "#009E73",
    "quantile": "#CC79A7",
    "skip": "#E69F00",
}
SMOOTHED = 50  # Steps.


def draw(runs: dict[str, Run], path: pathlib.Path) -> None:
    """Draws the norm and the thresholds of one seed, and the losses of all."""
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(8.5, 7), layout="constrained"
    )
    steps = np.arange(1, runs["constant"].norms.shape[1] + 1)
    above.plot(steps, runs["z-score"].norms[0], ".", ms=2, color="0.6", label="norm")
    for name in ("constant", "z-score", "quantile", "skip"):
        thresholds = runs[name].thresholds[0]
        above.plot(steps, thresholds, color=METHOD_COLOURS[name], lw=1.2, label=name)
    above.set(
        yscale="log",
        ylim=(0.03, 1e6),
        ylabel="global norm and thresholds",
        title="1 in 100 batches is a spike, 1 in 200 has a NaN in it",
    )
    above.legend(frameon=False, ncols=5, loc="upper right", fontsize=9)

    ends = {name: _loss(below, name, run) for name, run in runs.items()}
    lowest = -0.1
    for name in sorted(ends, key=ends.__getitem__):
        # Apart, so that no label covers another.
        lowest = max(lowest + 0.15, ends[name])
        below.annotate(
            f"{name}: {runs[name].accuracies.mean():.0%} right",
            (len(steps), lowest),
            (5, -3),
            textcoords="offset points",
            color=METHOD_COLOURS[name],
            fontsize=9,
        )
    below.set(
        ylabel="training loss",
        xlabel="step",
        ylim=(0, 3.2),
        xlim=(0, len(steps) * 1.17),
    )
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _loss(axes: matplotlib.axes.Axes, name: str, run: Run) -> float:
    """Draws the mean over seeds of the median of some steps; returns its last value."""
    starts = np.arange(0, run.losses.shape[1] - SMOOTHED + 1, SMOOTHED)
    parts = [run.losses[:, start : start + SMOOTHED] for start in starts]
    medians = [_median(part).mean() for part in parts]
    axes.plot(starts + SMOOTHED, medians, color=METHOD_COLOURS[name], lw=1.8)
    return float(medians[-1])


def _median(losses: np.ndarray) -> np.ndarray:
    """The median of each seed, with a NaN at the loss of guessing, the log of 10."""
    return np.median(np.where(np.isfinite(losses), losses, np.log(10)), axis=1)
