"""The figures of all results: ``python -m benchmarks.figures`` draws them anew."""

import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.pyplot as plt

from . import cases, results, style
from .results import Row
from .targets import TARGETS

CASE = "added to AdamW"
# By metric: its title, the unit of what is drawn, and how it is written.
METRICS = {
    "kernels": ("Kernels", 1, "{:.0f}"),
    "cycles": ("Million cycles", 1e-6, "{:.2f}"),
}


def main(arguments: list[str] | None = None) -> None:
    """Draws each figure whose results are there, beside them."""
    out = results.parser("benchmarks.figures", __doc__).parse_args(arguments).out
    draw_compiled(out)
    for path in out.glob("*.json"):
        if "machine" in (found := results.read(path)):
            draw_measured(found, path.with_suffix(".png"))


@style.applied
def draw_measured(found: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a panel for each dtype: a bar for each clip, and a line at one read."""
    dtypes = [d for d in cases.DTYPES[:2] if _rows(found, d)]
    figure, panels = plt.subplots(
        1, len(dtypes), sharex=True, figsize=(9, 2.6), squeeze=False
    )
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        rows = _rows(found, dtype)
        axes.set_title(f"{dtype} gradients")
        added = {name: row["added_milliseconds"] for name, row in rows.items()}
        style.bars(axes, {clip: added[clip] for clip in cases.CLIPS}, "{:.0f} ms")
        _one_read(axes, added["one read"])
    style.name_below(
        figure,
        f"milliseconds added to an AdamW step of GPT-2 small; {found['machine']}",
    )
    style.save(figure, path)


def _rows(found: dict[str, Any], dtype: str) -> dict[str, Row]:
    """The rows of the step that is drawn, by contender."""
    rows = found["rows"]
    return {r["contender"]: r for r in rows if (r["case"], r["dtype"]) == (CASE, dtype)}


def _one_read(axes: matplotlib.axes.Axes, milliseconds: float) -> None:
    """A line at the time that one read of the gradients takes."""
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


@style.applied
def draw_compiled(folder: pathlib.Path) -> None:
    """Draws what each clip adds to the step: a panel for each target."""
    read = [results.read(folder / f"compiled-{name}.json") for name in TARGETS]
    found = {each["target"]: _rows(each, "float32") for each in read if each}
    found = {target: rows for target, rows in found.items() if rows}
    if not found:
        return
    figure, panels = plt.subplots(
        1, len(found), figsize=(3.2 * len(found), 2.4), squeeze=False
    )
    for axes, (target, rows) in zip(panels[0], found.items(), strict=True):
        metric = "kernels" if rows["none"]["cycles"] is None else "cycles"
        title, unit, written = METRICS[metric]
        axes.set_title(f"{title}, {target}")
        base = rows["none"][metric]
        added = {clip: (rows[clip][metric] - base) * unit for clip in cases.CLIPS}
        style.bars(axes, added, written)
        axes.tick_params(labelleft=axes is panels[0][0])
    style.name_below(
        figure, "added to an AdamW step of GPT-2 small, float32: compiled, not measured"
    )
    style.save(figure, folder / "compiled.png")


if __name__ == "__main__":
    main()
