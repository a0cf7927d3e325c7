"""The figures of the studies: ``python -m studies.figures`` draws them all anew."""

import itertools
import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.colors
import matplotlib.patches
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import results, style

from . import common

TITLES = {
    "clean": "No bad batch",
    "scaled": "Gradient ×1,000,\n1 batch in 100",
    "bursts": "Bursts of 10: random\nlabels, gradient ×100",
    "labels": "Random labels,\n1 batch in 20",
    "NaN": "A NaN in\n1 batch in 100",
}
# What is chosen for each method.
VALUE_NAMES = {"constant": "threshold", "z-score": "z", "quantile": "q", "skip": "z"}


def main(arguments: list[str] | None = None) -> None:
    """Draws each figure beside its results."""
    parser = results.parser("studies.figures", __doc__, common.FOLDER)
    out = parser.parse_args(arguments).out
    spikes = results.read(out / "spikes.json")
    draw_spikes(spikes, out / "spikes.png")
    draw_grid(spikes, out / "spikes-grid.png")
    path = out / "temporal-order.json"
    draw_temporal_order(results.read(path), path.with_suffix(".png"))


@style.applied
def draw_spikes(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a cell for each method and kind of bad batches, shaded by what is lost."""
    found = {(row["method"], row["kind"]): row for row in results["rows"]}
    methods, kinds = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    lost = {key: row["lost"] / len(row["accuracies"]) for key, row in found.items()}
    figure, axes = plt.subplots(figsize=(9, 3.4))
    to_rgba = matplotlib.colors.to_rgba
    axes.imshow(
        [[to_rgba(style.ORANGE, lost[m, k]) for k in kinds] for m in methods],
        aspect="auto",
    )
    for (y, method), (x, kind) in itertools.product(
        enumerate(methods), enumerate(kinds)
    ):
        color = "white" if lost[method, kind] > 0.5 else style.TEXT
        text = _accuracy(found[method, kind])
        axes.text(x, y, text, ha="center", va="center", color=color)
    axes.set_xticks(range(len(kinds)), [TITLES[kind] for kind in kinds])
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    for label, method in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_color(style.COLOURS[method])
    style.name_below(
        figure, "test accuracy in %, and its 95% interval over the seeds that learn"
    )
    style.save(figure, path)


def _accuracy(row: dict[str, Any]) -> str:
    if row["lost"]:
        return f"{row['lost']} of {len(row['accuracies'])} lost"
    if row["accuracy"] is None:
        return ""
    low, high = row["accuracy_interval"]
    return f"{100 * row['accuracy']:.1f} ± {50 * (high - low):.1f}"


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
        axes.set_xlabel(VALUE_NAMES.get(method, ""))
    panels[0].set_ylabel("learning rate")
    style.name_below(
        figure, "mean test accuracy in %, over all kinds of bad batches; framed: chosen"
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


@style.applied
def draw_temporal_order(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a line for each method, with its intervals, labelled at its end."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    methods = list(dict.fromkeys(row["method"] for row in results["rows"]))
    for i, method in enumerate(methods):
        rows = [row for row in results["rows"] if row["method"] == method]
        # Beside one another, where both methods are the same.
        lengths = np.array([row["length"] for row in rows]) + 0.8 * (i - 0.5)
        shares = 100 * np.array([row["solved"] / row["of"] for row in rows])
        low, high = 100 * np.array([row["interval"] for row in rows]).T
        colour = style.COLOURS[method]
        axes.plot(lengths, shares, "o-", color=colour, lw=2, ms=6)
        axes.vlines(lengths, low, high, color=colour, lw=1.5, alpha=0.7)
        axes.annotate(
            method,
            (lengths[-1], shares[-1]),
            # Apart, also where both lines end at one point.
            (9, 12 * i),
            textcoords="offset points",
            color=colour,
            va="center",
            weight="bold",
        )
    axes.set(
        xlabel="symbols in a sequence (bars: 95% intervals)",
        ylabel="networks that succeed",
        ylim=(-3, 103),
        yticks=[0, 25, 50, 75, 100],
        yticklabels=["0%", "25%", "50%", "75%", "100%"],
        xticks=sorted({row["length"] for row in results["rows"]}),
        title=f"Order of two symbols: {results['seeds']} networks each, at most "
        f"{results['steps']:,} updates",
    )
    axes.margins(x=0.03)
    style.save(figure, path)


if __name__ == "__main__":
    main()
