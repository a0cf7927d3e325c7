"""Trains the demo's network on several machines, with the clip in the chain.

On each machine the same command, but for its number; the first machine coordinates:

    python -m examples.machines --coordinator 10.0.0.1:1234 --processes 2 --process 0
    python -m examples.machines --coordinator 10.0.0.1:1234 --processes 2 --process 1

With 127.0.0.1 for the address both can be run on one machine. JAX does the rest: the
training step is the one for a single device, and the norm is that of all gradients.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optax_globalclip import clip_by_global_norm, metrics
from optax_globalclip._demo import Network, draw_batches, load_sequences

BATCH_SIZE = 48  # Of the 50 drawn, so that 2, 3, 4, 6, 8 or 12 devices share it.

TX = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))


def main(arguments: list[str] | None = None) -> None:
    """Joins the others, and trains with each layout in turn."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.machines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--coordinator", default="127.0.0.1:1234", metavar="HOST:PORT")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(arguments)
    if args.processes > 1:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            # So that a machine that is lost ends the others soon.
            heartbeat_timeout_seconds=10,
        )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    for layout in args.layouts:
        train(layout, mesh, args.steps)


def split_first_axis(leaf: jax.Array, mesh: Mesh) -> PartitionSpec:
    """Fully sharded: a part of each leaf on each device, where it can be divided."""
    divisible = leaf.ndim and leaf.shape[0] % mesh.size == 0
    return PartitionSpec("data") if divisible else PartitionSpec()


def keep_whole(leaf: jax.Array, mesh: Mesh) -> PartitionSpec:
    """Data parallel: every device holds all parameters."""
    del leaf, mesh
    return PartitionSpec()


LAYOUTS: dict[str, Callable[[jax.Array, Mesh], PartitionSpec]] = {
    "data-parallel": keep_whole,
    "fully-sharded": split_first_axis,
}


def train(layout: str, mesh: Mesh, steps: int) -> None:
    """Trains a new network, and prints loss and norm of every step."""
    digits, _ = load_sequences(seed=0)
    graph, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(
        lambda leaf: shared(leaf, mesh, LAYOUTS[layout](leaf, mesh)), params
    )
    opt_state = TX.init(params)

    @jax.jit
    def step(
        params: Any, opt_state: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = TX.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    for i, drawn in enumerate(draw_batches(digits, steps, seed=0)):
        batch = (shared(x[:BATCH_SIZE], mesh, PartitionSpec("data")) for x in drawn)
        params, opt_state, loss = step(params, opt_state, *batch)
        norm = metrics(opt_state)["global_norm"]
        if jax.process_index() == 0:
            print(f"{layout}, step {i}: loss {loss:.4f}, norm {norm:.6g}", flush=True)


def shared(array: Any, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """What every process holds whole, as one array of which each keeps its part."""
    array = np.asarray(array)
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


if __name__ == "__main__":
    main()
