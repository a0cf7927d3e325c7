"""Draws all figures anew from the results: ``python -m benchmarks.redraw``."""

import json
import pathlib
from typing import Any

from . import (
    command,
    compiled_figure,
    figure,
    spikes_figure,
    temporal_order_figure,
)
from .__main__ import RESULTS


def main(arguments: list[str] | None = None) -> None:
    """Draws each figure whose results are there, beside them."""
    parser = command.parser("redraw", __doc__)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
    out = parser.parse_args(arguments).out
    if list(out.glob("compiled-*.json")):
        compiled_figure.draw(out)
    for path in sorted(out.glob("*.json")):
        results, picture = json.loads(path.read_text()), path.with_suffix(".png")
        if path.stem == "spikes":
            spikes_figure.draw(results, picture)
            spikes_figure.draw_grid(results, out / "spikes-grid.png")
        elif path.stem == "temporal-order":
            temporal_order_figure.draw(results, picture)
        elif _is_of_a_machine(results):
            figure.draw(results, picture)


def _is_of_a_machine(results: dict[str, Any]) -> bool:
    """Whether ``python -m benchmarks`` wrote it."""
    return "machine" in results


if __name__ == "__main__":
    main()
