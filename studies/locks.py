"""Whether thresholds free themselves: ``python -m studies.locks``.

Plain ZClip clips for ever after some histories. The command feeds those to it and to
``zscore_threshold``, and counts the steps that each clips. It takes a few seconds.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from optax_globalclip import zscore_threshold

from . import common

Z, DECAY, WARMUP_STEPS = 2.5, 0.97, 25
STEPS = 1000


def main(arguments: list[str] | None = None) -> None:
    """Runs every history, prints the table and writes it."""
    parser = results.parser("studies.locks", __doc__, common.FOLDER)
    out = parser.parse_args(arguments).out
    rows = [row(name, norms) for name, norms in histories().items()]
    title = f"Clipped of the {STEPS} steps after it"
    results.console().print(results.table(rows, title))
    results.write({"versions": results.versions(), "rows": rows}, out / "locks.json")


def histories() -> dict[str, np.ndarray]:
    """Norms that lock plain ZClip, and one of spikes that are to stay clipped."""

    def noisy(level: float, steps: int = STEPS) -> np.ndarray:
        return level * (1 + 0.05 * rng.standard_normal(steps))

    rng = np.random.default_rng(0)
    levels = np.where(np.arange(STEPS) % 2, noisy(10), noisy(1))
    spikes = np.where(rng.random(STEPS) < 0.01, noisy(100), noisy(1))
    found = {
        "25 zeros": (np.zeros(25), noisy(1)),
        "25 equal norms, then twice as large": (np.ones(25), noisy(2)),
        "a level that rises tenfold for good": (noisy(1, 200), noisy(10)),
        "two levels in turn": (noisy(1, 200), levels),
        "no lock: 1 spike in 100": (noisy(1, 200), spikes),
    }
    return {name: np.concatenate(parts) for name, parts in found.items()}


def row(name: str, norms: np.ndarray) -> dict[str, str | int]:
    """How many of the last steps each threshold clips."""
    last = norms[-STEPS:]
    plain = np.fromiter(zclip(norms), float)[-STEPS:]
    return {
        "history": name,
        "zclip": int((plain < last * (1 - 1e-6)).sum()),
        "ours": int((ours(norms)[-STEPS:] < last * (1 - 1e-6)).sum()),
    }


def zclip(norms: np.ndarray) -> Iterator[float]:
    """Algorithm 1 of ZClip (arXiv 2504.02507): the threshold of each norm."""
    mean, variance = norms[:WARMUP_STEPS].mean(), norms[:WARMUP_STEPS].var()
    yield from [math.inf] * WARMUP_STEPS
    for norm in norms[WARMUP_STEPS:]:
        std = math.sqrt(variance)
        threshold = mean + Z * std
        if norm > threshold:
            threshold = norm = mean + (Z * std) ** 2 / (norm - mean)
        yield threshold
        mean = DECAY * mean + (1 - DECAY) * norm
        variance = DECAY * variance + (1 - DECAY) * (norm - mean) ** 2


def ours(norms: np.ndarray) -> np.ndarray:
    """The threshold of each norm."""
    threshold = zscore_threshold(Z, decay=DECAY, warmup_steps=WARMUP_STEPS)

    def step(state, norm):
        found, state = threshold.update(norm, state, jnp.int32(0))
        return state, found

    scanned = jax.lax.scan(step, threshold.init(), jnp.asarray(norms, jnp.float32))
    return np.asarray(scanned[1], np.float64)


if __name__ == "__main__":
    main()
