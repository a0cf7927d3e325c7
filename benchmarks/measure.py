"""How everything is timed: contenders in random order in each round, and medians."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.progress

from . import programs
from .results import Row


@dataclasses.dataclass
class Contender:
    """One way to do what a case is about.

    Attributes:
      run: does it once and waits for the result. It may return its next argument, for
        donated ones; the first is what ``start`` returns.
      start: makes that argument.
      prepare: what happens to the argument before each call, and is not timed.
      built: what is known of the compiled program, by the name of the field.
      seconds: of each round, per call.
    """

    run: Callable[[Any], Any]
    start: Callable[[], Any] = lambda: None
    prepare: Callable[[Any], Any] = lambda value: value
    built: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def median(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.seconds)


def compiled(
    function: Callable, *args: Any, donate: tuple[int, ...] = ()
) -> tuple[jax.stages.Compiled, dict[str, float]]:
    """The function compiled for such arguments, and what is known of the program.

    Without a cache: neither JAX's of traces nor XLA's of kernels.
    """
    jax.clear_caches()
    start = time.perf_counter()
    executable = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = executable.memory_analysis()
    assert memory is not None
    built = {
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 2),
        "build_seconds": round(seconds, 3),
    }
    if jax.default_backend() != "cpu":  # What the compiler says, beside the times.
        program = programs.parse(executable.as_text() or "")
        built["hbm_gb"] = round(program.hbm_bytes / 1e9, 4)
        built["kernels"] = program.kernels
    return executable, built


def collectives(executable: jax.stages.Compiled) -> list[tuple[str, int]]:
    """The collectives in the compiled code, and how many numbers each hands on."""
    found = programs.parse(executable.as_text() or "").collectives
    return [(each.kind, each.numbers) for each in found]


def interleaved(
    contenders: dict[str, Contender],
    rounds: int,
    progress: rich.progress.Progress,
    *,
    shared: Any = None,
) -> None:
    """Times the contenders in random order, each for at least 20 ms a round.

    What a contender frees slows the one that runs after it, which should not always be
    the same one. The orders are the same in every run.

    Args:
      contenders: by name; their ``seconds`` are filled.
      rounds: how often each is timed, after a first call that is not.
      progress: gets a line that counts the rounds.
      shared: the first argument of the first, where each takes what the last one
        returned, as when all of them update the same parameters in place.
    """
    own = shared is None
    values: dict[str, Any] = {"shared": shared}
    if own:
        values = {name: each.start() for name, each in contenders.items()}
    calls = dict.fromkeys(contenders, 1)

    def timed(name: str) -> float:
        key, contender = name if own else "shared", contenders[name]
        value, seconds = values.pop(key), 0.0
        for _ in range(calls[name]):
            value = contender.prepare(value)
            start = time.perf_counter()
            value = contender.run(value)
            seconds += time.perf_counter() - start
        values[key] = value
        return seconds / calls[name]

    for name in contenders:
        timed(name)
        calls[name] = max(1, round(0.02 / timed(name)))
    task = progress.add_task("  rounds", total=rounds)
    orders = random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(list(contenders), len(contenders)):
            contenders[name].seconds.append(timed(name))
        progress.advance(task)
    progress.remove_task(task)


def rows(
    case: str,
    dtype: str,
    contenders: dict[str, Contender],
    *,
    beside: str | None = None,
    reference: str = "optax",
) -> list[Row]:
    """What was measured, one row a contender.

    Args:
      case: what was done.
      dtype: on leaves of which dtype.
      contenders: those timed.
      beside: the contender whose time is subtracted, round by round, from that of
        the others, to give what they add to it.
      reference: the contender that the ratios are to.
    """
    own = {name: np.array(each.seconds) for name, each in contenders.items()}
    if beside is not None:
        own = {name: seconds - own[beside] for name, seconds in own.items()}
    medians = {name: float(np.median(seconds)) for name, seconds in own.items()}
    found = []
    for name, contender in contenders.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = own[name] / own[reference]
        low, ratio, high = map(float, np.quantile(ratios, [0.25, 0.5, 0.75]))
        if beside is not None:  # Differences may be about zero in a noisy round.
            ratio = medians[name] / medians[reference]
        row = {
            "case": case,
            "dtype": dtype,
            "contender": name,
            "milliseconds": round(1e3 * contender.median(), 3),
            "added_milliseconds": round(1e3 * medians[name], 3) if beside else None,
            "ratio": round(ratio, 3),
            "ratio_quartiles": [round(low, 3), round(high, 3)],
            "ratio_to": reference,
            "temporary_mb": None,
            "build_seconds": None,
        }
        found.append(row | contender.built)
    return found
