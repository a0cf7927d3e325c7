"""The files of results: where they are, how they are resumed, and what made them."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import rich.console
import rich.markup
import rich.table

import optax_globalclip

Row = dict[str, Any]

FOLDER = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "optax", "libtpu", "jax-cuda12-plugin")


def parser(
    command: str, description: str | None, folder: pathlib.Path = FOLDER
) -> argparse.ArgumentParser:
    """Of ``python -m <command>``; shows the docstring as it is."""
    found = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--out", type=pathlib.Path, default=folder, metavar="DIR")
    return found


def console(width: int = 150) -> rich.console.Console:
    """Wide enough for a table where the output is no terminal."""
    return rich.console.Console(width=None if sys.stdout.isatty() else width)


def table(
    rows: Iterable[Row], title: str = "", fields: Sequence[str] = ()
) -> rich.table.Table:
    """One line for each row, a column for each field that any row has a value in."""
    rows = list(rows)
    fields = fields or list(dict.fromkeys(field for row in rows for field in row))
    shown = [field for field in fields if any(row.get(field) for row in rows)]
    printed = rich.table.Table(*(f.replace("_", " ") for f in shown), title=title)
    for row in rows:
        printed.add_row(*(_cell(row.get(field)) for field in shown))
    return printed


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    if isinstance(value, float | int):
        return f"{value:,}"
    return rich.markup.escape(value or "")


def read(path: pathlib.Path) -> dict[str, Any]:
    """What was written; nothing if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(results: dict[str, Any], path: pathlib.Path) -> None:
    """Writes the results as JSON, in a directory that need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def rows(path: pathlib.Path, setting: dict[str, Any]) -> list[Row]:
    """The rows that were written in this setting; none if the setting was another."""
    found = read(path)
    same = all(found.get(name) == value for name, value in setting.items())
    return found["rows"] if found and same else []


def versions() -> dict[str, str]:
    """Of everything that was measured, and of what compiled it."""
    found = {"optax_globalclip": optax_globalclip.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source() -> str:
    """Identifies the code of the package, whose version seldom changes."""
    folder = pathlib.Path(optax_globalclip.__file__).parent
    texts = b"".join(path.read_bytes() for path in sorted(folder.glob("_[a-z]*.py")))
    return hashlib.sha256(texts).hexdigest()[:12]


def machine() -> str:
    """The machine in words."""
    device = jax.devices()[0]
    kind = "CPU" if device.platform == "cpu" else device.device_kind
    return f"{kind}, {os.cpu_count()} cores"


def slug() -> str:
    """The machine as the name of a file."""
    return machine().lower().replace(",", "").replace(" ", "-")
