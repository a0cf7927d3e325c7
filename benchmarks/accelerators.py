"""What the clip adds on TPUs and GPUs: ``python -m benchmarks.accelerators``.

Compiles every case for each accelerator whose compiler is installed, and counts what is
in the final programs. None of them needs to be there: all of this is COMPILED, and
NOTHING IS MEASURED. The compilers for TPUs and GPUs need an environment each:

    pip install -e '.[demo,tpu]' && python -m benchmarks.accelerators
    pip install -e '.[demo]' 'jax[cuda12]' && python -m benchmarks.accelerators

Each row is written to results/compiled-<target>.json when it is done. If the command is
started again, it compiles only what is missing. Rows of this library are missing if its
code has changed, and all rows if a version has. To try one form of the clip:

    python -m benchmarks.accelerators --targets v5e --cases decoder --contenders ours
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.progress
from jax.sharding import NamedSharding, PartitionSpec as P

from . import cases, results
from .cases import PEERS, Case
from .results import Row
from .targets import TARGETS, Compiled, Target, available

NOT_MEASURED = "Compiled, not measured"
# A GPU's compiler estimates no cycles: the time of its memory traffic and its kernels.
BYTES_PER_SECOND, SECONDS_PER_KERNEL = 3.35e12, 2e-6


def main(arguments: list[str] | None = None) -> None:
    """Compiles every program, writes it, and prints the tables."""
    parser = results.parser("benchmarks.accelerators", __doc__)
    parser.add_argument("--cases", default="", metavar="NAME", help="a part of theirs")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS))
    parser.add_argument("--contenders", nargs="+", choices=cases.EVERY)
    parser.add_argument("--anew", action="store_true", help="also what is not missing")
    args = parser.parse_args(arguments)
    # Constants are arrays too, and may not be put on the accelerator.
    jax.config.update("jax_platforms", "cpu")
    console = results.console()
    if not (names := args.targets or list(available())):
        parser.error("Install a compiler: " + TARGETS["v5e"].install)
    for target in (TARGETS[name] for name in names):
        path = args.out / f"compiled-{target.name}.json"
        plan = cases.compiled(target.name)
        chosen = [
            (case, contender)
            for case in plan
            for contender in case.contenders
            if args.cases in str(case)
            and contender in (args.contenders or case.contenders)
        ]
        rows = run(target, plan, chosen, path, anew=args.anew, console=console)
        title = f"{target.title}: {NOT_MEASURED.lower()}"
        console.print(results.table(map(shown, rows), title))
        console.print(results.table(summary(rows), title))
        console.print(f"{NOT_MEASURED}. Written to {path}")


def run(
    target: Target,
    plan: list[Case],
    chosen: list[tuple[Case, str]],
    path: Any,
    *,
    anew: bool,
    console: Any,
) -> list[Row]:
    """Compiles what is missing of the chosen programs; returns the rows of all these.

    The file keeps the rows of other programs of the plan.
    """
    setting = {"target": target.title, "what": NOT_MEASURED}
    setting |= {"versions": results.versions()}
    old = {key_of(row): row for row in results.rows(path, setting)}
    keys = {(c.name, c.dtype, who): (c, who) for c in plan for who in c.contenders}
    found = {key: old[key] for key in keys if key in old}
    wanted = [(case.name, case.dtype, contender) for case, contender in chosen]
    missing = [key for key in wanted if anew or not _is_fresh(found.get(key))]
    _warm_up(target)
    with rich.progress.Progress(console=console) as progress:
        task = progress.add_task(target.title, total=len(missing))
        for key in missing:
            progress.update(task, description=f"{target.title}: {', '.join(key)}")
            found[key] = row(*keys[key], compiled(target, *keys[key]))
            in_order = [found[key] for key in keys if key in found]
            results.write(setting | {"rows": in_order}, path)
            progress.advance(task)
    return [found[key] for key in wanted]


def key_of(row: Row) -> tuple[str, str, str]:
    """What tells the row from others in its file."""
    return row["case"], row["dtype"], row["contender"]


def _is_fresh(row: Row | None) -> bool:
    return row is not None and row.get("source") == _source(row["contender"])


def _source(contender: str) -> str | None:
    """Of the code that the contender runs, where that is ours."""
    return None if contender in ("none", *PEERS) else results.source()


def _warm_up(target: Target) -> None:
    """A compiler's first program takes longer to build."""
    target.compile(jnp.sin, target.place(jax.ShapeDtypeStruct((8,), jnp.float32)))


def compiled(target: Target, case: Case, contender: str) -> Compiled:
    """The case's step with the contender's clip, compiled for the target."""
    tx = case.transformation(contender)
    state = jax.eval_shape(tx.init, case.params)
    step, donate = case.step(tx), case.donated
    if case.mesh is None:
        arguments = target.place((case.params, state, case.data))
        return target.compile(step, *arguments, donate=donate)
    axes, specs, split = case.mesh.axes, case.mesh.specs, case.mesh.data
    types = (cases.MODES[case.mesh.mode],) * len(axes)
    mesh = target.mesh(tuple(axes.values()), tuple(axes), types)

    def on_mesh(tree: Any, specs: Any) -> Any:
        def place(leaf: Any, spec: P) -> Any:
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place, tree, specs)

    # Moments lie where the parameters do.
    state_specs = optax.tree.map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    kept = on_mesh(case.params, specs), on_mesh(state, state_specs)
    data = on_mesh(case.data, jax.tree.map(lambda _: split, case.data))
    out = jax.tree.map(lambda leaf: leaf.sharding, kept)
    with jax.set_mesh(mesh):
        return target.compile(step, *kept, data, donate=donate, out_shardings=out)


# --- The results.


def row(case: Case, contender: str, compiled: Compiled) -> Row:
    """What was found in one program."""
    program = compiled.program
    return {
        "case": case.name,
        "dtype": case.dtype,
        "contender": contender,
        "source": _source(contender),
        "hbm_gb": round(program.hbm_bytes / 1e9, 4),
        "kernels": program.kernels,
        "cycles": program.cycles,
        "conditionals": program.conditionals,
        "whiles": program.whiles,
        "collectives": [each._asdict() for each in program.collectives],
        "temporary_mb": round(compiled.temporary_bytes / 1e6, 2),
        "build_seconds": round(compiled.build_seconds, 2),
    }


def shown(row: Row) -> Row:
    """The row as it is printed."""
    return row | {"source": None, "collectives": exchanged(row["collectives"])}


def exchanged(collectives: list[dict[str, Any]]) -> str:
    """Such as "2 all-reduce (6)": how many, and of how many numbers together."""
    numbers: dict[str, list[int]] = {}
    for each in collectives:
        numbers.setdefault(each["kind"], []).append(each["numbers"])
    return ", ".join(f"{len(n)} {kind} ({sum(n)})" for kind, n in numbers.items())


# --- What they come to.


def cost(row: Row) -> float:
    """A TPU's cycles; the seconds of a GPU's memory traffic and kernels."""
    if row["cycles"] is not None:
        return row["cycles"]
    seconds = row["hbm_gb"] * 1e9 / BYTES_PER_SECOND
    return seconds + row["kernels"] * SECONDS_PER_KERNEL


def group_of(case: str) -> str:
    """Which cases are summed up together."""
    if not case.startswith("step of "):
        return case
    return "eight devices" if "," in case else "one device"


def summary(rows: list[Row]) -> list[Row]:
    """For each group of cases and pair of contenders: geometric mean, and the worst."""
    found = {key_of(row): row for row in rows}
    groups: dict[str, list[tuple[str, str]]] = {}
    for case, dtype in dict.fromkeys(key[:2] for key in found):
        groups.setdefault(group_of(case), []).append((case, dtype))
    pairs = [("cost", "ours", peer) for peer in PEERS]
    pairs += [("cost", who, "none") for who in cases.EVERY[1:]]
    pairs += [("build", "ours", "optax")]
    lines = []
    for (group, programs), pair in itertools.product(groups.items(), pairs):
        if ratios := dict(_ratios(found, programs, *pair)):
            worst = max(ratios, key=lambda program: ratios[program])
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            lines.append(
                {
                    "group": group,
                    "what": f"{pair[0]}: {pair[1]} to {pair[2]}",
                    "programs": len(ratios),
                    "mean": round(mean, 4),
                    "worst": round(ratios[worst], 4),
                    "worst_in": ", ".join(worst),
                }
            )
    return lines


def _ratios(
    found: dict[tuple[str, str, str], Row],
    programs: list[tuple[str, str]],
    what: str,
    contender: str,
    other: str,
) -> Iterator[tuple[tuple[str, str], float]]:
    value = cost if what == "cost" else lambda row: row["build_seconds"]
    for program in programs:
        own, its = (found.get((*program, who)) for who in (contender, other))
        if own and its:
            yield program, value(own) / value(its)


if __name__ == "__main__":
    main()
