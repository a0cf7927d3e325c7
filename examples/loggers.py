"""Logs the clip's metrics to TensorBoard, to a CSV file, and as Weights & Biases would.

    python -m examples.loggers --out runs/demo

The training loop never waits for the device: each step leaves its metrics there, and
every 100 steps they are fetched at once and written.
"""

import argparse
import csv
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
import rich.progress
import tensorboardX
from flax import nnx

from optax_globalclip import clip_by_global_norm, metrics
from optax_globalclip._demo import Network, draw_batches, load_sequences

Log = Callable[[Mapping[str, float], int], None]


class EverySoOften:
    """Collects the metrics of steps, and hands them on many at a time."""

    def __init__(self, logs: list[Log], every: int = 100):
        self._logs = logs
        self._every = every
        self._waiting: list[tuple[int, Mapping[str, jax.Array]]] = []

    def __call__(self, step: int, found: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of one step, as they lie on the device."""
        self._waiting.append((step, found))
        if len(self._waiting) == self._every:
            self.flush()

    def flush(self) -> None:
        """Fetches all that wait, in one transfer, and logs them."""
        for step, found in jax.device_get(self._waiting):
            for log in self._logs:
                log({name: float(value) for name, value in found.items()}, int(step))
        self._waiting = []


def main(arguments: list[str] | None = None) -> None:
    """Trains the demo's network, and logs."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.loggers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        tensorboardX.SummaryWriter(str(args.out)) as board,
        (args.out / "metrics.csv").open("w", newline="") as file,
    ):
        train(args.steps, [to_tensorboard(board), to_csv(file)])
    print(f"Written to {args.out}: metrics.csv, and events for TensorBoard")


def train(steps: int, logs: list[Log]) -> None:
    """Trains the demo's network with the clip, and logs its metrics."""
    train_set, _ = load_sequences(seed=0)
    network = Network(nnx.Rngs(0))
    tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(network: Network, optimizer: nnx.Optimizer, batch: Any) -> dict:
        def loss_of(network: Network) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(
                network(batch.images), batch.labels
            )
            return losses.mean()

        loss, grads = nnx.value_and_grad(loss_of)(network)
        optimizer.update(network, grads)
        return {"loss": loss} | metrics(optimizer.opt_state)

    log = EverySoOften(logs)
    batches = draw_batches(train_set, steps, seed=0)
    for step, batch in enumerate(rich.progress.track(batches, "training", steps)):
        log(step, train_step(network, optimizer, batch))
    log.flush()


def to_tensorboard(board: tensorboardX.SummaryWriter) -> Log:
    """One curve for each metric."""

    def log(found: Mapping[str, float], step: int) -> None:
        for name, value in found.items():
            board.add_scalar(name, value, step)

    return log


def to_csv(file: Any) -> Log:
    """One row for each step, one column for each metric."""
    writer = csv.writer(file)

    def log(found: Mapping[str, float], step: int) -> None:
        if file.tell() == 0:
            writer.writerow(["step", *found])
        writer.writerow([step, *found.values()])

    return log


def to_wandb(run: Any) -> Log:
    """``run.log(dict)``, as Weights & Biases and others have it."""
    return lambda found, step: run.log(dict(found), step=step)


if __name__ == "__main__":
    main()
