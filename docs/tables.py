"""The rows of the documentation's tables that come from files of results.

``python -m docs.tables`` prints them all, to paste after a benchmark has run.
``tests/test_docs.py`` compares them with what the pages say.
"""

import json
import pathlib
from typing import Any

from benchmarks import accelerators
from studies import spikes

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]

PEERS = ("optax", "by hand")
TPUS = ("TPU v5e", "TPU v5p", "TPU v6e")
CONTENDERS = {
    "none": "no clip",
    "by hand": "by hand",
    "optax": "optax",
    "ours": "optax_globalclip",
    "z-score": "optax_globalclip, z-score",
    "skip": "skip_by_global_norm",
}
COLUMNS = list(CONTENDERS)[:4]


def read(name: str) -> dict[str, Any]:
    """The results in one file, of a benchmark or of a study."""
    folders = (RESULTS, ROOT / "studies" / "results")
    (path,) = (f / f"{name}.json" for f in folders if (f / f"{name}.json").exists())
    return json.loads(path.read_text())


def measured_lines(results: dict[str, Any]) -> list[str]:
    """One line for each case that both clips were timed in."""
    cases: dict[str, dict[str, Row]] = {}
    for row in results["rows"]:
        name = f"{row['case']}, {row['dtype']}"
        cases.setdefault(name, {})[row["contender"]] = row
    found = []
    for name, rows in cases.items():
        found.append(_measured(name, rows))
        if "leaves of 1,000" in name:
            found.append(_built(name, rows))
    return found


def _measured(name: str, rows: dict[str, Row]) -> str:
    ours = rows["ours"]
    times = [_time(rows.get(who)) for who in ("one read", "by hand", "optax", "ours")]
    low, high = ours["ratio_quartiles"]
    memory = [rows[who]["temporary_mb"] for who in ("optax", "ours")]
    both = "" if None in memory else " → ".join(f"{m:.3g}" for m in memory) + " MB"
    ratio = f"{ours['ratio']:.2f} ({low:.2f} to {high:.2f})"
    return _line([name, *times, ratio, both])


def _built(name: str, rows: dict[str, Row]) -> str:
    seconds = [rows[who]["build_seconds"] for who in ("by hand", "optax", "ours")]
    times = (f"{s:.3g} s" for s in seconds)
    return _line(
        [f"{name}: to build", "", *times, f"{seconds[2] / seconds[1]:.2f}", ""]
    )


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    added = row["added_milliseconds"]
    return f"{row['milliseconds'] if added is None else added:.3g} ms"


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
        _line([name, *(cells.get(who, "–") for who in COLUMNS)])
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


def summary_lines(results: dict[str, Any]) -> list[str]:
    """What the programs of one target come to: geometric means, and the worst."""
    return [
        _line([results["target"], *map(str, line.values())])
        for line in accelerators.summary(results["rows"])
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
        "cpu-2-cores": measured_lines,
        "compare": compare_lines,
        "spikes": spikes_lines,
    }
    for name, lines in files.items():
        print(f"{name}.json", *lines(read(name)), sep="\n", end="\n\n")
    for results in compiled():
        print(results["target"], *compiled_lines(results), sep="\n")
        print(*summary_lines(results), sep="\n")
        for lines in compiled_long_lines(results).values():
            print(*lines, sep="\n")
    print("Cycles", *cycles_lines(compiled()), sep="\n")


if __name__ == "__main__":
    main()
