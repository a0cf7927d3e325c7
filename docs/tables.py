"""The rows of the documentation's tables that come from files of results.

``python -m docs.tables`` prints them all, to paste after a benchmark has run.
``tests/test_docs.py`` compares them with what the pages say.
"""

import json
import pathlib
from typing import Any

from benchmarks import report, spikes

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
CONTENDERS = ("none", "by hand", "optax", "ours")


def read(name: str) -> dict[str, Any]:
    """The results in one file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def compiled_lines(results: dict[str, Any], *, build: bool = False) -> list[str]:
    """One line for each program compiled, a cell for each contender."""
    programs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        case = row["case"].removeprefix("added to ")
        programs.setdefault(f"{case}, {row['dtype']}", {})[row["contender"]] = row
    return [
        _line([name, *(_compiled_cell(rows.get(who), build) for who in CONTENDERS)])
        for name, rows in programs.items()
    ]


def spikes_lines(results: dict[str, Any]) -> list[str]:
    """One line for each method of the study of bad batches."""
    return [_line(spikes.cells(row)) for row in results["rows"]]


def compare_lines(results: dict[str, Any]) -> list[str]:
    """One line for each case in which Optax's clip and ours differ."""
    return [
        _line([row["case"], row["optax"], row["ours"]]) for row in results["rows"]
    ]


def _compiled_cell(row: dict[str, Any] | None, build: bool) -> str:
    if row is None:
        return "–"
    cell = f"{row['hbm_gb']:.4g} GB, {row['kernels']} kernels"
    return f"{cell}, {row['build_seconds']:.2g} s" if build else cell


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints every table's rows under the name of their file."""
    tables = {
        "cpu-2-cores": report.lines,
        "compiled-h100": compiled_lines,
        "llama-70b": report.sharding_lines,
        "compare": compare_lines,
        "spikes": spikes_lines,
    }
    for name, lines in tables.items():
        print(f"{name}.json", *lines(read(name)), sep="\n", end="\n\n")
    print("With build times", *compiled_lines(read("compiled-h100"), build=True), sep="\n")


if __name__ == "__main__":
    main()
