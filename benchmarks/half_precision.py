"""The norm of bfloat16 gradients: ``python -m benchmarks.half_precision``.

Trees of 1 to 3,000 leaves of 1,000 normal entries. Writes each norm as a share of the
exact one, and the README's figure. Half a minute on one core.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_globalclip

from . import style

OUT = pathlib.Path(__file__).parent / "results" / "half-precision"
COUNTS = (1, 10, 30, 100, 200, 300, 500, 1000, 2000, 3000)
MEASURES = {"ours": optax_globalclip.global_norm, "optax": optax.tree.norm}


def shares(tree: list[jax.Array]) -> dict[str, float]:
    """The norm that each library measures, as a share of the exact one."""
    exact = np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in tree))
    return {name: float(norm(tree)) / exact for name, norm in MEASURES.items()}


@style.applied
def main() -> None:
    """Measures, writes the shares and draws them over the number of leaves."""
    entries = np.random.default_rng(0).standard_normal((max(COUNTS), 1000), np.float32)
    leaves = [jnp.asarray(row, jnp.bfloat16) for row in entries]
    rows = [{"leaves": count, **shares(leaves[:count])} for count in COUNTS]
    results = {"jax": jax.__version__, "optax": optax.__version__, "rows": rows}
    OUT.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(8, 3))
    for name, colour in (("optax", style.ORANGE), ("ours", style.BLUE)):
        measured = [100 * row[name] for row in rows]
        axes.plot(COUNTS, measured, "o-", color=colour, lw=2)
        label = f"  {style.NAMES.get(name, 'Optax')}: {measured[-1]:.0f}%"
        axes.annotate(label, (COUNTS[-1], measured[-1]), color=colour, va="center")
    axes.set(
        xscale="log", ylim=(0, 115), xlabel="leaves, of 1,000 bfloat16 entries each"
    )
    axes.set_title("Measured global norm, as a percentage of the exact norm")
    axes.set_xticks((1, 10, 100, 1000), ("1", "10", "100", "1,000"))
    axes.minorticks_off()
    style.save(figure, OUT.with_suffix(".png"))


if __name__ == "__main__":
    main()
