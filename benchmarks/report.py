"""The rows of the tables in the documents, from the results of one machine."""

from typing import Any

HEADER = "| case | optax | optax_globalclip | ratio | floor | temporary memory |"


def lines(results: dict[str, Any]) -> list[str]:
    """One line of markdown for each case that both clips were timed in."""
    pairs: dict[tuple[str, str], dict[str, dict]] = {}
    for row in results["rows"]:
        key = (row["case"], row["dtype"])
        pairs.setdefault(key, {})[row["contender"]] = row
    found = []
    for (case, dtype), rows in pairs.items():
        if case.startswith(("parameters", "leaves")):  # What the figure shows.
            continue
        name = f"{case}, {dtype}"
        theirs = rows[rows["ours"]["ratio_to"]]
        found.append(_line(name, theirs, rows["ours"], rows.get("floor")))
        if case.endswith("leaves of 1,000"):
            found.append(_build_line(name, theirs, rows["ours"]))
    return found


def _line(
    name: str,
    theirs: dict[str, Any],
    ours: dict[str, Any],
    floor: dict[str, Any] | None,
) -> str:
    times = [_milliseconds(row) for row in (theirs, ours)]
    memory = [row["temporary_mb"] for row in (theirs, ours)]
    both = "" if None in memory else " → ".join(f"{m:.3g}" for m in memory) + " MB"
    least = "" if floor is None else _milliseconds(floor)
    cells = (name, *times, f"{ours['ratio']:.2f}", least, both)
    return "| " + " | ".join(cells) + " |"


def _milliseconds(row: dict[str, Any]) -> str:
    added = row["added_milliseconds"]
    return f"{row['milliseconds'] if added is None else added:.3g} ms"


def _build_line(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    seconds = [row["build_seconds"] for row in (theirs, ours)]
    ratio = seconds[1] / seconds[0]
    times = " | ".join(f"{s:.3g} s" for s in seconds)
    return f"| {name}: to build | {times} | {ratio:.2f} | | |"


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
