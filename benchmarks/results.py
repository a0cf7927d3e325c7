"""The files of results: where they are, how they are resumed, and what made them."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

import jax
import rich.console

import optax_globalclip

Row = dict[str, Any]

FOLDER = pathlib.Path(__file__).parent / "results"
PACKAGES = ("jax", "optax", "torch", "tensorflow_cpu", "libtpu", "jax-cuda12-plugin")


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
    device = jax.devices()[0]
    kind = machine() if device.platform == "cpu" else device.device_kind
    return kind.lower().replace(",", "").replace(" ", "-")
