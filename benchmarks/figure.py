"""The figure of one machine's results: what the clip adds to an AdamW step."""

import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.pyplot as plt

from . import style

CASE = "added to AdamW"
DTYPES = ("float32", "bfloat16")
CLIPS = ("optax", "by hand", "ours")

Times = dict[tuple[str, str], float]


@style.applied
def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a panel for each dtype: a bar for each clip, and a line at one read."""
    rows = [row for row in results["rows"] if row["case"] == CASE]
    times = {(r["dtype"], r["contender"]): r["added_milliseconds"] for r in rows}
    dtypes = [dtype for dtype in DTYPES if (dtype, "ours") in times]
    figure, panels = plt.subplots(
        1, len(dtypes), sharex=True, figsize=(9, 2.6), squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        axes.set_title(f"{dtype} gradients")
        clips = [clip for clip in CLIPS if (dtype, clip) in times]
        style.bars(axes, {clip: times[dtype, clip] for clip in clips}, "{:.0f} ms")
        _one_read(axes, times.get((dtype, "one read")))
    figure.supxlabel(
        f"milliseconds added to an AdamW step of GPT-2 small; {results['machine']}",
        color=style.TEXT,
        fontsize=10,
    )
    style.save(figure, path)


def _one_read(axes: matplotlib.axes.Axes, milliseconds: float | None) -> None:
    """A line at the time that one read of the gradients takes."""
    if milliseconds is None:
        return
    axes.axvline(milliseconds, color=style.TEXT, ls=(0, (3, 2)), lw=1.2)
    # Beside the line, in the free part below the shortest bar.
    bottom = axes.get_ylim()[0]
    axes.set_ylim(bottom + 0.55, None)
    axes.annotate(
        f"one read of the gradients: {milliseconds:.0f} ms",
        (milliseconds, bottom + 0.25),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )
