"""What the commands share: how they are called, and how they write their results."""

import argparse
import json
import pathlib
from typing import Any


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.<name>``; shows the docstring as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def write(results: dict[str, Any], path: pathlib.Path) -> None:
    """Writes the results as JSON, in a directory that need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
