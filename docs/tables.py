"""The rows of the documentation's tables that come from files of results.

``python -m docs.tables`` prints them, to paste after a benchmark has run.
``tests/test_docs.py`` compares them with what the pages say.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from benchmarks.accelerators import cost, summary
from benchmarks.cases import EVERY, PEERS

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Build times are compared where one run built for all contenders.
BUILT_TOGETHER = ("H100",)
Row = dict[str, Any]


def read(name: str) -> dict[str, Any]:
    """The results in one file, of a benchmark or of a study."""
    paths = (folder / f"{name}.json" for folder in (RESULTS, ROOT / "studies/results"))
    return next(json.loads(path.read_text()) for path in paths if path.exists())


def measured_lines(results: dict[str, Any]) -> list[str]:
    """One line for each case that both clips were timed in: for benchmarks/README."""
    found = []
    for name, rows in programs(results).items():
        # Neither how cost grows, nor the norm beside one that is not Optax's.
        if "optax" in rows and not name.startswith(("parameters", "leaves")):
            found.append(_measured(name, rows))
            if "leaves of 1,000" in name:
                found.append(_built(name, rows))
    return found


def every_clip_lines(results: dict[str, Any]) -> list[str]:
    """One line for each step in which an adaptive threshold was timed too."""
    whose, lines = ("ours", "z-score", "skip"), []
    for name, rows in programs(results).items():
        if "z-score" in rows:
            found = [rows.get(who) for who in whose]
            memory = [_memory(row) for row in found if row]
            lines.append(_line([name, *map(_time, found), " / ".join(memory)]))
    return lines


def compiled() -> dict[str, dict[str, Any]]:
    """The results for each accelerator that has been compiled for."""
    files = sorted(RESULTS.glob("compiled-*.json"))
    found = [json.loads(path.read_text()) for path in files]
    return {results["target"]: results for results in found}


def programs(results: dict[str, Any]) -> dict[str, dict[str, Row]]:
    """Of each program the row of each contender."""
    found: dict[str, dict[str, Row]] = {}
    for row in results["rows"]:
        program = f"{row['case']}, {row['dtype']}"
        found.setdefault(program, {})[row["contender"]] = row
    return found


def ratio_lines(compiled: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each program: our cost to the better peer's, by target and dtype."""
    ratios: dict[str, dict[str, list[str]]] = {}
    for target, results in compiled.items():
        for rows in programs(results).values():
            ours = rows["ours"]
            ratio = cost(ours) / min(cost(rows[who]) for who in PEERS)
            cells = ratios.setdefault(ours["case"], {}).setdefault(target, [])
            cells.append(f"{ratio:.2f}")
    return [
        _line([name, *(" / ".join(cells.get(target, ["–"])) for target in compiled)])
        for name, cells in ratios.items()
    ]


def summary_lines(compiled: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each pair of clips: the geometric mean and the worst, by target."""
    lines: dict[str, dict[str, str]] = {}
    for target, results in compiled.items():
        for found in summary(results["rows"]):
            together = target in BUILT_TOGETHER or "build" not in found["what"]
            if together and found["group"].endswith(("device", "devices")):
                line = lines.setdefault(f"{found['group']}, {found['what']}", {})
                line[target] = f"{found['mean']:.2f} ({found['worst']:.2f})"
    return [
        _line([name, *(cells.get(target, "–") for target in compiled)])
        for name, cells in lines.items()
    ]


def detail_lines(compiled: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each program of which every clip, or 70B on a mesh, is compiled."""
    lines = []
    for target, results in compiled.items():
        for name, rows in programs(results).items():
            if "skip" in rows or "70B" in name:
                title = f"{target}: {name.removeprefix('added to ')}"
                lines.append(_line([title, *(_cell(rows.get(who)) for who in EVERY)]))
    return lines


def compare_lines(results: dict[str, Any]) -> list[str]:
    """One line for each case in which Optax's clip and ours differ."""
    return [_line([row["case"], row["optax"], row["ours"]]) for row in results["rows"]]


def _measured(name: str, rows: dict[str, Row]) -> str:
    ours = rows["ours"]
    low, high = ours["ratio_quartiles"]
    least = min(row["added_milliseconds"] or 0 for row in rows.values())
    noise = high - low > 0.5 or least < 0
    whose = ("one read", "by hand", "optax", "ours")
    times = ["–" if noise else _time(rows.get(who)) for who in whose]
    both = " → ".join(_memory(rows[who]) for who in ("optax", "ours"))
    ratio = "noise" if noise else f"{ours['ratio']:.2f}"
    return _line([name, *times, f"{ratio} ({low:.2f} to {high:.2f})", both])


def _built(name: str, rows: dict[str, Row]) -> str:
    seconds = [rows[who]["build_seconds"] for who in ("by hand", "optax", "ours")]
    times = (f"{s:.3g} s" for s in seconds)
    ratio = f"{seconds[2] / seconds[1]:.2f}"
    return _line([f"{name}: to build", "", *times, ratio, ""])


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    added = row["added_milliseconds"]
    return f"{row['milliseconds'] if added is None else added:.3g} ms"


def _memory(row: Row) -> str:
    megabytes = row["temporary_mb"]
    return "–" if megabytes is None else f"{megabytes:.3g} MB"


def _cell(row: Row | None) -> str:
    """GB, temporary MB; then million cycles as the compiler estimates, or kernels."""
    if row is None:
        return "–"
    cycles = row["cycles"]
    work = f"{row['kernels']:,}" if cycles is None else f"{cycles / 1e6:.3g}"
    return f"{row['hbm_gb']:.3g}; {row['temporary_mb']:.3g}; {work}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints every table's rows under the name of their file."""
    print("compare.json", *compare_lines(read("compare")), sep="\n", end="\n\n")
    cpu = read("cpu-2-cores")
    print("cpu-2-cores.json", *measured_lines(cpu), sep="\n", end="\n\n")
    print(*every_clip_lines(cpu), sep="\n", end="\n\n")
    for lines in (summary_lines, ratio_lines, detail_lines):
        print(*lines(compiled()), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
