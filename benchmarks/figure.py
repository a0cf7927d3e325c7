"""The figure of one machine's results."""

import pathlib
from typing import Any

import matplotlib
import matplotlib.axes

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

COLORS = {
    "floor": "#2b2b2b",
    "by hand": "#E69F00",
    "optax": "#9aa5b1",
    "ours": "#0072B2",
}
LABELS = {"ours": "optax_globalclip", "by hand": "five lines by hand"}


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws what clipping adds to an AdamW step, and what it costs alone."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    rows = results["rows"]
    added = [row for row in rows if row["case"] == "added to AdamW"]
    bars(axes[0], added, "added_milliseconds")
    axes[0].set(title="Added to an AdamW step, GPT-2 small", ylabel="ms")
    alone = [row for row in rows if row["case"].startswith("clip alone")]
    bars(axes[1], alone, "milliseconds")
    axes[1].set(title=alone[0]["case"].capitalize(), ylabel="ms")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{results['machine']}. Floor: one read of the gradients; alone, a write too"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bars(axis: matplotlib.axes.Axes, rows: list[dict[str, Any]], value: str) -> None:
    """A group of bars for each dtype, a bar for each contender, with its height."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    found = {(row["dtype"], row["contender"]): row[value] for row in rows}
    width = 0.8 / len(COLORS)
    for i, (name, color) in enumerate(COLORS.items()):
        heights = [found.get((dtype, name), np.nan) for dtype in dtypes]
        places = np.arange(len(dtypes)) + (i - (len(COLORS) - 1) / 2) * width
        drawn = axis.bar(
            places, heights, width, color=color, label=LABELS.get(name, name)
        )
        axis.bar_label(drawn, fmt="{:.3g}", fontsize=7, padding=1)
    axis.set_xticks(range(len(dtypes)), dtypes)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
