"""The paper that clipping comes from: ``python -m studies.temporal_order``.

Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks
(arXiv 1211.5063), section 4.1: a recurrent network of 50 tanh units tells in which
order two symbols came in a long sequence. Trained with SGD at 0.01 on batches of 20,
without clipping and clipped to a norm of 1. Success is an error below 1% on 10,000
fresh sequences, which are drawn every 1,000 updates if that on 1,000 is below 2%.

One network is trained after the other, on one core, until it succeeds. Each result is
kept: if the command is started again, it trains only the networks that are missing.
The rows of other lengths stay in the file, if they are of as many steps and seeds.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

from benchmarks import results
from optax_globalclip import clip_updates

from . import common, figures

UNITS = 50
BATCH_SIZE = 20
LEARNING_RATE = 0.01
TEST_SIZE = 10_000
QUICK_TEST_SIZE = 1000
SUCCESS = 0.01
CHECK_EVERY = 1000
LENGTHS = [10, 20, 40, 60, 100]
STEPS = 40_000
SEEDS = 20

MAX_NORMS = {"no clipping": np.inf, "clipped": 1.0}
METHODS = tuple(MAX_NORMS)
TITLE = "Seeds that tell the order of two symbols"

Params = dict[str, jax.Array]


class Batch(NamedTuple):
    """Sequences of the symbols 0 to 5, int32 [length, batch], and their classes."""

    symbols: jax.Array
    labels: jax.Array


class Trained(NamedTuple):
    """What became of one network.

    Attributes:
      length: of its sequences.
      method: one of ``METHODS``.
      seed: of its initialization and its batches.
      solved_at: the update at which it was first seen to succeed; 0 if never.
      error: the share of sequences told wrong at the last test; None if the network's
        logits were not finite.
      largest_norm: of the gradients of all updates, before any clip.
    """

    length: int
    method: str
    seed: int
    solved_at: int
    error: float | None
    largest_norm: float


def main(arguments: list[str] | None = None) -> None:
    """Trains every network, prints the table, writes it and the figure."""
    parser = results.parser("studies.temporal_order", __doc__, common.FOLDER)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=STEPS, help="at most, a network")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args(arguments)
    part = args.out / f"temporal-order-{args.steps}.part.json"
    networks = train_all(args.lengths, args.seeds, args.steps, part)
    file = args.out / "temporal-order.json"
    setting: results.Row = {"versions": results.versions()}
    setting |= {"steps": args.steps, "seeds": args.seeds}
    others = [r for r in results.rows(file, setting) if r["length"] not in args.lengths]
    rows = sorted([*summarized(networks), *others], key=lambda row: row["length"])
    common.show(TITLE, ["symbols", *METHODS], lines(rows))
    written = setting | {"rows": rows}
    results.write(written, file)
    part.unlink(missing_ok=True)
    figures.draw_temporal_order(written, file.with_suffix(".png"))
    print(f"Written to {args.out}: temporal-order.json, temporal-order.png")


def train_all(
    lengths: list[int], seeds: int, steps: int, part: pathlib.Path
) -> list[Trained]:
    """Trains the networks that ``part`` lacks, adding each to it; returns them all."""
    kept = (Trained(**row) for row in results.rows(part, {}))
    done = {network[:3]: network for network in kept}
    wanted = list(itertools.product(lengths, METHODS, range(seeds)))
    with rich.progress.Progress() as progress:
        task = progress.add_task("", total=steps * len(wanted))
        for i, network in enumerate(wanted):
            progress.update(task, description=f"{network[0]} symbols")
            if network not in done:
                advance = functools.partial(progress.advance, task, CHECK_EVERY)
                done[network] = train(*network, steps, advance)
                found = [trained._asdict() for trained in done.values()]
                results.write({"rows": found}, part)
            progress.update(task, completed=(i + 1) * steps)
    return [done[network] for network in wanted]


def train(
    length: int, method: str, seed: int, steps: int, advance: Callable[[], None]
) -> Trained:
    """Trains one network until it succeeds, or for so many steps."""
    params = initial(np.random.default_rng(seed))
    error, largest, solved_at = jnp.float32(1), jnp.float32(0), 0
    for step in range(0, steps, CHECK_EVERY):
        params, norm = _trained(params, seed, step, MAX_NORMS[method], length)
        largest = jnp.maximum(largest, norm)
        error = _tested(params, step, length, QUICK_TEST_SIZE)
        if error < 2 * SUCCESS:
            error = _tested(params, step, length, TEST_SIZE)
        advance()
        if error < SUCCESS:
            solved_at = step + CHECK_EVERY
            break
    error = round(float(error), 4) if jnp.isfinite(error) else None
    return Trained(length, method, seed, solved_at, error, float(f"{largest:.3g}"))


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


@functools.partial(jax.jit, static_argnames="length")
def _trained(params, seed, step, max_norm, length):
    """The parameters some updates later, and the largest norm."""
    key = jax.random.fold_in(jax.random.key(seed), 1)

    def update(params, i):
        batch = draw(jax.random.fold_in(key, i), BATCH_SIZE, length)
        return updated(params, batch, max_norm)

    params, norms = jax.lax.scan(update, params, step + jnp.arange(CHECK_EVERY))
    return params, norms.max()


@functools.partial(jax.jit, static_argnames=("length", "size"))
def _tested(params, step, length, size):
    """The error on fresh sequences, the same ones for all networks."""
    key = jax.random.fold_in(jax.random.key(2**20), step)
    return error_of(params, draw(key, size, length))


def updated(
    params: Params, batch: Batch, max_norm: chex.Numeric
) -> tuple[Params, jax.Array]:
    """One step of SGD, and the norm of the gradients before the clip."""
    updates, norm = clip_updates(jax.grad(loss_of)(params, batch), max_norm)
    return jax.tree.map(lambda p, u: p - LEARNING_RATE * u, params, updates), norm


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


def logits_of(params: Params, symbols: jax.Array) -> jax.Array:
    """[length, batch] to [batch, 4]."""
    read = jax.nn.one_hot(symbols, 6) @ params["read"]
    hidden = common.last_hidden(
        params["recur"], read + params["hidden_bias"][None, None]
    )
    return hidden @ params["write"] + params["bias"][None]


def loss_of(params: Params, batch: Batch) -> jax.Array:
    """The mean cross-entropy."""
    logits = logits_of(params, batch.symbols)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def error_of(params: Params, batch: Batch) -> jax.Array:
    """The share of sequences told wrong; NaN if a parameter is not finite."""
    logits = logits_of(params, batch.symbols)
    wrong = (logits.argmax(axis=1) != batch.labels).mean()
    return jnp.where(jnp.isfinite(logits).all(), wrong, jnp.nan)


def summarized(networks: list[Trained]) -> list[dict[str, Any]]:
    """A row for each length and method."""
    groups: dict[tuple[int, str], list[Trained]] = {}
    for each in networks:
        groups.setdefault((each.length, each.method), []).append(each)
    return [_row(length, method, found) for (length, method), found in groups.items()]


def _row(length: int, method: str, networks: list[Trained]) -> dict[str, Any]:
    solved = sum(each.solved_at > 0 for each in networks)
    low, high = common.interval_of_share(solved, len(networks))
    return {
        "length": length,
        "method": method,
        "solved": solved,
        "of": len(networks),
        "interval": [round(low, 4), round(high, 4)],
        "largest_norm": max(each.largest_norm for each in networks),
        "solved_at": [each.solved_at for each in networks],
        "errors": [each.error for each in networks],
    }


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table's cells, here and where it is shown."""
    cells = {(row["length"], row["method"]): _cell(row) for row in rows}
    lengths = dict.fromkeys(row["length"] for row in rows)
    return [[str(n), *(cells[n, method] for method in METHODS)] for n in lengths]


def _cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['solved']} of {row['of']} ({100 * low:.0f} to {100 * high:.0f}%)"


if __name__ == "__main__":
    main()
