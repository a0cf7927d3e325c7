"""What clipping costs 70 billion parameters: ``python -m benchmarks.sharding``.

Compiles, but does not run, the clip and an AdamW step for Llama 70B in bfloat16, on
hundreds of devices that need not exist. Prints and writes which collectives are in the
compiled code, the temporary memory of a device, and how long the code took to build.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.progress
import rich.table
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_globalclip import clip_by_global_norm

from . import by_hand, command
from .__main__ import RESULTS, versions
from .measure import collectives, compiled
from .trees import llama_70b

CLIPS = {
    "none": optax.identity,
    "by hand": lambda: by_hand.clip_by_global_norm(1.0),
    "optax": lambda: optax.clip_by_global_norm(1.0),
    "ours": lambda: clip_by_global_norm(1.0),
}
MODES = {
    "jit, auto": AxisType.Auto,
    "jit, explicit": AxisType.Explicit,
    "shard_map": AxisType.Auto,
}
MODEL_AXIS = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """What one compiled program holds.

    Attributes:
      devices: how many it is for.
      mode: how it is sharded.
      what: "clip" or "AdamW".
      clip: whose clip it is, a key of ``CLIPS``.
      all_reduces: how many, and
      numbers: of how many numbers together.
      others: how many other collectives.
      temporary_mb: the memory of a device beside arguments and results.
      build_seconds: what tracing, lowering and compiling took.
    """

    devices: int
    mode: str
    what: str
    clip: str
    all_reduces: int
    numbers: int
    others: int
    temporary_mb: float
    build_seconds: float


def main(arguments: list[str] | None = None) -> None:
    """Compiles every program, prints the table, and writes it."""
    parser = command.parser("sharding", __doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))

    todo = [
        (devices, mode, what, clip)
        for devices in args.devices
        for mode in MODES
        for what, clips in {"clip": list(CLIPS)[1:], "AdamW": list(CLIPS)}.items()
        for clip in clips
    ]
    rows = []
    with rich.progress.Progress() as progress:
        task = progress.add_task("", total=len(todo))
        for devices, mode, what, clip in todo:
            name = f"{what}, {clip}, {mode}, {devices} devices"
            progress.update(task, description=name)
            rows.append(row(devices, mode, what, clip, args.layers))
            progress.advance(task)

    headings = [field.name.replace("_", " ") for field in dataclasses.fields(Row)]
    table = rich.table.Table(*headings)
    for each in rows:
        table.add_row(*map(str, dataclasses.astuple(each)))
    # Wide enough for the table where the output is no terminal.
    rich.console.Console(width=None if sys.stdout.isatty() else 110).print(table)
    results = {"versions": versions(), "rows": list(map(dataclasses.asdict, rows))}
    path = args.out / "llama-70b.json"
    command.write(results, path)
    print(f"Written to {path}")


def row(devices: int, mode: str, what: str, clip: str, layers: int) -> Row:
    """Compiles one program, and looks at what it holds."""
    mesh = jax.make_mesh(
        (devices // MODEL_AXIS, MODEL_AXIS),
        ("fsdp", "model"),
        axis_types=(MODES[mode],) * 2,
        devices=jax.devices()[:devices],
    )
    step, arguments = step_on(mesh, mode, what, clip, layers)
    with jax.set_mesh(mesh):
        executable, cost = compiled(step, *arguments, donate=(0, 1))
    found = collectives(executable)
    reduced = [numbers for name, numbers in found if name == "all-reduce"]
    return Row(
        devices,
        mode,
        what,
        clip,
        all_reduces=len(reduced),
        numbers=sum(reduced),
        others=len(found) - len(reduced),
        temporary_mb=round(cost["temporary_mb"], 1),
        build_seconds=round(cost["build_seconds"], 1),
    )


def step_on(
    mesh: jax.sharding.Mesh, mode: str, what: str, clip: str, layers: int
) -> tuple[Callable, tuple[Any, Any, Any]]:
    """The step to compile, and what to compile it for: updates, state, parameters."""
    tx = CLIPS[clip]()
    if what == "AdamW":
        tx = optax.chain(tx, optax.adamw(1e-3))
    params, specs = abstract_params(llama_70b(layers))
    state, state_specs = abstract_state(tx, params, specs)
    place = functools.partial(jax.tree.map, functools.partial(_on, mesh))
    arguments = (place(params, specs), place(state, state_specs), place(params, specs))
    step: Callable = functools.partial(_step, tx)
    if mode == "shard_map":
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, state_specs, specs),
            out_specs=(specs, state_specs),
            # The peers have each device clip by a norm of its own: the state differs.
            check_vma=clip not in ("optax", "by hand"),
        )
    return step, arguments


def abstract_params(tree: Any) -> tuple[Any, Any]:
    """The shapes of the parameters in bfloat16, and their specs."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape, _ in leaves]
    return treedef.unflatten(shapes), treedef.unflatten([spec for _, spec in leaves])


def abstract_state(
    tx: optax.GradientTransformation, params: Any, specs: Any
) -> tuple[Any, Any]:
    """The shapes of the optimizer's state, and their specs: moments as parameters."""
    state = jax.eval_shape(tx.init, params)
    return state, optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: PartitionSpec(),
    )


def _on(
    mesh: jax.sharding.Mesh, leaf: jax.ShapeDtypeStruct, spec: PartitionSpec
) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _step(
    tx: optax.GradientTransformation, grads: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    return tx.update(grads, state, params)


if __name__ == "__main__":
    main()
