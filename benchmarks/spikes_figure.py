"""The figures of ``benchmarks.spikes``: the test, and the grid before it."""

import itertools
import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.patches
import matplotlib.pyplot as plt
import numpy as np

from . import style

TITLES = {
    "clean": "No bad batch",
    "scaled": "Gradient ×1,000,\n1 batch in 100",
    "bursts": "Bursts of 10: random\nlabels, gradient ×100",
    "labels": "Random labels,\n1 batch in 20",
    "NaN": "A NaN in\n1 batch in 100",
}
AXES = {"constant": "threshold", "z-score": "z", "quantile": "q", "skip": "z"}


@style.applied
def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """A panel for each kind of bad batches, a row of dots for each method."""
    rows = results["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, panels = plt.subplots(
        1, len(kinds), sharex=True, sharey=True, figsize=(12, 3.4), squeeze=False
    )
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(TITLES[kind])
        found = {row["method"]: row for row in rows if row["kind"] == kind}
        for place, method in enumerate(methods):
            _dots(axes, place, found[method], style.COLOURS[method])
        axes.set(xscale="log", xlim=(0.012, 1.3))
        axes.axvspan(0.8, 1.3, color=style.FAINT, lw=0, zorder=0)
        axes.set_xticks([0.02, 0.05, 0.2, 0.9], ["2%", "5%", "20%", "lost"])
        axes.set_xticks([], minor=True)
    first = panels[0, 0]
    first.set_yticks(range(len(methods)), methods)
    first.set_ylim(len(methods) - 0.5, -0.5)
    for label, method in zip(first.get_yticklabels(), methods, strict=True):
        label.set_color(style.COLOURS[method])
    figure.supxlabel(
        "test error, log scale: a dot for each seed, a bar for the 95% interval "
        "of their mean",
        color=style.TEXT,
        fontsize=10,
    )
    style.save(figure, path)


def _dots(
    axes: matplotlib.axes.Axes, place: int, row: dict[str, Any], colour: str
) -> None:
    """The errors of one method, beside one another where they are the same."""
    errors = 1 - np.array(row["accuracies"])
    beside = np.linspace(-0.22, 0.22, len(errors))
    axes.scatter(errors, place + beside, s=10, color=colour, lw=0)
    if row["lost"]:
        text = f"{row['lost']} of {len(errors)} lost"
        where = dict(ha="right", va="center", color=colour)
        axes.text(0.74, place, text, where)
    else:
        # An interval may end beyond no error at all, which a log scale cannot show.
        low, high = (max(1 - each, 1e-3) for each in row["accuracy_interval"])
        axes.plot([low, high], [place, place], color=colour, lw=2.5)


@style.applied
def draw_grid(results: dict[str, Any], path: pathlib.Path) -> None:
    """A heat map for each method: its value and the learning rate, and what is best."""
    grid = results["grid"]
    methods = list(dict.fromkeys(row["method"] for row in grid))
    counts = [len({r["value"] for r in grid if r["method"] == m}) for m in methods]
    figure, panels = plt.subplots(
        1, len(methods), figsize=(12, 3.1), width_ratios=[n + 0.4 for n in counts]
    )
    for axes, method in zip(panels, methods, strict=True):
        _heat_map(axes, [row for row in grid if row["method"] == method])
        axes.set_title(method, color=style.COLOURS[method])
        axes.set_xlabel(AXES.get(method, ""))
    panels[0].set_ylabel("learning rate")
    figure.supxlabel(
        "mean test accuracy in %, over all kinds of bad batches; framed: chosen",
        color=style.TEXT,
        fontsize=10,
    )
    style.save(figure, path)


def _heat_map(axes: matplotlib.axes.Axes, rows: list[dict[str, Any]]) -> None:
    values = list(dict.fromkeys(row["value"] for row in rows))
    rates = sorted({row["learning_rate"] for row in rows})
    found = {(row["value"], row["learning_rate"]): row for row in rows}
    shares = [[found[value, rate]["accuracy"] for value in values] for rate in rates]
    axes.imshow(shares, cmap="cividis", vmin=0.1, vmax=1, origin="lower", aspect="auto")
    for (y, rate), (x, value) in itertools.product(enumerate(rates), enumerate(values)):
        row = found[value, rate]
        colour = "white" if row["accuracy"] < 0.6 else "black"
        number = f"{100 * row['accuracy']:.1f}"
        axes.text(x, y, number, ha="center", va="center", color=colour, fontsize=9)
        if row["chosen"]:
            corner = (x - 0.46, y - 0.46)
            frame = matplotlib.patches.Rectangle(
                corner, 0.92, 0.92, fill=False, ec="#d1242f", lw=2.5
            )
            axes.add_patch(frame)
    names = ["" if value is None else f"{value:g}" for value in values]
    axes.set_xticks(range(len(values)), names)
    axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
