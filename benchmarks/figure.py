"""The figure of one machine's results."""

import pathlib
from typing import Any

import matplotlib
import matplotlib.axes

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

COLORS = {
    "optax": "#9aa5b1",
    "ours": "#0072B2",
    "torch": "#E69F00",
    "tensorflow": "#CC79A7",
    "floor": "#2b2b2b",
}
LABELS = {
    "ours": "optax_globalclip",
    "torch": "PyTorch",
    "tensorflow": "TensorFlow",
    "floor": "floor",
}
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws what clipping adds to steps, itself, and how both grow."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    rows = results["rows"]
    added = [row for row in rows if row["case"].startswith("added to")]
    _bars(axes[0, 0], added, "added_milliseconds")
    axes[0, 0].set(
        title="Added to a training step, GPT-2 small",
        ylabel="ms",
    )
    alone = [row for row in rows if row["case"].startswith("clip alone")]
    _bars(axes[0, 1], alone, "milliseconds")
    axes[0, 1].set(
        title=alone[0]["case"].capitalize(),
        ylabel="ms",
    )
    _lines(axes[1, 0], rows, "parameters: ", "added_milliseconds")
    axes[1, 0].set(title="Added to AdamW, float32", xlabel="parameters", ylabel="ms")
    _lines(axes[1, 1], rows, "leaves: ", "build_seconds")
    axes[1, 1].set(title="To trace and compile", xlabel="leaves", ylabel="s")
    figure.suptitle(
        f"{results['machine']}. Floor: one read of the gradients; alone, a write too"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axis: matplotlib.axes.Axes, rows: list[dict[str, Any]], value: str) -> None:
    """One group of bars for each case and dtype, one bar for each contender."""
    groups = list(dict.fromkeys((row["case"], row["dtype"]) for row in rows))
    present = {row["contender"] for row in rows}
    names = [name for name in COLORS if name in present]
    heights = {(r["case"], r["dtype"], r["contender"]): r[value] for r in rows}
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = [heights.get((*group, name), np.nan) for group in groups]
        places = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        axis.bar(
            places, values, width, color=COLORS[name], label=LABELS.get(name, name)
        )
    several = len({case for case, _ in groups}) > 1
    labels = [
        (case.removeprefix("added to ").split(" with ")[0] + ", ") * several
        + SHORT[dtype]
        for case, dtype in groups
    ]
    axis.set_xticks(range(len(groups)), labels, fontsize=8, rotation=40 * several)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(
    axis: matplotlib.axes.Axes, rows: list[dict[str, Any]], prefix: str, value: str
) -> None:
    """One line for each contender, against the number in the case's name."""
    for name in ("optax", "ours"):
        points = [
            (int(row["case"].removeprefix(prefix)), row[value])
            for row in rows
            if row["case"].startswith(prefix) and row["contender"] == name
        ]
        axis.loglog(
            *zip(*points, strict=True),
            "o-",
            color=COLORS[name],
            label=LABELS.get(name, name),
        )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
