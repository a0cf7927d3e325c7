"""Mutation testing: how many single changes to the package do the tests catch?

    pip install -e '.[mutation]' && python -m benchmarks.mutants

draws a sample of the mutants that Cosmic Ray makes, runs the tests on each, and writes
what it found to ``benchmarks/results/mutants-0.json``, 0 being the seed.
``benchmarks/mutants.md`` says of each known survivor why no test could tell it from the
original. A survivor that is not listed there is an error. The settings are in
``pyproject.toml``.
"""

import argparse
import ast
import concurrent.futures
import datetime
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from typing import Any

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec
from rich.progress import track

ROOT = pathlib.Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
REASONS = ROOT / "benchmarks/mutants.md"
TIMEOUT_S = 3600


def all_mutants() -> list[MutationSpec]:
    """Every mutant of the package, but for those of its type annotations."""
    os.chdir(ROOT)
    modules = sorted(pathlib.Path(SETTINGS["package"]).glob("*.py"))
    modules = [path for path in modules if path.name not in SETTINGS["exclude-modules"]]
    with use_db(":memory:", WorkDB.Mode.create) as database:
        init(modules, database, {})
        drawn = [item.mutations[0] for item in database.work_items]
    annotated = {str(path): set(annotated_lines(path)) for path in modules}
    return [
        mutant
        for mutant in drawn
        if "BitOr" not in mutant.operator_name
        or mutant.start_pos[0] not in annotated[str(mutant.module_path)]
    ]


def annotated_lines(path: pathlib.Path) -> Iterator[int]:
    """The lines of signatures and fields, in which ``|`` joins types."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("annotation", "returns"):
            if annotation := getattr(node, field, None):
                yield from range(annotation.lineno, annotation.end_lineno + 1)


def copy_of_the_tree(cache: str) -> None:
    """Moves this process into a copy, because a mutant is a change of a file."""
    copy = pathlib.Path(tempfile.mkdtemp()) / "tree"
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in tracked.strip("\0").split("\0"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    os.chdir(copy)
    # Not the installed package; no cases that another run would not draw; no program
    # compiled that was compiled for another mutant.
    os.environ |= {
        "PYTHONPATH": str(copy),
        "CI": "true",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def outcome(mutant: MutationSpec) -> dict[str, Any]:
    """Runs the default tests on a mutant, those of its own module first.

    On one that survives, all rows of the tables and what hypothesis draws for those.
    """
    module = pathlib.Path(mutant.module_path).stem
    own = " ".join(f"tests/{name}.py" for name in SETTINGS["first"].get(module, []))
    pytest = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {own}"
    command = f"{pytest} tests {SETTINGS['package']} && {pytest} -m 'slow or drawn'"
    result = mutate_and_test([mutant], shlex.join(["sh", "-c", command]), TIMEOUT_S)
    test = re.search(r"^(?:FAILED|ERROR) (\S+)", result.output or "", re.MULTILINE)
    return {
        "module": str(mutant.module_path),
        "line": mutant.start_pos[0],
        "operator": mutant.operator_name.removeprefix("core/"),
        "change": changed_lines(result.diff or ""),
        "outcome": result.test_outcome.value if result.test_outcome else "none",
        "killed_by": test[1] if test else None,
    }


def changed_lines(diff: str) -> list[str]:
    """The lines that a mutation takes away and adds."""
    lines = diff.splitlines()
    return [x for x in lines if re.match(r"[-+](?![-+])", x) and x.strip("+- ")]


def equivalent(page: str) -> list[str]:
    """What the changed lines hold of the mutants that no test could kill."""
    cells = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    return [cell.replace(r"\|", "|") for cell in cells]


def is_known(change: list[str], known: list[str]) -> bool:
    """Whether the mutation adds one of these texts, and takes none away."""
    added = "\n".join(line for line in change if line.startswith("+"))
    removed = "\n".join(line for line in change if line.startswith("-"))
    return any(text in added and text not in removed for text in known)


def report_of(found: list[dict[str, Any]], mutants: int, seed: int) -> dict[str, Any]:
    """What became of those that were run so far."""
    survivors = [mutant for mutant in found if mutant["outcome"] != "killed"]
    return {
        "date": datetime.date.today().isoformat(),
        "mutants": mutants,
        "run": len(found),
        "seed": seed,
        "killed": len(found) - len(survivors),
        "survivors": survivors,
        "killed_by": sorted({m["killed_by"] for m in found if m["killed_by"]}),
    }


def main() -> None:
    """Draws, runs, and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=SETTINGS["sample"])
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    mutants = all_mutants()
    drawn = random.Random(args.seed).sample(mutants, min(args.sample, len(mutants)))
    found: list[dict[str, Any]] = []
    report = report_of(found, len(mutants), args.seed)
    results = ROOT / f"benchmarks/results/mutants-{args.seed}.json"
    pool = concurrent.futures.ProcessPoolExecutor(
        args.processes, initializer=copy_of_the_tree, initargs=(tempfile.mkdtemp(),)
    )
    with pool:
        running = [pool.submit(outcome, mutant) for mutant in drawn]
        done = concurrent.futures.as_completed(running)
        for future in track(done, f"{len(drawn)} of {len(mutants)}", len(drawn)):
            found.append(future.result())
            # Each time, as the whole may take longer than one can wait.
            report = report_of(found, len(mutants), args.seed)
            results.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['killed']} of {report['run']} killed; written to {results.name}.")
    known = equivalent(REASONS.read_text())
    unknown = [m for m in report["survivors"] if not is_known(m["change"], known)]
    if unknown:
        sys.exit(f"{len(unknown)} of the survivors are not in {REASONS.name}.")


if __name__ == "__main__":
    main()
