"""The figure of ``benchmarks.accelerators``: what the clip adds, for each target."""

import json
import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.pyplot as plt

from . import style

CASE = ("added to AdamW", "float32")
CLIPS = ("optax", "by hand", "ours")
# By metric: the title, the unit of what is drawn, and how it is written.
METRICS = {
    "kernels": ("Kernels", 1, "{:.0f}"),
    "hbm_gb": ("Memory traffic, GB", 1, "{:.2f}"),
    "cycles": ("Million cycles", 1e-6, "{:.2f}"),
}
TARGETS = ("v5e", "v5p", "v6e", "h100")

Rows = dict[str, dict[str, Any]]


@style.applied
def draw(directory: pathlib.Path) -> None:
    """Draws all results that lie there, to ``compiled.png`` beside them."""
    paths = [directory / f"compiled-{name}.json" for name in TARGETS]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    found = {result["target"]: _rows(result) for result in results}
    metrics = [m for m in METRICS if any(_known(rows, m) for rows in found.values())]
    figure, panels = plt.subplots(
        len(found),
        len(metrics),
        figsize=(4.2 * len(metrics), 0.9 + 1.35 * len(found)),
        sharex="col",
        squeeze=False,
    )
    for line, (target, rows) in zip(panels, found.items(), strict=True):
        for axes, metric in zip(line, metrics, strict=True):
            axes.set_title(f"{METRICS[metric][0]}, {target}")
            _panel(axes, rows, metric)
            axes.tick_params(labelleft=axes is line[0])
    figure.supxlabel(
        "added to an AdamW step of GPT-2 small, float32: compiled, not measured",
        color=style.TEXT,
        fontsize=10,
    )
    style.save(figure, directory / "compiled.png")


def _rows(result: dict[str, Any]) -> Rows:
    """The case's rows, by contender."""
    rows = result["rows"]
    return {r["contender"]: r for r in rows if (r["case"], r["dtype"]) == CASE}


def _known(rows: Rows, metric: str) -> bool:
    """Whether the compiler gives this metric for this target."""
    return "none" in rows and rows["none"][metric] is not None


def _panel(axes: matplotlib.axes.Axes, rows: Rows, metric: str) -> None:
    """A bar for each clip: how much more than without one."""
    if not _known(rows, metric):
        axes.text(0.5, 0.5, "no estimate", transform=axes.transAxes, ha="center")
        axes.set_axis_off()
        return
    _, unit, written = METRICS[metric]
    clips = [clip for clip in CLIPS if clip in rows]
    base = rows["none"][metric]
    added = {clip: (rows[clip][metric] - base) * unit for clip in clips}
    style.bars(axes, added, written)
