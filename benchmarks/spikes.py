"""Which threshold survives bad batches: ``python -m benchmarks.spikes``.

Trains the demo's network on batches of which a few are bad: 1 in 100 has its labels
shuffled and its loss times 1,000, 1 in 200 a NaN in it. With no clipping, a constant
threshold, both adaptive ones, and skipping, at several seeds at once. Prints a table,
and writes it, a figure, and the norms that the tests are run on.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table
from flax import nnx

from optax_globalclip import (
    clip_by_global_norm,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)
from optax_globalclip._demo import Digits, Network, draw_batches, load_sequences

from . import command, spikes_figure
from .__main__ import RESULTS, versions

LEARNING_RATE = 0.03
SPIKES, NANS = 0.01, 0.005
SPIKE_FACTOR = 1000
FIRST_BAD = 50  # No adaptive threshold clips before it has seen 25 norms.

clip = functools.partial(clip_by_global_norm, nonfinite="zero")
sgd = functools.partial(optax.sgd, LEARNING_RATE)
METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "no clipping": lambda: optax.chain(clip_by_global_norm(None), sgd()),
    "constant": lambda: optax.chain(clip(1.0), sgd()),
    "z-score": lambda: optax.chain(clip(zscore_threshold()), sgd()),
    "quantile": lambda: optax.chain(clip(quantile_threshold(0.5)), sgd()),
    "skip": lambda: skip_by_global_norm(sgd(), zscore_threshold(6.0)),
}


class Batch(NamedTuple):
    """One batch for each seed: the factor of its loss is not 1 in a spike."""

    digits: Digits
    factor: np.ndarray | np.float32


class Run(NamedTuple):
    """What training with one method left behind, an entry a seed.

    Attributes:
      norms: of the gradients, before any clip, [seeds, steps].
      thresholds: what they were clipped to, or skipped above, [seeds, steps].
      losses: of the batches, but for the factor, [seeds, steps].
      accuracies: on the test set in the end, [seeds].
      clipped: share of the steps that were clipped, [seeds].
      skipped: share that were skipped, [seeds].
    """

    norms: np.ndarray
    thresholds: np.ndarray
    losses: np.ndarray
    accuracies: np.ndarray
    clipped: np.ndarray
    skipped: np.ndarray


def main(arguments: list[str] | None = None) -> None:
    """Trains with every method, prints the table, writes it and the figure."""
    parser = command.parser("spikes", __doc__)
    parser.add_argument("--steps", type=int, default=2000, help="of each run")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    runs = {}
    with rich.progress.Progress() as progress:
        for name, method in METHODS.items():
            task = progress.add_task(name, total=args.steps)
            advance = functools.partial(progress.advance, task)
            runs[name] = train(method(), args.seeds, args.steps, advance)

    rows = [row(name, run) for name, run in runs.items()]
    rich.console.Console().print(table(rows))
    results = {
        "versions": versions(),
        "steps": args.steps,
        "seeds": args.seeds,
        "rows": rows,
    }
    command.write(results, args.out / "spikes.json")
    np.save(args.out / "spikes-norms.npy", runs["constant"].norms.ravel())
    spikes_figure.draw(runs, args.out / "spikes.png")
    print(f"Written to {args.out}: spikes.json, spikes-norms.npy, spikes.png")


def train(
    tx: optax.GradientTransformation,
    seeds: int,
    steps: int,
    advance: Callable[[], None],
) -> Run:
    """Trains one network for each seed, all of them in one compiled step."""
    sets = [load_sequences(seed) for seed in range(seeds)]
    networks = [nnx.split(Network(nnx.Rngs(seed))) for seed in range(seeds)]
    graph = networks[0][0]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p for _, p in networks))

    def step(params: Any, opt_state: Any, batch: Batch) -> tuple[Any, Any, dict]:
        def loss_of(params: Any) -> tuple[Any, jax.Array]:
            logits = nnx.merge(graph, params)(batch.digits.images)
            loss = optax.softmax_cross_entropy_with_integer_labels(
                logits, batch.digits.labels
            ).mean()
            return batch.factor * loss, loss

        grads, loss = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        logs = metrics(opt_state) | {"loss": loss}
        return optax.apply_updates(params, updates), opt_state, logs

    compiled_step = jax.jit(jax.vmap(step), donate_argnums=(0, 1))
    opt_state, history = jax.vmap(tx.init)(params), []
    for batch in batches([train_set for train_set, _ in sets], steps):
        params, opt_state, logs = compiled_step(params, opt_state, batch)
        history.append(logs)
        advance()

    def over_steps(name: str) -> np.ndarray:
        return np.stack([logs[name] for logs in history], axis=1)

    def share(name: str) -> np.ndarray:
        return np.asarray(history[-1].get(name, np.zeros(seeds)))

    return Run(
        norms=over_steps("global_norm"),
        thresholds=over_steps("threshold"),
        losses=over_steps("loss"),
        accuracies=np.array(
            [
                accuracy(nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params)), s)
                for i, (_, s) in enumerate(sets)
            ]
        ),
        clipped=share("clip_fraction"),
        skipped=share("skip_fraction"),
    )


def batches(train_sets: list[Digits], steps: int) -> Iterator[Batch]:
    """Yields batches, stacked over seeds; the same ones for every method."""
    drawn = [draw_batches(s, steps, seed) for seed, s in enumerate(train_sets)]
    rngs = [np.random.default_rng(seed) for seed in range(len(train_sets))]
    for i, each in enumerate(zip(*drawn, strict=True)):
        spoiled = [
            spoil(digits, rng, rng.random() + (i < FIRST_BAD))
            for digits, rng in zip(each, rngs, strict=True)
        ]
        yield jax.tree.map(lambda *leaves: np.stack(leaves), *spoiled)


def spoil(digits: Digits, rng: np.random.Generator, lot: float) -> Batch:
    """Makes a batch bad, if it drew a low enough number."""
    images, labels, factor = digits.images, digits.labels, np.float32(1)
    if lot < SPIKES:
        labels, factor = rng.permutation(labels), np.float32(SPIKE_FACTOR)
    elif lot < SPIKES + NANS:
        images = images.copy()
        images[0, 0] = np.nan
    return Batch(Digits(images, labels), factor)


def accuracy(network: Network, digits: Digits) -> float:
    """The share of the digits that it tells right."""
    return float((network(digits.images).argmax(axis=1) == digits.labels).mean())


def row(name: str, run: Run) -> dict[str, Any]:
    """What the table says of one method."""
    return {
        "method": name,
        "accuracy": round(float(run.accuracies.mean()), 4),
        "lowest": round(float(run.accuracies.min()), 4),
        "highest": round(float(run.accuracies.max()), 4),
        "clipped": round(float(run.clipped.mean()), 4),
        "skipped": round(float(run.skipped.mean()), 4),
    }


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
    """The rows, a method each."""
    found = rich.table.Table(title="Handwritten digits, with bad batches among them")
    found.add_column("")
    columns = ("test accuracy", "lowest to highest", "steps clipped", "steps skipped")
    for column in columns:
        found.add_column(column, justify="right")
    for each in rows:
        found.add_row(*cells(each))
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, here and in the README."""
    return [
        row["method"],
        f"{row['accuracy']:.0%}",
        f"{row['lowest']:.0%} to {row['highest']:.0%}",
        f"{row['clipped']:.0%}",
        f"{row['skipped']:.1%}",
    ]


if __name__ == "__main__":
    main()
