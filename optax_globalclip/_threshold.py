"""Thresholds: what the norm is clipped to, at each step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from ._clip import check_scalar

ThresholdState = Any  # A tree of arrays, which the threshold alone knows.
_State = TypeVar("_State")


class Threshold(NamedTuple):
    """A threshold that may change from step to step: a pair of pure functions.

    Attributes:
      init: ``init() -> state``, a tree of arrays whose structure, shapes and dtypes
        never change; ``()`` for a threshold without memory.
      update: ``update(norm, state, count) -> (threshold, state)``. ``norm`` is the
        global norm before the clip, a float32 scalar; ``count`` the number of
        updates before this one, an int32 scalar; ``threshold`` a real scalar. The
        new state is kept only where ``norm`` is finite.

    :func:`zscore_threshold` and :func:`quantile_threshold` are two.

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


MaxNorm = chex.Numeric | optax.Schedule | Threshold


def as_threshold(max_norm: MaxNorm) -> Threshold:
    """Expresses all that ``max_norm`` can be as a threshold.

    ``update`` becomes a ``Partial``, so that it can be handed to ``jax.jit``: another
    constant is then another operand, and compiles nothing.
    """
    if isinstance(max_norm, Threshold):
        return max_norm._replace(update=Partial(max_norm.update))
    if callable(max_norm):
        return Threshold(_no_state, Partial(_Scheduled(max_norm)))
    check_scalar("max_norm", max_norm)
    return Threshold(_no_state, Partial(_constant, max_norm))


def next_threshold(
    update: Callable, norm: jax.Array, state: ThresholdState, count: jax.Array
) -> tuple[chex.Numeric, ThresholdState]:
    """What ``update`` returns, but for a state that only finite norms enter."""
    threshold, proposed = update(norm, state, count)
    check_scalar("the threshold", threshold)
    return threshold, admitted(norm, proposed, state)


def admitted(norm: jax.Array, proposed: _State, state: _State) -> _State:
    """The state proposed where the norm is finite, else the state as it was."""
    finite = jnp.isfinite(norm)
    return jax.tree.map(functools.partial(jnp.where, finite), proposed, state)


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
