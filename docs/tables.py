"""The rows of the documentation's tables that come from files of results.

``python -m docs.tables`` prints them all, to paste after a benchmark has run.
``tests/test_docs.py`` compares them with what the pages say.
"""

import json
import pathlib
from typing import Any

from benchmarks import report, spikes

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"
PEERS = ("optax", "by hand")
TPUS = ("TPU v5e", "TPU v5p", "TPU v6e")
CONTENDERS = {
    "none": "no clip",
    "by hand": "by hand",
    "optax": "optax",
    "ours": "optax_globalclip",
}


def read(name: str) -> dict[str, Any]:
    """The results in one file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def compiled() -> list[dict[str, Any]]:
    """The results for each accelerator that has been compiled for."""
    return [json.loads(path.read_text()) for path in RESULTS.glob("compiled-*.json")]


def compiled_lines(results: dict[str, Any]) -> list[str]:
    """One line for each program, a cell for each contender: as in the README."""
    programs: dict[str, dict[str, str]] = {}
    for row in results["rows"]:
        cells = programs.setdefault(f"{results['target']}: {_program(row)}", {})
        cells[row["contender"]] = f"{_traffic(row)}, {_work(row)}"
    return [
        _line([name, *(cells.get(who, "–") for who in CONTENDERS)])
        for name, cells in programs.items()
    ]


def compiled_long_lines(results: dict[str, Any]) -> dict[str, list[str]]:
    """Of each program one line for each contender: as on the page about cost."""
    programs: dict[str, list[str]] = {}
    for row in results["rows"]:
        cells = (CONTENDERS[row["contender"]], _traffic(row), _work(row))
        lines = programs.setdefault(_program(row), [])
        lines.append(_line([f"{results['target']}: {_program(row)}", *cells]))
    return programs


def cycles_lines(targets: list[dict[str, Any]]) -> list[str]:
    """Of each program our cycles beside each peer's, a cell for each TPU."""
    lines: dict[str, dict[str, str]] = {}
    for results in targets:
        programs: dict[str, dict[str, Any]] = {}
        for row in results["rows"]:
            programs.setdefault(_program(row), {})[row["contender"]] = row["cycles"]
        for program, cycles in programs.items():
            if cycles["ours"] is not None:
                more = (cycles["ours"] / cycles[peer] - 1 for peer in PEERS)
                cell = ", ".join(f"{share:+.1%}" for share in more)
                lines.setdefault(program, {})[results["target"]] = cell
    return [
        _line([program, *(cells.get(tpu, "–") for tpu in TPUS)])
        for program, cells in sorted(lines.items())
    ]


def spikes_lines(results: dict[str, Any]) -> list[str]:
    """One line for each method of the study of bad batches."""
    return [_line(cells) for cells in spikes.lines(results["rows"])]


def compare_lines(results: dict[str, Any]) -> list[str]:
    """One line for each case in which Optax's clip and ours differ."""
    return [_line([row["case"], row["optax"], row["ours"]]) for row in results["rows"]]


def _program(row: dict[str, Any]) -> str:
    return f"{row['case'].removeprefix('added to ')}, {row['dtype']}"


def _traffic(row: dict[str, Any]) -> str:
    return f"{row['hbm_gb']:.4g} GB"


def _work(row: dict[str, Any]) -> str:
    """Cycles where the compiler estimates them, on a TPU; kernels on a GPU."""
    if row["cycles"] is None:
        return f"{row['kernels']} kernels"
    return f"{row['cycles'] / 1e6:.3g} million cycles"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints every table's rows under the name of their file."""
    files = {
        "cpu-2-cores": report.lines,
        "llama-70b": report.sharding_lines,
        "compare": compare_lines,
        "spikes": spikes_lines,
    }
    for name, lines in files.items():
        print(f"{name}.json", *lines(read(name)), sep="\n", end="\n\n")
    for results in compiled():
        print(results["target"], *compiled_lines(results), sep="\n")
        for lines in compiled_long_lines(results).values():
            print(*lines, sep="\n")
    print("Cycles", *cycles_lines(compiled()), sep="\n")


if __name__ == "__main__":
    main()
