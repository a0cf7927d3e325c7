"""The figure of ``benchmarks.temporal_order``: the success rate over the lengths."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from optax_globalclip._demo import COLOURS  # noqa: E402

METHOD_COLOURS = {**COLOURS, "clipped, authors' rule": "#56B4E9"}


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a line for each method, labelled at its end."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    methods = list(dict.fromkeys(row["method"] for row in results["rows"]))
    ends: list[float] = []
    for i, method in enumerate(methods):
        rows = [row for row in results["rows"] if row["method"] == method]
        lengths = [row["length"] for row in rows]
        rates = [100 * row["solved"] / len(row["errors"]) for row in rows]
        axes.plot(
            lengths,
            # Lines that coincide are drawn beside one another.
            [rate + 1.2 * (1 - i) for rate in rates],
            "o-",
            color=METHOD_COLOURS[method],
            lw=2,
            ms=5,
        )
        axes.annotate(
            method,
            (lengths[-1], rates[-1]),
            # Below one another, where lines end together.
            (8, -4 - 12 * sum(rates[-1] == end for end in ends)),
            textcoords="offset points",
            color=METHOD_COLOURS[method],
        )
        ends.append(rates[-1])
    axes.set(
        xlabel="symbols in a sequence",
        ylabel="seeds that solve it, %",
        ylim=(-5, 108),
        xticks=sorted({row["length"] for row in results["rows"]}),
        title=f"Temporal order, {results['seeds']} seeds, "
        f"at most {results['steps']:,} updates",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
