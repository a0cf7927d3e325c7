"""The figure of ``benchmarks.temporal_order``: the success rate over the lengths."""

import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from . import style


@style.applied
def draw(results: dict[str, Any], path: pathlib.Path) -> None:
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
