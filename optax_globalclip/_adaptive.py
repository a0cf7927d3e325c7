"""Thresholds that adapt to the norms seen so far."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._clip import check_count, check_number
from ._threshold import Threshold, admitted


class ZScoreState(NamedTuple):
    """State of :func:`zscore_threshold`.

    Attributes:
      norm_mean: running mean of the norms, float32 scalar.
      norm_std: their running standard deviation, float32 scalar. It, and not its
        square, so that norms of 1e30 have one.
      num_norms: how many finite norms there were, int32 scalar; saturates.
    """

    norm_mean: jax.Array
    norm_std: jax.Array
    num_norms: jax.Array


class QuantileState(NamedTuple):
    """State of :func:`quantile_threshold`.

    Attributes:
      recent_norms: the last finite norms, oldest first, float32 of shape [window];
        inf in front of them until there are enough.
      num_norms: how many finite norms there were, int32 scalar; saturates.
    """

    recent_norms: jax.Array
    num_norms: jax.Array


def zscore_threshold(
    z: float = 2.5, *, decay: float = 0.97, warmup_steps: int = 25
) -> Threshold:
    r"""Clips norms that are more than ``z`` standard deviations above their mean.

    This is ZClip. A norm :math:`n` above :math:`\mu + z \sigma` is a spike, and
    clipped to

    .. math:: \mu + \frac{z^2}{(n - \mu) / \sigma} \sigma,

    the lower, the higher it is. The mean and the variance are those of the first
    ``warmup_steps`` norms, which are never clipped, then exponential moving averages
    over norms as clipped. Where there is no spike the threshold is
    :math:`\mu + z \sigma`.

    Norms that rise for good, within a few steps, are taken for spikes for good, and
    clipped to little more than the mean before: raise ``z`` or lower ``decay`` if
    yours do. A spike among the first norms counts in full: chain a constant as well
    if yours begin with some.

    It departs from the authors' code, which

    * clips to a constant 1 as well, even in warm-up: chain a second
      :func:`clip_by_global_norm` for that;
    * adds 1e-6 to the standard deviation, which for norms that small decides the
      threshold;
    * takes an inf or NaN into its averages, and never clips again: here neither
      enters them nor counts for ``warmup_steps``.

    Args:
      z: how many standard deviations above the mean, a number of at least 0.
      decay: of the moving averages, from 0 to 1; 0.97 looks back some 30 steps.
      warmup_steps: how many finite norms to see before any is clipped.

    Returns:
      A :class:`Threshold`, to pass as ``max_norm``.

    Raises:
      ValueError: for an argument out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> threshold = optax_globalclip.zscore_threshold(warmup_steps=4)
      >>> tx = optax_globalclip.clip_by_global_norm(threshold)
      >>> state = tx.init(None)
      >>> for norm in (1.0, 1.2, 0.8, 1.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(f"{state.global_norm:.0f} {state.threshold:.3f}")
      100 1.001

    References:
      Kumar et al., `ZClip: Adaptive Spike Mitigation for LLM Pre-Training
      <https://arxiv.org/abs/2504.02507>`_, 2025
    """
    check_number("z", z, lambda z: 0 <= z < math.inf, "a finite number of at least 0")
    check_number("decay", decay, lambda decay: 0 <= decay <= 1, "a number from 0 to 1")
    check_count("warmup_steps", warmup_steps, at_least=0)
    warmup = max(warmup_steps, 1)

    def init() -> ZScoreState:
        return ZScoreState(jnp.float32(0), jnp.float32(0), jnp.int32(0))

    def update(
        norm: jax.Array, state: ZScoreState, count: jax.Array
    ) -> tuple[jax.Array, ZScoreState]:
        del count
        mean, std, _ = state
        margin = z * std
        spike = jnp.isfinite(norm) & (norm > mean + margin)
        # The ratio, as the square of the margin overflows for norms of 1e20.
        share = jnp.where(spike, margin / jnp.where(spike, norm - mean, 1), 1)
        judged = state.num_norms >= warmup
        threshold = jnp.where(judged, mean + margin * share, jnp.inf)

        num_norms = jnp.asarray(optax.safe_increment(state.num_norms))
        warming_up = num_norms <= warmup
        # In warm-up the moments of all norms so far; later the authors' moving
        # averages, in which a deviation is that from the new mean.
        weight = jnp.where(warming_up, 1 / num_norms.astype(jnp.float32), 1 - decay)
        kept = jnp.where(warming_up, 1 - weight, (1 - weight) ** 2)
        deviation = jnp.minimum(norm, threshold) - mean
        proposed = ZScoreState(
            mean + weight * deviation,
            _moved_std(std, deviation, weight, kept),
            num_norms,
        )
        return threshold, admitted(norm, proposed, state)

    return Threshold(init, update)


def _moved_std(
    std: jax.Array, deviation: jax.Array, weight: jax.Array, kept: jax.Array
) -> jax.Array:
    """The root of ``(1 - weight) * std**2 + weight * kept * deviation**2``.

    As a change to ``std``: the roundings of a product or of ``jnp.hypot`` at every
    step add up, to 4e-4 in 10,000 steps at a decay of 0.999, where these are 4e-6.
    """
    usual = jnp.abs(deviation) < 1e6 * std
    ratio = jnp.where(usual, deviation / jnp.where(usual, std, 1), 0)
    growth = weight * (kept * ratio * ratio - 1)
    moved = std + std * growth / (1 + jnp.sqrt(1 + growth))
    return jnp.where(usual, moved, jnp.sqrt(weight * kept) * jnp.abs(deviation))


def quantile_threshold(
    q: float, *, window: int = 1000, warmup_steps: int = 25
) -> Threshold:
    """Clips to a quantile of the last norms, the one at hand among them.

    This is AutoClip. The quantile is interpolated linearly, as ``numpy.quantile``
    does: 0 clips every step to the smallest norm in the window, 1 never clips.

    It departs from the authors' code, which keeps every norm ever seen (here they are
    the last ``window``), clips from the first step on, and takes an inf or NaN into
    the history for good.

    Args:
      q: which quantile, from 0 to 1; the authors found 0.1 to do best.
      window: how many norms to look back, at least 1. They are kept in the state.
      warmup_steps: how many finite norms to see before any is clipped.

    Returns:
      A :class:`Threshold`, to pass as ``max_norm``.

    Raises:
      ValueError: for an argument out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> threshold = optax_globalclip.quantile_threshold(0.5, warmup_steps=4)
      >>> tx = optax_globalclip.clip_by_global_norm(threshold)
      >>> state = tx.init(None)
      >>> for norm in (1.0, 4.0, 2.0, 3.0, 100.0):
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates, state.threshold)
      [3.] 3.0

    References:
      Seetharaman et al., `AutoClip: Adaptive Gradient Clipping for Source Separation
      Networks <https://arxiv.org/abs/2007.14469>`_, 2020
    """
    check_number("q", q, lambda q: 0 <= q <= 1, "a number from 0 to 1")
    check_count("window", window, at_least=1)
    check_count("warmup_steps", warmup_steps, at_least=0)
    # Where the quantile of 1, 2, ... sorted norms lies. In float64, here and not in
    # the update: between 1 and a spike of 1e6 a float32 position is 4 off.
    positions = q * np.arange(window)
    below, share = np.divmod(positions, 1)

    def init() -> QuantileState:
        return QuantileState(jnp.full(window, jnp.inf, jnp.float32), jnp.int32(0))

    def update(
        norm: jax.Array, state: QuantileState, count: jax.Array
    ) -> tuple[jax.Array, QuantileState]:
        del count
        proposed = QuantileState(
            jnp.append(state.recent_norms[1:], norm),
            jnp.asarray(optax.safe_increment(state.num_norms)),
        )
        new_state = admitted(norm, proposed, state)
        last = jnp.clip(new_state.num_norms, 1, window) - 1
        ascending = jnp.sort(new_state.recent_norms)
        low = jnp.asarray(below, jnp.int32)[last]
        values = ascending[low], ascending[jnp.minimum(low + 1, last)]
        quantile = values[0] + jnp.asarray(share, jnp.float32)[last] * (
            values[1] - values[0]
        )
        judged = (state.num_norms >= warmup_steps) & (new_state.num_norms > 0)
        return jnp.where(judged, quantile, jnp.inf), new_state

    return Threshold(init, update)
