"""What clipping costs: ``python -m benchmarks`` on any machine.

Prints a table, and writes it to ``results/``, under the machine's name. Each case is
written when it is done. If the command is started again, it measures only what is
missing, unless the library or a version has changed.
"""

import functools
from typing import Any

import rich.progress

from . import cases, measured, results


def main(arguments: list[str] | None = None) -> None:
    """Measures every case in turn, prints the table, writes JSON."""
    parser = results.parser("benchmarks", __doc__)
    parser.add_argument("--quick", action="store_true", help="in about two minutes")
    parser.add_argument("--gpu", action="store_true", help="eight minutes of a GPU")
    parser.add_argument("--small", action="store_true", help="tries --gpu on a CPU")
    parser.add_argument("--only", metavar="NAME", default="", help="cases; only prints")
    args = parser.parse_args(arguments)
    todo = {name: run for name, run in plan(args).items() if args.only in name}
    if not todo:
        parser.error(f"no case has {args.only!r} in its name")

    path = args.out / f"{results.slug()}.json"
    flags = [name for name in ("quick", "gpu", "small", "only") if getattr(args, name)]
    setting: dict[str, Any] = {
        "machine": results.machine(),
        "plan": " ".join(flags),
        "versions": results.versions(),
        "source": results.source(),
    }
    rows = [] if args.only else results.rows(path, setting)
    console = results.console()
    with rich.progress.Progress(console=console) as progress:
        task = progress.add_task("Cases", total=len(todo))
        for name, run in todo.items():
            progress.update(task, description=name)
            if name not in {f"{row['case']}, {row['dtype']}" for row in rows}:
                rows += run(progress)
                if not args.only:
                    results.write(setting | {"rows": rows}, path)
            progress.advance(task)
    console.print(results.table(rows))
    if not args.only:
        console.print(f"Written to {path}; python -m benchmarks.figures draws it.")


def plan(args: Any) -> dict[str, Any]:
    """The cases to run, by name."""
    found = cases.measured(quick=args.quick)
    if args.gpu:
        found = cases.measured_on_gpu(small=args.small)
    rounds = 5 if args.quick or args.small else 9
    todo = {str(c): functools.partial(measured.rows_of, c, rounds) for c in found}
    todo["outside jit, 148 leaves, float32"] = functools.partial(
        measured.outside_jit, rounds
    )
    return todo


if __name__ == "__main__":
    main()
