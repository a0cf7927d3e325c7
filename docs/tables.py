"""The rows of the documentation's tables that come from files of results.

``python -m docs.tables`` prints them all, to paste after a benchmark has run.
``tests/test_docs.py`` compares them with what the pages say.
"""

import json
import pathlib
from typing import Any

from benchmarks import report, spikes

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
CONTENDERS = {
    "none": "no clip",
    "by hand": "by hand",
    "optax": "optax",
    "ours": "optax_globalclip",
}


def read(name: str) -> dict[str, Any]:
    """The results in one file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def compiled_lines(results: dict[str, Any]) -> list[str]:
    """One line for each program compiled, a cell for each contender: the README's."""
    programs: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        cell = f"{row['hbm_gb']:.4g} GB, {row['kernels']} kernels"
        programs.setdefault(_program(row), {})[row["contender"]] = cell
    return [
        _line([name, *(cells.get(who, "–") for who in CONTENDERS)])
        for name, cells in programs.items()
    ]


def compiled_long_lines(results: dict[str, Any]) -> list[str]:
    """One line for each program and contender."""
    return [
        _line(
            [
                _program(row),
                CONTENDERS[row["contender"]],
                f"{row['hbm_gb']:.4g} GB",
                str(row["kernels"]),
                f"{row['build_seconds']:.2g} s",
            ]
        )
        for row in results["rows"]
    ]


def spikes_lines(results: dict[str, Any]) -> list[str]:
    """One line for each method of the study of bad batches."""
    return [_line(spikes.cells(row)) for row in results["rows"]]


def compare_lines(results: dict[str, Any]) -> list[str]:
    """One line for each case in which Optax's clip and ours differ."""
    return [_line([row["case"], row["optax"], row["ours"]]) for row in results["rows"]]


def _program(row: dict[str, Any]) -> str:
    return f"{row['case'].removeprefix('added to ')}, {row['dtype']}"


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
    print("docs/cost.md", *compiled_long_lines(read("compiled-h100")), sep="\n")


if __name__ == "__main__":
    main()
