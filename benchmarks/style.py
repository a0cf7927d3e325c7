"""What all figures share: colours and text that can be read on white and on black.

The background is transparent. Each colour has a contrast of at least 3 with white and
with GitHub's dark background, #0d1117.
"""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.axes  # noqa: E402
import matplotlib.figure  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402

TEXT, FAINT = "#768390", "#76839055"
BLUE, ORANGE, GREEN, PURPLE = "#2f81f7", "#db6d28", "#2da44e", "#a371f7"
AMBER, GREY = "#b58407", "#848d97"

# By what is compared, in every figure.
COLOURS = {
    **{"ours": BLUE, "optax": GREY, "by hand": AMBER},
    **{"no clipping": ORANGE, "clipped": BLUE, "constant": BLUE},
    **{"z-score": GREEN, "quantile": PURPLE, "skip": AMBER},
}
NAMES = {"ours": "optax_globalclip"}

_COLOURED = "axes.edgecolor axes.labelcolor axes.titlecolor text.color xtick.color"

_SETTINGS: dict[Any, Any] = {
    **dict.fromkeys(_COLOURED.split() + ["ytick.color"], TEXT),
    "savefig.transparent": True,
    "savefig.dpi": 140,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "figure.constrained_layout.use": True,
}

# A decorator for functions that draw.
applied = matplotlib.rc_context(_SETTINGS)


def name_below(figure: matplotlib.figure.Figure, text: str) -> None:
    """Says below all panels what they show."""
    figure.supxlabel(text, color=TEXT, fontsize=10)


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
    """Writes the figure and closes it."""
    figure.savefig(path)
    plt.close(figure)


def bars(axes: matplotlib.axes.Axes, values: dict[str, float], style: str) -> None:
    """A horizontal bar for each contender, with its name and its value beside it."""
    colours = [COLOURS[name] for name in values]
    drawn = axes.barh(range(len(values)), list(values.values()), 0.7, color=colours)
    labels = [style.format(value) for value in values.values()]
    axes.bar_label(drawn, labels, padding=4, color=TEXT)
    axes.set_yticks(range(len(values)), [NAMES.get(name, name) for name in values])
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.2)
    axes.axvline(0, color=TEXT, lw=0.8)
    axes.spines["left"].set_visible(False)
