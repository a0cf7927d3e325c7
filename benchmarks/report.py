"""The rows of the tables in the documents, from the results of one machine."""

from typing import Any

HEADER = (
    "| case | one read | by hand | optax | optax_globalclip | ratio to optax "
    "| temporary memory |"
)

Row = dict[str, Any]


def lines(results: dict[str, Any]) -> list[str]:
    """One line of markdown for each case that both clips were timed in."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results["rows"]:
        key = (row["case"], row["dtype"])
        cases.setdefault(key, {})[row["contender"]] = row
    found = []
    for (case, dtype), rows in cases.items():
        # Not how cost grows, nor the norm beside one that is not Optax's.
        if "optax" not in rows or case.startswith(("parameters", "leaves")):
            continue
        name = f"{case}, {dtype}"
        found.append(_line(name, rows))
        if case.endswith("leaves of 1,000"):
            found.append(_build_line(name, rows))
    return found


def _line(name: str, rows: dict[str, Row]) -> str:
    ours = rows["ours"]
    theirs = rows[ours["ratio_to"]]
    times = [rows.get("one read"), rows.get("by hand"), theirs, ours]
    low, high = ours["ratio_quartiles"]
    memory = [row["temporary_mb"] for row in (theirs, ours)]
    both = "" if None in memory else " → ".join(f"{m:.3g}" for m in memory) + " MB"
    ratio = f"{ours['ratio']:.2f} ({low:.2f} to {high:.2f})"
    return _cells(name, *map(_milliseconds, times), ratio, both)


def _build_line(name: str, rows: dict[str, Row]) -> str:
    seconds = [rows[who]["build_seconds"] for who in ("by hand", "optax", "ours")]
    times = (f"{s:.3g} s" for s in seconds)
    ratio = f"{seconds[2] / seconds[1]:.2f}"
    return _cells(f"{name}: to build", "", *times, ratio, "")


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    added = row["added_milliseconds"]
    return f"{row['milliseconds'] if added is None else added:.3g} ms"


def sharding_lines(results: dict[str, Any]) -> list[str]:
    """One line of markdown for each program that was compiled with both clips."""
    programs: dict[tuple, dict[str, dict]] = {}
    for row in results["rows"]:
        key = (row["devices"], row["mode"], row["what"])
        programs.setdefault(key, {})[row["clip"]] = row
    found = []
    for key, rows in programs.items():
        theirs, ours = rows["optax"], rows["ours"]
        cells = [
            f"{theirs['all_reduces']} → {ours['all_reduces']}",
            f"{theirs['temporary_mb']:,} → {ours['temporary_mb']:,} MB",
            f"{theirs['build_seconds']} → {ours['build_seconds']} s",
        ]
        found.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return found
