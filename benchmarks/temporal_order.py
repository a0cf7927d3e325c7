"""The paper that clipping comes from: ``python -m benchmarks.temporal_order``.

Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks
(arXiv 1211.5063), section 4.1: a recurrent network of 50 tanh units tells in which
order two symbols came in a long sequence. Trained with SGD at 0.01 on batches of 20,
without clipping, clipped to a norm of 1, and clipped with the rule for non-finite norms
in the authors' code. Success is an error below 1% on 10,000 fresh sequences.

All methods and seeds are trained at once, for one length of the sequences after the
other. What is done is kept: started again, it goes on where it was interrupted.
"""

import functools
import pathlib
from typing import Any, NamedTuple, cast

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress
import rich.table

from optax_globalclip import clip_updates

from . import command, temporal_order_figure
from .__main__ import RESULTS, versions

UNITS = 50
BATCH_SIZE = 20
LEARNING_RATE = 0.01
TEST_SIZE = 10_000
SUCCESS = 0.01
CHECK_EVERY = 1000
LENGTHS = [10, 20, 30, 40, 50, 60]
STEPS = 40_000

METHODS = ("no clipping", "clipped", "clipped, authors' rule")
# By method: the threshold, and whether the rule for non-finite norms is on.
MAX_NORMS = np.array([np.inf, 1.0, 1.0], np.float32)
RULES = np.array([False, False, True])


class Batch(NamedTuple):
    """Sequences of the symbols 0 to 5, int32 [length, batch], and their classes."""

    symbols: jax.Array
    labels: jax.Array


class Progress(NamedTuple):
    """Where the training for one length is; arrays are [methods, seeds, ...].

    Attributes:
      params: of all networks.
      step: how many updates there were.
      solved_at: the update at which each was first seen to succeed; 0 if never.
      errors: of each at the last check.
    """

    params: Any
    step: np.ndarray
    solved_at: np.ndarray
    errors: np.ndarray


def main(arguments: list[str] | None = None) -> None:
    """Trains for every length, prints the table, writes it and the figure."""
    parser = command.parser("temporal_order", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=STEPS, help="at most, a length")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with rich.progress.Progress() as progress:
        for length in args.lengths:
            task = progress.add_task(f"{length} symbols", total=args.steps)
            rows += train(length, args.steps, args.seeds, args.out, progress, task)
    rich.console.Console().print(table(rows))
    results = {
        "versions": versions(),
        "steps": args.steps,
        "seeds": args.seeds,
        "rows": rows,
    }
    command.write(results, args.out / "temporal-order.json")
    for length in args.lengths:
        _checkpoint(args.out, length, args.steps, args.seeds).unlink(missing_ok=True)
    temporal_order_figure.draw(results, args.out / "temporal-order.png")
    print(f"Written to {args.out}: temporal-order.json, temporal-order.png")


def train(
    length: int,
    steps: int,
    seeds: int,
    out: pathlib.Path,
    progress: rich.progress.Progress,
    task: rich.progress.TaskID,
) -> list[dict[str, Any]]:
    """Trains all networks for one length; a row for each method."""
    path = _checkpoint(out, length, steps, seeds)
    state = start(seeds)
    if path.exists():
        restored = flax.serialization.from_bytes(state, path.read_bytes())
        state = cast(Progress, restored)
    while state.step < steps and not (state.solved_at > 0).all():
        progress.update(task, completed=int(state.step))
        state = advanced(state, length)
        # Whole, or not at all, when it is interrupted.
        part = path.with_suffix(".part")
        part.write_bytes(flax.serialization.to_bytes(state))
        part.replace(path)
    progress.update(task, completed=steps)
    return [
        {
            "length": length,
            "method": method,
            "solved": int((state.solved_at[i] > 0).sum()),
            "solved_at": state.solved_at[i].tolist(),
            "errors": [round(float(error), 4) for error in state.errors[i]],
            "diverged": int(np.isnan(state.errors[i]).sum()),
        }
        for i, method in enumerate(METHODS)
    ]


def start(seeds: int) -> Progress:
    """New networks: those of one seed are the same for every method."""
    networks = [initial(np.random.default_rng(seed)) for seed in range(seeds)]
    shape = (len(METHODS), seeds)
    return Progress(
        params=jax.tree.map(lambda *p: np.array([p] * len(METHODS)), *networks),
        step=np.array(0),
        solved_at=np.zeros(shape, np.int32),
        errors=np.ones(shape, np.float32),
    )


def initial(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The paper's "smart tanh": 15 connections into each unit, spectral radius 0.95."""
    recur = 0.01 * rng.standard_normal((UNITS, UNITS))
    for row in recur:
        row[rng.permutation(UNITS)[15:]] = 0
    recur *= 0.95 / np.abs(np.linalg.eigvals(recur)).max()
    params = {
        "read": 0.01 * rng.standard_normal((6, UNITS)),
        "recur": recur,
        "hidden_bias": np.zeros(UNITS),
        "write": 0.01 * rng.standard_normal((UNITS, 4)),
        "bias": np.zeros(4),
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def advanced(state: Progress, length: int) -> Progress:
    """Some more updates, then a check on fresh sequences."""
    seeds = jnp.arange(state.solved_at.shape[1])
    params, errors = _train_and_test(state.params, seeds, state.step, length)
    step = state.step + CHECK_EVERY
    errors = np.asarray(errors)
    solved = (errors < SUCCESS) & (state.solved_at == 0)
    solved_at = np.where(solved, step, state.solved_at).astype(np.int32)
    return Progress(jax.tree.map(np.asarray, params), step, solved_at, errors)


@functools.partial(jax.jit, static_argnames="length")
def _train_and_test(params, seeds, step, length):
    def of_method(params, max_norm, rule):
        def of_seed(params, seed):
            key = jax.random.fold_in(jax.random.key(seed), 1)

            def update(params, i):
                batch = draw(jax.random.fold_in(key, i), BATCH_SIZE, length)
                return updated(params, batch, max_norm, rule), None

            params, _ = jax.lax.scan(update, params, step + jnp.arange(CHECK_EVERY))
            return params

        return jax.vmap(of_seed)(params, seeds)

    params = jax.vmap(of_method)(params, MAX_NORMS, RULES)
    test = draw(jax.random.fold_in(jax.random.key(2**20), step), TEST_SIZE, length)
    return params, jax.vmap(jax.vmap(lambda p: error_of(p, test)))(params)


def updated(
    params: dict[str, jax.Array], batch: Batch, max_norm: jax.Array, rule: jax.Array
) -> dict[str, jax.Array]:
    """One step of SGD."""
    grads = jax.grad(loss_of)(params, batch)
    updates, norm = clip_updates(grads, max_norm)
    # Where the norm cannot be trusted, the authors shrink the recurrent matrix a
    # little, and leave all else.
    shrink = jax.tree.map(jnp.zeros_like, params) | {"recur": 0.02 * params["recur"]}
    distrusted = rule & ~(norm <= 1e10)
    return jax.tree.map(
        lambda p, u, s: p - LEARNING_RATE * jnp.where(distrusted, s, u),
        params,
        updates,
        shrink,
    )


def draw(key: jax.Array, size: int, length: int) -> Batch:
    """Sequences of c, d, e and f (2 to 5), with A or B (0, 1) at two places.

    One in the second tenth, one in the sixth, as in the authors' code.
    """
    keys = jax.random.split(key, 5)
    tenth = length // 10
    symbols = jax.random.randint(keys[0], (length, size), 2, 6)
    first, second = jax.random.randint(keys[1], (2, size), 0, 2)
    at_first = tenth + jax.random.randint(keys[2], (size,), 0, tenth)
    at_second = length // 2 + jax.random.randint(keys[3], (size,), 0, tenth)
    sequences = jnp.arange(size)
    symbols = symbols.at[at_first, sequences].set(first)
    symbols = symbols.at[at_second, sequences].set(second)
    return Batch(symbols, first + 2 * second)


def logits_of(params: dict[str, jax.Array], symbols: jax.Array) -> jax.Array:
    """[length, batch] to [batch, 4]."""

    def step(hidden: jax.Array, symbol: jax.Array) -> tuple[jax.Array, None]:
        read = params["read"][symbol] + params["hidden_bias"][None]
        return jnp.tanh(hidden @ params["recur"] + read), None

    hidden, _ = jax.lax.scan(step, jnp.zeros((symbols.shape[1], UNITS)), symbols)
    return hidden @ params["write"] + params["bias"][None]


def loss_of(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
    """The mean cross-entropy."""
    logits = logits_of(params, batch.symbols)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def error_of(params: dict[str, jax.Array], batch: Batch) -> jax.Array:
    """The share of sequences told wrong; NaN if a parameter is not finite."""
    logits = logits_of(params, batch.symbols)
    wrong = (logits.argmax(axis=1) != batch.labels).mean()
    return jnp.where(jnp.isfinite(logits).all(), wrong, jnp.nan)


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
    """How many seeds were solved, for each length and method."""
    found = rich.table.Table(title="Seeds that tell the order of two symbols")
    found.add_column("symbols", justify="right")
    for method in METHODS:
        found.add_column(method, justify="right")
    for line in lines(rows):
        found.add_row(*line)
    return found


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table's cells, here and where it is shown."""
    solved = {
        (row["length"], row["method"]): f"{row['solved']} of {len(row['errors'])}"
        for row in rows
    }
    lengths = dict.fromkeys(row["length"] for row in rows)
    return [[str(n), *(solved[n, method] for method in METHODS)] for n in lengths]


def _checkpoint(out: pathlib.Path, length: int, steps: int, seeds: int) -> pathlib.Path:
    return out / f"temporal-order-{length}-{steps}-{seeds}.msgpack"


if __name__ == "__main__":
    main()
