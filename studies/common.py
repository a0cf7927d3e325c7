"""What the studies share: a recurrence, intervals, and a table."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from benchmarks import results

FOLDER = pathlib.Path(__file__).parent / "results"
LEVEL = 0.95


def interval_of_share(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's interval around the share of trials that succeeded."""
    found = scipy.stats.binomtest(successes, trials)
    interval = found.proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def interval_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Student's interval around the mean of values, of which there are two or more."""
    quantile = scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)
    margin = scipy.stats.sem(values) * quantile
    return float(np.mean(values) - margin), float(np.mean(values) + margin)


def show(title: str, headings: Sequence[str], lines: list[list[str]]) -> None:
    """Prints a table."""
    rows = [dict(zip(headings, line, strict=True)) for line in lines]
    results.console().print(results.table(rows, title))


@jax.custom_vjp
def last_hidden(recur: jax.Array, read: jax.Array) -> jax.Array:
    """Applies ``h = tanh(h @ recur + read[t])`` for all t, from zeros.

    The gradient of ``scan`` adds up one small product a step for ``recur``. The one
    here takes a single product for all steps, and halves the time of an update.

    Args:
      recur: the recurrent matrix, [units, units].
      read: what each step adds, [length, batch, units].

    Returns:
      The last h, [batch, units].
    """
    return _all_hidden(recur, read)[-1]


def _all_hidden(recur: jax.Array, read: jax.Array) -> jax.Array:
    def step(hidden: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = jnp.tanh(hidden @ recur + read)
        return hidden, hidden

    return jax.lax.scan(step, jnp.zeros_like(read[0]), read)[1]


def _forward(recur, read):
    hidden = _all_hidden(recur, read)
    return hidden[-1], (recur, hidden)


def _backward(kept, cotangent):
    recur, hidden = kept

    def step(cotangent, hidden):
        before_tanh = cotangent * (1 - hidden * hidden)
        return before_tanh @ recur.T, before_tanh

    _, before_tanh = jax.lax.scan(step, cotangent, hidden, reverse=True)
    return jnp.einsum("tbi,tbj->ij", hidden[:-1], before_tanh[1:]), before_tanh


last_hidden.defvjp(_forward, _backward)
