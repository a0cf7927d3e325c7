"""Thresholds: what the norm is clipped to, at each step."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import optax
from jax.tree_util import Partial

from ._clip import check_scalar

ThresholdState = chex.ArrayTree


class Threshold(NamedTuple):
    """A threshold that may change from step to step: a pair of pure functions.

    Attributes:
      init: ``init() -> state``, a tree of arrays whose structure, shapes and dtypes
        never change; ``()`` for a threshold without memory.
      update: ``update(norm, state, count) -> (threshold, state)``. ``norm`` is the
        global norm before the clip, a float32 scalar; ``count`` the number of
        updates before this one, an int32 scalar; ``threshold`` a real scalar. The
        new state is kept only where ``norm`` is finite.

    Example:
      One that clips to twice the norm of the step before:

      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> double = optax_globalclip.Threshold(
      ...     init=lambda: jnp.float32(jnp.inf),
      ...     update=lambda norm, last, count: (2 * last, norm),
      ... )
      >>> tx = optax_globalclip.clip_by_global_norm(double)
      >>> state = tx.init(None)
      >>> for grads in (jnp.ones(1), jnp.full(1, 5.0)):
      ...     clipped, state = tx.update(grads, state)
      >>> print(clipped, state.threshold)
      [2.] 2.0
    """

    init: Callable[[], ThresholdState]
    update: Callable[
        [jax.Array, ThresholdState, jax.Array],
        tuple[jax.typing.ArrayLike, ThresholdState],
    ]


MaxNorm = chex.Numeric | optax.Schedule | Threshold | None


def as_threshold(max_norm: MaxNorm) -> Threshold | None:
    """Expresses all that ``max_norm`` can be as a threshold; None stays: never clip.

    ``update`` becomes a ``Partial``, so that it can be handed to ``jax.jit``: another
    constant is then another operand, and compiles nothing.
    """
    if max_norm is None:
        return None
    if isinstance(max_norm, Threshold):
        return max_norm._replace(update=Partial(max_norm.update))
    if callable(max_norm):
        return Threshold(_no_state, Partial(_Scheduled(max_norm)))
    check_scalar("max_norm", max_norm)
    return Threshold(_no_state, Partial(_constant, max_norm))


def _no_state() -> ThresholdState:
    return ()


def _constant(
    max_norm: chex.Numeric, norm: jax.Array, state: ThresholdState, count: jax.Array
) -> tuple[chex.Numeric, ThresholdState]:
    del norm, count
    return max_norm, state


@dataclasses.dataclass(frozen=True)
class _Scheduled:
    """A schedule as ``Threshold.update``; ``jit`` sees two of one schedule as equal."""

    schedule: optax.Schedule

    def __call__(
        self, norm: jax.Array, state: ThresholdState, count: jax.Array
    ) -> tuple[jax.typing.ArrayLike, ThresholdState]:
        del norm
        return self.schedule(count), state
