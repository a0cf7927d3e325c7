"""What the clip adds on TPUs and GPUs: ``python -m benchmarks.accelerators``.

Compiles every case for each accelerator whose compiler is installed, and counts what is
in the final programs. None of them needs to be there: all of this is COMPILED, and
NOTHING IS MEASURED. The compilers for TPUs and GPUs need an environment each:

    pip install -e '.[demo,tpu]' && python -m benchmarks.accelerators
    pip install -e '.[demo]' 'jax[cuda12]' && python -m benchmarks.accelerators

Each run writes results/compiled-<target>.json, and the figure of all such files. A run
of some cases or contenders replaces their rows there, and keeps the others.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.progress
import rich.table

from . import cases, command, compiled_figure, dense, sharding, transformer
from .targets import TARGETS, Compiled, Target, available
from .trees import gpt2_small_shapes, resnet50_shapes

RESULTS = pathlib.Path(__file__).parent / "results"
NOT_MEASURED = "Compiled, not measured"
VERSIONS = ("jax", "optax", "optax_globalclip", "libtpu", "jax-cuda12-plugin")
MESH = (32, 8)
HEADINGS = (
    "case",
    "dtype",
    "contender",
    "HBM GB",
    "kernels",
    "million cycles",
    "control flow",
    "collectives",
    "temporary MB",
    "build s",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled with each clip.

    Attributes:
      name: what it is.
      dtype: of the gradients.
      program: compiles it for a target, with the clip of a contender.
      contenders: by name; "none" only where something remains without a clip.
    """

    name: str
    dtype: str
    program: Callable[[Target, str], Compiled]
    contenders: tuple[str, ...]

    def __str__(self) -> str:
        """As the progress bar shows it, and ``--cases`` selects it."""
        return f"{self.name}, {self.dtype}"

    def only(self, names: Sequence[str]) -> "Case":
        """The case with some of its contenders."""
        kept = tuple(name for name in self.contenders if name in names)
        return dataclasses.replace(self, contenders=kept)


def main(arguments: list[str] | None = None) -> None:
    """Compiles every program, prints the tables, and writes them with a figure."""
    args = _parser().parse_args(arguments)
    todo = [
        case.only(args.contenders or case.contenders)
        for case in plan(quick=args.quick)
        if args.cases in str(case)
    ]
    # Constants are arrays too, and may not be put on the accelerator.
    jax.config.update("jax_platforms", "cpu")
    console = rich.console.Console(width=None if sys.stdout.isatty() else 150)
    for target in _selected(args.targets):
        rows = run(target, todo, console)
        console.print(table(target, rows))
        path = args.out / f"compiled-{target.name}.json"
        command.write(merged(path, target, rows), path)
        console.print(f"{NOT_MEASURED}. Written to {path}")
    compiled_figure.draw(args.out)


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("accelerators", __doc__)
    parser.add_argument("--quick", action="store_true", help="AdamW in float32")
    parser.add_argument("--cases", default="", metavar="NAME", help="a part of theirs")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS))
    parser.add_argument("--contenders", nargs="+", choices=list(contenders()))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
    return parser


def _selected(names: list[str] | None) -> list[Target]:
    """The targets asked for, or all that there are compilers for."""
    selected = [TARGETS[name] for name in names or available()]
    missing = {each.install for each in selected if not each.is_available}
    if not selected:
        missing = {each.install for each in TARGETS.values()}
    if missing:
        sys.exit("No compiler for that. Install one: " + "; or ".join(sorted(missing)))
    return selected


# --- The cases.


def plan(*, quick: bool) -> list[Case]:
    """Those of ``python -m benchmarks``, whole training steps, and 70B parameters."""
    gpt2 = gpt2_small_shapes()
    dtypes = ("float32", "bfloat16", "float16")
    if quick:
        return [optimizer_step("AdamW", gpt2, dtype) for dtype in dtypes[:1]]
    return [
        *(optimizer_step(name, gpt2, d) for name in cases.OPTIMIZERS for d in dtypes),
        optimizer_step("AdamW", transformer.shapes(2), "float32", "two blocks"),
        gpt2_training_step(),
        *map(dense_training_step, (4, 2)),
        *(alone("clip alone, one leaf of 2^26", (2**26,), dtype) for dtype in dtypes),
        alone("2,000 leaves of 1,000", [(1000,)] * 2000, "float32", donate=False),
        alone("ResNet-50", resnet50_shapes(), "float32"),
        *(llama(mode) for mode in ("jit, auto", "jit, explicit")),
    ]


def optimizer_step(optimizer: str, shapes: Any, dtype: str, network: str = "") -> Case:
    """An optimizer's step, which updates parameters and state in place."""

    def program(target: Target, clip: str) -> Compiled:
        tx = optax.chain(contenders()[clip], cases.OPTIMIZERS[optimizer]())
        params = target.place(abstract(shapes, dtype))
        state = target.place(jax.eval_shape(tx.init, params))

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return target.compile(step, params, state, params, donate=(0, 1))

    name = f"added to {optimizer}" + (network and f", {network}")
    return Case(name, dtype, program, tuple(contenders()))


def gpt2_training_step() -> Case:
    """What a user of one device sees of the clip."""
    tokens = jax.ShapeDtypeStruct(transformer.BATCH, jnp.int32)
    shapes = transformer.shapes()
    return training_step("whole training step", transformer.loss_of, shapes, tokens)


def dense_training_step(layers: int) -> Case:
    """The same where gradients are matrix products, which a sum may fuse with."""
    batch = jax.ShapeDtypeStruct(dense.BATCH, jnp.bfloat16)
    name = f"dense network of {layers} layers, whole training step"
    return training_step(name, dense.loss_of, dense.shapes(layers), batch)


def training_step(
    name: str, loss_of: Callable[[Any, Any], jax.Array], shapes: Any, batch: Any
) -> Case:
    """Forward, backward, clip and AdamW, with parameters in float32."""

    def program(target: Target, clip: str) -> Compiled:
        tx = optax.chain(contenders()[clip], optax.adamw(1e-3))
        params = target.place(abstract(shapes, "float32"))
        state = target.place(jax.eval_shape(tx.init, params))

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        return target.compile(step, params, state, target.place(batch), donate=(0, 1))

    return Case(name, "float32", program, tuple(contenders()))


def alone(name: str, shapes: Any, dtype: str, *, donate: bool = True) -> Case:
    """The clip by itself, in place if ``donate``."""

    def program(target: Target, clip: str) -> Compiled:
        tx = contenders()[clip]
        updates = target.place(abstract(shapes, dtype))
        state = target.place(jax.eval_shape(tx.init, updates))
        donated = (0,) if donate else ()
        return target.compile(tx.update, updates, state, donate=donated)

    return Case(name, dtype, program, tuple(cases.clips()))


def llama(mode: str, layers: int = 80) -> Case:
    """The clip by itself for Llama 70B, on 256 devices."""

    def program(target: Target, clip: str) -> Compiled:
        mesh = target.mesh(MESH, ("fsdp", "model"), (sharding.MODES[mode],) * 2)
        step, arguments = sharding.step_on(mesh, mode, "clip", clip, layers)
        with jax.set_mesh(mesh):
            return target.compile(step, *arguments, donate=(0, 1))

    name = f"Llama 70B on 256 devices, {mode}"
    return Case(name, "bfloat16", program, tuple(cases.clips()))


def contenders() -> cases.Clips:
    """What is compared: no clip, and every clip."""
    return {"none": optax.identity(), **cases.clips()}


def abstract(shapes: Any, dtype: str) -> Any:
    """Leaves of those shapes, with no values."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


# --- The results.


def run(target: Target, todo: list[Case], console: rich.console.Console) -> cases.Rows:
    """Compiles all cases for one target."""
    rows = []
    _warm_up(target)
    with rich.progress.Progress(console=console) as progress:
        total = sum(len(case.contenders) for case in todo)
        task = progress.add_task(target.title, total=total)
        for case in todo:
            for clip in case.contenders:
                progress.update(task, description=f"{target.title}: {case}, {clip}")
                rows.append(row(case, clip, case.program(target, clip)))
                progress.advance(task)
    return rows


def _warm_up(target: Target) -> None:
    """A compiler's first program takes longer to build."""
    target.compile(jnp.sin, target.place(jax.ShapeDtypeStruct((8,), jnp.float32)))


def row(case: Case, clip: str, compiled: Compiled) -> dict[str, Any]:
    """What was found in one program."""
    program = compiled.program
    return {
        "case": case.name,
        "dtype": case.dtype,
        "contender": clip,
        "hbm_gb": round(program.hbm_bytes / 1e9, 4),
        "kernels": program.kernels,
        "cycles": program.cycles,
        "conditionals": program.conditionals,
        "whiles": program.whiles,
        "collectives": [dataclasses.asdict(each) for each in program.collectives],
        "temporary_mb": round(compiled.temporary_bytes / 1e6, 2),
        "build_seconds": round(compiled.build_seconds, 2),
    }


def merged(path: pathlib.Path, target: Target, rows: cases.Rows) -> dict[str, Any]:
    """The results with these rows in place of those of the same programs."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []

    def program(row: dict[str, Any]) -> tuple[str, ...]:
        return row["case"], row["dtype"], row["contender"]

    new = set(map(program, rows))
    kept = [each for each in old if program(each) not in new]
    return {
        "target": target.title,
        "what": NOT_MEASURED,
        "versions": versions(),
        "rows": kept + rows,
    }


def versions() -> dict[str, str]:
    """Of what compiled and what was compiled."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(target: Target, rows: cases.Rows) -> rich.table.Table:
    """One line for each program."""
    title = f"{target.title}: {NOT_MEASURED.lower()}"
    printed = rich.table.Table(*HEADINGS, title=title)
    for each in rows:
        printed.add_row(*_cells(each))
    return printed


def _cells(row: dict[str, Any]) -> list[str]:
    cycles = row["cycles"]
    flow = row["conditionals"] + row["whiles"]
    return [
        row["case"],
        row["dtype"],
        row["contender"],
        f"{row['hbm_gb']:.3f}",
        f"{row['kernels']:,}",
        "" if cycles is None else f"{cycles / 1e6:.2f}",
        str(flow or ""),
        exchanged(row["collectives"]),
        f"{row['temporary_mb']:,.1f}",
        f"{row['build_seconds']:.1f}",
    ]


def exchanged(collectives: list[dict[str, Any]]) -> str:
    """Such as "2 all-reduce (6)": how many, and of how many numbers together."""
    numbers: dict[str, list[int]] = {}
    for each in collectives:
        numbers.setdefault(each["kind"], []).append(each["numbers"])
    return ", ".join(f"{len(n)} {kind} ({sum(n)})" for kind, n in numbers.items())


if __name__ == "__main__":
    main()
