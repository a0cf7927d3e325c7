"""What clipping costs: ``python -m benchmarks`` on any machine.

Prints a table, and writes it with a figure to ``results/``, under the machine's name.
"""

import argparse
import functools
import importlib.metadata
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import rich.console
import rich.progress
import rich.table

from . import cases, command, figure
from .trees import gpt2_small_shapes

RESULTS = pathlib.Path(__file__).parent / "results"

PARAMETERS = [10**5, 10**6, 10**7, 10**8, 3 * 10**8, 10**9]

# An AdamW step holds parameters, gradients and two moments; optax's clip a copy more.
BYTES_PER_PARAMETER = 5 * 4


def main() -> None:
    """Measures every case in turn, prints the table, writes JSON and figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in under two minutes")
    parser.add_argument(
        "--only", metavar="NAME", help="cases with this in their names; only prints"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    # Wide enough for the table where the output is no terminal.
    console = rich.console.Console(width=None if sys.stdout.isatty() else 150)
    todo = plan(quick=args.quick, only=args.only or "")
    if not todo:
        parser.error(f"no case has {args.only!r} in its name")
    with rich.progress.Progress(console=console) as progress:
        task = progress.add_task("Cases", total=len(todo))
        for name, case in todo.items():
            progress.update(task, description=name)
            rows += case(progress)
            progress.advance(task)

    console.print(table(rows))
    if args.only:
        return
    results = {"machine": machine(), "versions": versions(), "rows": rows}
    stem = args.out / slug()
    command.write(results, stem.with_suffix(".json"))
    figure.draw(results, stem.with_suffix(".png"))
    console.print(f"Written to {stem}.json and {stem}.png")


def plan(
    *, quick: bool, only: str = ""
) -> dict[str, Callable[[rich.progress.Progress], cases.Rows]]:
    """The cases to run, by the names that the progress bar shows.

    Args:
      quick: whether to leave out what takes long.
      only: what their names must hold.
    """
    rounds = 5 if quick else 9
    dtypes = ["float32", "bfloat16"] if quick else ["float32", "bfloat16", "float16"]
    optimizers = ["AdamW"] if quick else list(cases.OPTIMIZERS)
    todo: dict[str, Callable] = {}
    for dtype in dtypes:
        for optimizer in optimizers:
            todo[f"{optimizer}, {dtype}"] = functools.partial(
                cases.added_to_step, optimizer, gpt2_small_shapes(), dtype, rounds
            )
    for dtype in dtypes:
        todo[f"alone, {dtype}"] = functools.partial(
            cases.alone, "clip alone, one leaf of 2^26", (2**26,), dtype, rounds
        )
    count = 500 if quick else 2000
    todo["many leaves"] = functools.partial(cases.many_leaves, count, "float32", rounds)
    todo["ResNet-50"] = functools.partial(cases.resnet50, "float32", rounds)
    todo["outside jit"] = functools.partial(cases.outside_jit, "float32", rounds)
    todo["rescue"] = functools.partial(
        cases.rescue_not_taken, 2**26, "float32", 2 * rounds
    )
    sizes = [10**5, 10**6, 10**7] if quick else _fitting(PARAMETERS)
    counts = [10, 30, 100, 300] if quick else [10, 30, 100, 300, 1000, 2000, 5000]
    todo["growth with parameters"] = functools.partial(
        cases.against_parameters, sizes, rounds
    )
    todo["growth with leaves"] = functools.partial(cases.against_leaves, counts)
    return {name: case for name, case in todo.items() if only in name}


def _fitting(sizes: list[int]) -> list[int]:
    """The sizes whose step fits in four fifths of the memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = stats.get("bytes_limit", host)
    return [size for size in sizes if size * BYTES_PER_PARAMETER < 0.8 * memory]


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
    """What is printed: one line for each row, blank where nothing was measured."""
    headings = {
        "case": "case",
        "dtype": "dtype",
        "contender": "contender",
        "milliseconds": "ms",
        "added_milliseconds": "added ms",
        "ratio": "ratio",
        "ratio_quartiles": "quartiles",
        "temporary_mb": "temporary MB",
        "build_seconds": "build s",
        "share_of_copy_bandwidth": "of a copy's bandwidth",
    }
    printed = rich.table.Table(*headings.values())
    for row in rows:
        printed.add_row(*(_cell(row.get(field)) for field in headings))
    return printed


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(str, value))
    return "" if value is None else str(value)


def machine() -> str:
    """The machine in words."""
    device = jax.devices()[0]
    cores = f"{os.cpu_count()} cores"
    return (
        f"CPU, {cores}"
        if device.platform == "cpu"
        else f"{device.device_kind}, {cores}"
    )


def slug() -> str:
    """The machine as the name of a file."""
    device = jax.devices()[0]
    kind = machine() if device.platform == "cpu" else device.device_kind
    return kind.lower().replace(",", "").replace(" ", "-")


def versions() -> dict[str, str]:
    """Of everything that was timed."""
    names = ("jax", "optax", "optax_globalclip", "torch", "tensorflow_cpu")
    installed = importlib.metadata.packages_distributions().values()
    present = {name for names in installed for name in names}
    return {
        name: importlib.metadata.version(name)
        for name in names
        if name in present or name.replace("_", "-") in present
    }


if __name__ == "__main__":
    main()
