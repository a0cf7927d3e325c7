"""The rows of the documentation's tables that come from files of results.

``python -m docs.tables`` prints them, to paste after a benchmark has run.
``tests/test_docs.py`` compares them with what the pages say.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
CONTENDERS = ("none", "by hand", "optax", "ours")


def read(name: str) -> dict[str, Any]:
    """The results in one file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def compiled() -> dict[str, dict[str, Any]]:
    """The results for each accelerator that has been compiled for."""
    files = sorted(RESULTS.glob("compiled-*.json"))
    found = [json.loads(path.read_text()) for path in files]
    return {results["target"]: results for results in found}


def programs(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each program the row of each contender."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        program = f"{row['case'].removeprefix('added to ')}, {row['dtype']}"
        found.setdefault(program, {})[row["contender"]] = row
    return found


def compiled_lines(results: dict[str, Any]) -> list[str]:
    """One line for each program: traffic and work, a cell for each contender."""
    return [
        _line([name, *(_cell(rows.get(who)) for who in CONTENDERS)])
        for name, rows in sorted(programs(results).items())
    ]


def compare_lines(results: dict[str, Any]) -> list[str]:
    """One line for each case in which Optax's clip and ours differ."""
    return [_line([row["case"], row["optax"], row["ours"]]) for row in results["rows"]]


def _cell(row: dict[str, Any] | None) -> str:
    """GB; million cycles where the compiler estimates them (TPUs), else kernels."""
    if row is None:
        return "–"
    cycles = row["cycles"]
    work = f"{row['kernels']:,}" if cycles is None else f"{cycles / 1e6:.3g}"
    return f"{row['hbm_gb']:.3g}; {work}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints every table's rows under the name of their file."""
    print("compare.json", *compare_lines(read("compare")), sep="\n", end="\n\n")
    for target, results in compiled().items():
        print(target, *compiled_lines(results), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
