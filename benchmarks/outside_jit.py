"""The time of a call outside ``jit``, on 148 leaves, beside optax's.

``python -m benchmarks.outside_jit`` prints the medians, and writes them for the README.
"""

import importlib.metadata
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

from optax_globalclip import clip_by_global_norm

from .trees import gpt2_small_shapes

RESULTS = pathlib.Path(__file__).parent / "results" / "outside_jit.json"
ROUNDS = 50


def main() -> None:
    """Times both clips in turn, prints the medians and writes them."""
    rng = np.random.default_rng(0)
    # As many leaves as GPT-2 small, but narrow ones: it is the call that is timed.
    shapes = jax.tree.map(lambda size: max(1, size // 64), gpt2_small_shapes())
    tree = jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    clips = {"optax": optax.clip_by_global_norm(1.0), "ours": clip_by_global_norm(1.0)}
    states = {name: tx.init(tree) for name, tx in clips.items()}
    times: dict[str, list[float]] = {name: [] for name in clips}
    for _ in rich.progress.track(range(1 + ROUNDS), "Clipping 148 leaves"):
        for name, tx in clips.items():
            start = time.perf_counter()
            jax.block_until_ready(tx.update(tree, states[name]))
            times[name].append(1e3 * (time.perf_counter() - start))
    # The first round compiles.
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratio = statistics.median(
        ours / optax_
        for ours, optax_ in zip(times["ours"][1:], times["optax"][1:], strict=True)
    )
    written = {
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "optax")
        },
        "machine": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "rounds": ROUNDS,
        "milliseconds": {name: round(median, 2) for name, median in medians.items()},
        "ratio": round(ratio, 3),
    }
    print(json.dumps(written, indent=1))
    RESULTS.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
