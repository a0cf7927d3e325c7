"""What all figures share: colours and text that can be read on white and on black.

The background is transparent. Each colour has a contrast of at least 3 with white and
with GitHub's dark background, #0d1117.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.axes  # noqa: E402
import matplotlib.figure  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402

from optax_globalclip._demo import BLUE, ORANGE, STYLE, TEXT  # noqa: E402

FAINT = "#76839055"
GREEN = "#2da44e"
PURPLE = "#a371f7"
AMBER = "#b58407"
GREY = "#848d97"

# By what is compared, in every figure.
COLOURS = {
    "ours": BLUE,
    "optax": GREY,
    "by hand": AMBER,
    "no clipping": ORANGE,
    "clipped": BLUE,
    "constant": BLUE,
    "z-score": GREEN,
    "quantile": PURPLE,
    "skip": AMBER,
}
NAMES = {"ours": "optax_globalclip", "by hand": "by hand"}

# A decorator for functions that draw.
applied = matplotlib.rc_context(
    {
        **STYLE,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 140,
        "grid.color": FAINT,
    }
)


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
    """Writes the figure and closes it."""
    figure.savefig(path)
    plt.close(figure)


def bars(
    axes: matplotlib.axes.Axes, values: dict[str, float | None], style: str
) -> None:
    """A horizontal bar for each contender, with its name and its value beside it."""
    names = list(values)
    heights = [values[name] or 0 for name in names]
    colours = [COLOURS[name] for name in names]
    drawn = axes.barh(range(len(names)), heights, 0.7, color=colours)
    labels = ["no data" if v is None else style.format(v) for v in values.values()]
    axes.bar_label(drawn, labels, padding=4, color=TEXT)
    axes.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.2)
    axes.axvline(0, color=TEXT, lw=0.8)
    axes.spines["left"].set_visible(False)
