"""The figure of ``benchmarks.accelerators``: what the clip adds, for each target."""

import json
import pathlib
from typing import Any

import matplotlib
import matplotlib.axes

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from .figure import COLORS, LABELS  # noqa: E402

CASES = {
    "AdamW,\nfloat32": ("added to AdamW", "float32"),
    "AdamW,\nbfloat16": ("added to AdamW", "bfloat16"),
    "whole\ntraining step": ("whole training step", "float32"),
}
CLIPS = ("by hand", "optax", "ours")
METRICS = {
    "hbm_gb": ("HBM traffic, GB", 1, "{:.2f}"),
    "kernels": ("kernels", 1, "{:.0f}"),
    "cycles": ("million cycles", 1e-6, "{:.2f}"),
}
TARGETS = ("v5e", "v5p", "v6e", "h100")

Rows = dict[tuple[str, str, str], dict[str, Any]]


def draw(directory: pathlib.Path) -> None:
    """Draws all results that lie there, to ``compiled.png`` beside them."""
    paths = [directory / f"compiled-{name}.json" for name in TARGETS]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    figure, axes = plt.subplots(
        len(METRICS),
        len(results),
        figsize=(max(6.5, 0.5 + 3.4 * len(results)), 7.2),
        squeeze=False,
        constrained_layout=True,
        sharey="row",
    )
    for column, result in zip(axes.T, results, strict=True):
        rows = {(r["case"], r["dtype"], r["contender"]): r for r in result["rows"]}
        column[0].set_title(result["target"])
        for axis, metric in zip(column, METRICS, strict=True):
            _panel(axis, rows, metric)
    for axis, (label, _, _) in zip(axes[:, 0], METRICS.values(), strict=True):
        axis.set_ylabel(label)
    bars = [Patch(color=COLORS[clip], label=LABELS.get(clip, clip)) for clip in CLIPS]
    figure.legend(handles=bars, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "What clipping adds to steps of GPT-2 small: compiled, not measured"
    )
    figure.savefig(directory / "compiled.png", dpi=110)
    plt.close(figure)


def _panel(axis: matplotlib.axes.Axes, rows: Rows, metric: str) -> None:
    """A bar for each clip in each case, labelled with its height."""
    _, unit, style = METRICS[metric]
    for i, clip in enumerate(CLIPS):
        heights = [_added(rows, *case, clip, metric) for case in CASES.values()]
        places = [
            place + 0.27 * (i - 1)
            for place, height in enumerate(heights)
            if height is not None
        ]
        heights = [height * unit for height in heights if height is not None]
        bars = axis.bar(places, heights, 0.25, color=COLORS[clip])
        axis.bar_label(bars, [style.format(height) for height in heights], fontsize=7)
    axis.set_xticks(range(len(CASES)), list(CASES), fontsize=8)
    axis.set_xlim(-0.5, len(CASES) - 0.5)
    axis.margins(y=0.12)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    if not any(row[metric] is not None for row in rows.values()):
        axis.text(0.5, 0.5, "no estimate", transform=axis.transAxes, ha="center")


def _added(rows: Rows, case: str, dtype: str, clip: str, metric: str) -> float | None:
    """How much more than without a clip, where both were compiled."""
    without, with_ = (rows.get((case, dtype, name)) for name in ("none", clip))
    if not without or not with_ or without[metric] is None:
        return None
    return with_[metric] - without[metric]
