"""What Optax's clip and ours make of the same updates: ``benchmarks.compare``.

Prints the table, and writes it for the README and the site.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, PartitionSpec  # noqa: E402

import optax_globalclip  # noqa: E402

from . import results  # noqa: E402
from .cases import clip  # noqa: E402
from .networks import gpt2_small  # noqa: E402

# What is shown of one contender: "optax" or "ours".
Outcome = Callable[[str], Any]
NORMS = {"optax": optax.global_norm, "ours": optax_globalclip.global_norm}


def main() -> None:
    """Measures every row, prints the table and writes it."""
    rows = [row(case, outcome) for case, outcome in _rows().items()]
    results.console().print(results.table(rows))
    written = {"versions": results.versions(), "rows": rows}
    results.write(written, results.FOLDER / "compare.json")


def row(case: str, outcome: Outcome) -> results.Row:
    """What both give, or the error that both raise."""

    def shown(contender: str) -> str:
        try:
            found = outcome(contender)
        except (TypeError, ValueError) as error:
            return type(error).__name__
        if isinstance(found, str):
            return found
        values = ", ".join(f"{value:.3g}" for value in np.ravel(found).astype(float))
        return f"[{values}]" if np.ndim(found) else values

    return {"case": case, "optax": shown("optax"), "ours": shown("ours")}


def clipped(contender: str, updates: Any, max_norm: Any) -> jax.Array:
    """The first leaf of the clipped updates."""
    clipped, _ = clip(contender, max_norm).update(updates, optax.EmptyState())
    return jax.tree.leaves(clipped)[0]


def of(updates: Any, max_norm: Any) -> Outcome:
    """What becomes of the updates."""
    return lambda contender: clipped(contender, updates, max_norm)


def slope_at_zero(contender: str) -> jax.Array:
    """The gradient through the clip of a zero vector."""
    return jax.grad(lambda x: clipped(contender, x, 1.0).sum())(jnp.zeros(2))


def under_shard_map(contender: str) -> jax.Array:
    """The norm of what eight devices make of one sharded leaf."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    sharded = jax.shard_map(
        lambda x: clipped(contender, x, 1.0), mesh=mesh, in_specs=spec, out_specs=spec
    )
    return jnp.linalg.norm(sharded(jnp.ones(800)))


def norm_of_normals(shapes: Any) -> tuple[str, Outcome]:
    """The norm of a bfloat16 tree of normal entries: in float64, and what both give."""
    rng = np.random.default_rng(0)
    leaves = jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))
    tree = [
        jnp.asarray(rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16)
        for shape in leaves
    ]
    squares = [np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in tree]
    exact = f"(exact: {math.sqrt(math.fsum(squares)):.1f})"
    return exact, lambda contender: f"{float(NORMS[contender](tree)):.1f}"


def _rows() -> dict[str, Outcome]:
    thousand, theirs = norm_of_normals([(1000,)] * 1000)
    gpt2, theirs_of_gpt2 = norm_of_normals(gpt2_small())
    half, single = jnp.full(3, 300, jnp.float16), jnp.full(3, 1e20)
    beside_float0 = [jnp.ones(1), np.zeros(1, jax.dtypes.float0)]
    return {
        f"norm of 1,000 bfloat16 leaves of 1,000 entries {thousand}": theirs,
        f"norm of GPT-2 small in bfloat16, 148 leaves {gpt2}": theirs_of_gpt2,
        "float16 [300, 300, 300], clipped to 1": of(half, 1.0),
        "float32 [1e20, 1e20, 1e20], clipped to 1": of(single, 1.0),
        "[0, 0], clipped to 0": of(jnp.zeros(2), 0.0),
        "[3, 4], clipped to -1": of(jnp.array([3.0, 4.0]), -1.0),
        "gradient through the clip at [0, 0]": slope_at_zero,
        "norm after clipping to 1 on 8 devices, in shard_map": under_shard_map,
        "bfloat16 [1], clipped to a float32 array 0.5": of(
            jnp.ones(1, jnp.bfloat16), jnp.float32(0.5)
        ),
        "[1] beside a float0 leaf (the gradient of an integer), clipped to 0.5": of(
            beside_float0, 0.5
        ),
    }


if __name__ == "__main__":
    main()
