"""What optax.clip_by_global_norm and ours do with the same updates.

``python -m benchmarks.compare`` prints the table, and writes it for the README.
"""

import importlib.metadata
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import rich.console  # noqa: E402
import rich.markup  # noqa: E402
import rich.progress  # noqa: E402
import rich.table  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

import optax_globalclip  # noqa: E402

from . import command  # noqa: E402
from .trees import gpt2_small_shapes  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results" / "compare.json"

Clip = Callable[[Any, Any], Any]


class Row(NamedTuple):
    """One line of the table, as strings."""

    case: str
    optax: str
    ours: str


def main() -> None:
    """Measures every row, prints the table and writes it."""
    rows = [
        row(case)
        for case, row in rich.progress.track(ROWS.items(), "Comparing with optax")
    ]
    table = rich.table.Table("", f"optax {optax.__version__}", "optax_globalclip")
    for row_ in rows:
        table.add_row(*map(rich.markup.escape, row_))
    rich.console.Console().print(table)
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "optax", "optax_globalclip")
    }
    written = {"versions": versions, "rows": [row_._asdict() for row_ in rows]}
    command.write(written, RESULTS)


# --- What the clips return.


def clip_in_optax(updates: Any, max_norm: Any) -> Any:
    """Optax's clip, by the same signature as ours."""
    return optax.clip_by_global_norm(max_norm).update(updates, optax.EmptyState())[0]


def clip_in_ours(updates: Any, max_norm: Any) -> Any:
    """Our clip as a transformation, as Optax's is one."""
    return optax_globalclip.clip_by_global_norm(max_norm).update(
        updates, optax.EmptyState()
    )[0]


def norms(shapes: Any) -> Callable[[str], Row]:
    """The norm of a bfloat16 tree of normal entries, beside that in float64."""

    def row(case: str) -> Row:
        tree = _normals(shapes)
        squares = [np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in tree]
        exact = math.sqrt(math.fsum(squares))
        theirs, ours = optax.global_norm(tree), optax_globalclip.global_norm(tree)
        return Row(
            f"{case} (exact: {exact:.1f})", f"{float(theirs):.1f}", f"{float(ours):.1f}"
        )

    return row


def clipped(updates: Any, max_norm: Any) -> Callable[[str], Row]:
    """What becomes of the updates."""
    return _outcomes(lambda clip: clip(updates, max_norm))


def slope_at_zero(case: str) -> Row:
    """The gradient through the clip of a zero vector."""

    def through(clip: Clip) -> jax.Array:
        return jax.grad(lambda x: clip(x, 1.0).sum())(jnp.zeros(2))

    return _outcomes(through)(case)


def under_shard_map(case: str) -> Row:
    """The norm of what eight devices make of one sharded leaf."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")

    def norm_after(clip: Clip) -> jax.Array:
        sharded = jax.shard_map(
            lambda x: clip(x, 1.0), mesh=mesh, in_specs=spec, out_specs=spec
        )
        return jnp.linalg.norm(sharded(jnp.ones(800)))

    return _outcomes(norm_after)(case)


def _outcomes(run: Callable[[Clip], Any]) -> Callable[[str], Row]:
    def outcome(clip: Clip) -> str:
        try:
            leaf = jax.tree.leaves(run(clip))[0]
        except (TypeError, ValueError) as error:
            return type(error).__name__
        values = ", ".join(f"{value:.3g}" for value in np.ravel(leaf).astype(float))
        return f"[{values}]" if np.ndim(leaf) else values

    return lambda case: Row(case, outcome(clip_in_optax), outcome(clip_in_ours))


def _normals(shapes: Any) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    return [
        jnp.asarray(rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16)
        for shape in leaves
    ]


ROWS: dict[str, Callable[[str], Row]] = {
    "norm of 1,000 bfloat16 leaves of 1,000 entries": norms([(1000,)] * 1000),
    "norm of GPT-2 small in bfloat16, 148 leaves": norms(gpt2_small_shapes()),
    "float16 [300, 300, 300], clipped to 1": clipped(
        jnp.full(3, 300, jnp.float16), 1.0
    ),
    "float32 [1e20, 1e20, 1e20], clipped to 1": clipped(jnp.full(3, 1e20), 1.0),
    "[0, 0], clipped to 0": clipped(jnp.zeros(2), 0.0),
    "[3, 4], clipped to -1": clipped(jnp.array([3.0, 4.0]), -1.0),
    "gradient through the clip at [0, 0]": slope_at_zero,
    "norm after clipping to 1 on 8 devices, in shard_map": under_shard_map,
    "bfloat16 [1], clipped to a float32 array 0.5": clipped(
        jnp.ones(1, jnp.bfloat16), jnp.float32(0.5)
    ),
    "[1] beside a float0 leaf (the gradient of an integer), clipped to 0.5": clipped(
        [jnp.ones(1), np.zeros(1, jax.dtypes.float0)], 0.5
    ),
}


if __name__ == "__main__":
    main()
