"""Thresholds: what the norm is clipped to, at each step."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import as_count, as_norm, as_scalar, check_same, exported, unwrapped
from ._mesh import on_mesh_of, placed
from ._norm import measure

# The longest span of moving averages that a change of level is waited for.
_LONGEST_SPAN = 2000.0

ThresholdState: TypeAlias = Any  # A tree of arrays, which the threshold alone knows.


class Threshold(NamedTuple):
    """A threshold that may change from step to step: a pair of pure functions.

    Attributes:
      init: ``init() -> state``, a tree of arrays whose structure, shapes and dtypes
        never change; a tree without leaves for a threshold without memory.
      update: ``update(norm, state, count) -> (threshold, state)``. ``norm`` is the
        global norm before the clip, a float32 scalar; ``count`` the number of
        updates before this one, an int32 scalar; ``threshold`` a real scalar, which
        the norm is compared with in float32. The new state is kept only if ``norm``
        is finite. Under ``jit`` both functions run once, when it is traced.

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


# Wider than optax.Schedule, in which a count cannot be compared with a number.
Schedule: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike]
MaxNorm: TypeAlias = jax.typing.ArrayLike | Schedule | Threshold


def as_max_norm(max_norm: MaxNorm | None) -> MaxNorm | None:
    """``max_norm``, checked and converted to a float if it is a number."""
    if max_norm is None or callable(max_norm) or isinstance(max_norm, Threshold):
        return max_norm
    return as_scalar("max_norm", max_norm)


def begin(before: Any, max_norm: MaxNorm | None, params: Any) -> Any:
    """The state before any update, with the threshold's own, where the parameters lie.

    ``before`` holds scalars of NumPy: ``jax_debug_infs`` objects to a computed inf.
    """
    own = _initial(max_norm) if isinstance(max_norm, Threshold) else None
    own = own if jax.tree.leaves(own) else None
    return placed(before._replace(threshold_state=own), params)


def next_threshold(max_norm, leaves, use_norm, ord, state) -> tuple[Any, Any, Any]:
    """The norm as it is to be judged, the threshold, and the threshold's new state.

    Measures if the threshold needs it, unless the user gives a norm. A
    :class:`Threshold` works in float32, so its norm is judged in float32.
    """
    norm = as_norm(use_norm)
    if isinstance(max_norm, Threshold):
        norm = measure(leaves, ord, norm)
        norm = norm._replace(norm=norm.norm.astype(jnp.float32))
        own = state.threshold_state
        own = on_mesh_of(norm.norm, own if jax.tree.leaves(own) else _initial(max_norm))
        threshold, new = max_norm.update(norm.norm, own, state.num_updates)
        check_same("The state that Threshold.update returned", new, own, dtypes=True)
        new = admitted(norm.norm, new, own) if jax.tree.leaves(own) else None
        return norm, as_scalar("the threshold of Threshold.update", threshold), new
    if callable(max_norm):
        threshold = max_norm(state.num_updates)
        return norm, as_scalar("the value of the schedule max_norm", threshold), None
    return norm, max_norm, None


def admitted(norm: jax.Array, proposed: Any, state: Any) -> Any:
    """The state proposed if the norm is finite, else the state as it was."""
    finite = jnp.isfinite(norm)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), proposed, state)


def _initial(threshold: Threshold) -> ThresholdState:
    """What its ``init`` returns, as copies: they may be given out twice, or donated.

    Python numbers become float32 and int32, with and without ``jax_enable_x64``.
    """

    def copy(leaf: Any) -> Any:
        leaf = unwrapped(leaf)
        if isinstance(leaf, jax.Array):
            return jnp.array(leaf, leaf.dtype, copy=True)
        dtype = jnp.result_type(leaf)
        return np.array(leaf, dtype if hasattr(leaf, "dtype") else _NARROW[dtype.kind])

    return jax.tree.map(copy, threshold.init())


_NARROW = {"b": np.bool_, "i": np.int32, "f": np.float32, "c": np.complex64}


@exported
class ZScoreState(NamedTuple):
    """State of :func:`zscore_threshold`.

    Attributes:
      norm_mean: running mean of the norms, float32 scalar.
      norm_std: their running standard deviation, float32 scalar. It, and not its
        square, so that norms of 1e30 have one.
      num_norms: how many finite norms there were, int32 scalar; saturates.
      spike_sum: the cumulative sum that restarts the warm-up, float32 scalar.
    """

    norm_mean: Any
    norm_std: Any
    num_norms: Any
    spike_sum: Any


@exported
class QuantileState(NamedTuple):
    """State of :func:`quantile_threshold`.

    Attributes:
      recent_norms: the last finite norms, oldest first, float32 of shape [window];
        inf in front of them until there are enough.
      num_norms: how many finite norms there were, int32 scalar; saturates.
    """

    recent_norms: Any
    num_norms: Any


def zscore_threshold(
    z: float = 2.5, *, decay: float = 0.97, warmup_steps: int = 25
) -> Threshold:
    r"""Clips norms that are more than ``z`` standard deviations above their mean.

    This is ZClip. With the mean :math:`\mu` and the standard deviation :math:`\sigma`
    of the norms so far, a norm :math:`n > \mu + z \sigma` is a spike. It is clipped to

    .. math:: \mu + \frac{z^2}{(n - \mu) / \sigma} \sigma,

    so higher spikes are clipped to lower values. If there is no spike, the threshold is
    :math:`\mu + z \sigma`. The first ``warmup_steps`` norms are never clipped, and
    :math:`\mu, \sigma` are their moments. Then, for a norm n clipped to c and with
    :math:`\alpha` the ``decay``,

    .. math::

        \mu' = \alpha \mu + (1 - \alpha) c, \qquad
        \sigma'^2 = \alpha \sigma^2 + (1 - \alpha) (c - \mu')^2.

    If the norms rise to a new level for good, plain ZClip keeps clipping: each norm
    counts as a spike, and a spike hardly moves the mean. So there are two departures:

    * If :math:`\sigma = 0`, there is no z-score, and a norm above :math:`\mu` is not
      clipped.
    * Each spike adds 1 to a sum, each other norm takes :math:`1/z^2` off it, down to 0.
      If the sum reaches ``warmup_steps`` plus the span of the averages,
      :math:`2/(1 - \alpha)` but at most 2,000, the warm-up begins again. By Cantelli's
      inequality, a share of at most :math:`1/(1 + z^2)` of the norms can be spikes if
      :math:`\mu` and :math:`\sigma` are right, whatever the distribution. The sum then
      has no upward drift. A greater share shows that they are out of date.

    The first ``warmup_steps`` are unclipped. Chain a constant clip in front to limit
    those too. The authors' code differs in that it

    * clips to a constant 1 as well, even in warm-up;
    * adds 1e-6 to the standard deviation, which decides the threshold of small norms;
    * takes an inf or NaN into its averages, and never clips again. Here neither
      enters them nor counts for ``warmup_steps``.

    Args:
      z: how many standard deviations above the mean, at least 0. It may be an array.
      decay: of the moving averages, from 0 to 1; 0.97 looks back some 30 steps. It may
        be an array.
      warmup_steps: how many finite norms to see before any is clipped; static.

    Returns:
      A :class:`Threshold`, to pass as ``max_norm``.

    Raises:
      TypeError: if ``warmup_steps`` is an array.
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
      <https://arxiv.org/abs/2504.02507>`_, 2025; Page, `Continuous inspection schemes
      <https://doi.org/10.1093/biomet/41.1-2.100>`_, 1954, on cumulative sums
    """
    as_scalar("z", z, 0, sys.float_info.max)
    as_scalar("decay", decay, 0, 1)
    warmup_steps = as_count("warmup_steps", warmup_steps, 0)
    # Subtracted here: in float64, if it is a Python number.
    weight = 1 - decay

    def init() -> ZScoreState:
        return ZScoreState(np.float32(0), np.float32(0), np.int32(0), np.float32(0))

    def update(norm, state, count):
        check_same("threshold_state", state, init())
        return _zscore_step(norm, state, z, weight, max(warmup_steps, 1))

    return Threshold(init, update)


@jax.jit
def _zscore_step(measured, state, z, weight, warmup_steps):
    z, weight = jnp.asarray(z, jnp.float32), jnp.asarray(weight, jnp.float32)
    span = 2 / jnp.maximum(weight, 2 / _LONGEST_SPAN)
    mean, std = state.norm_mean, state.norm_std
    # One that is not finite is not admitted in the end.
    norm = jnp.where(jnp.isfinite(measured), measured, 0)
    margin = z * std
    judged = state.num_norms >= warmup_steps
    above = judged & (norm > mean + margin)
    spike = above & (std > 0)
    # The ratio, as the square of the margin overflows for norms of 1e20.
    share = jnp.where(spike, margin / jnp.where(spike, norm - mean, 1), 1)
    judged &= spike | ~above
    threshold = jnp.where(judged, mean + margin * share, jnp.inf)

    num_norms = jnp.asarray(optax.safe_increment(state.num_norms))
    warming_up = num_norms <= warmup_steps
    # In warm-up the moments of all norms so far; later the authors' moving
    # averages, in which a deviation is that from the new mean.
    weight = jnp.where(warming_up, 1 / num_norms.astype(jnp.float32), weight)
    kept = jnp.where(warming_up, 1 - weight, (1 - weight) ** 2)
    deviation = jnp.minimum(norm, threshold) - mean
    less = jnp.maximum(state.spike_sum - 1 / jnp.maximum(z, 1e-9) ** 2, 0)
    proposed = ZScoreState(
        mean + weight * deviation,
        _moved_std(std, deviation, weight, kept),
        num_norms,
        spike_sum=jnp.where(spike, state.spike_sum + 1, less),
    )
    restart = proposed.spike_sum >= warmup_steps + span
    new_state = jax.tree.map(lambda new: jnp.where(restart, 0, new), proposed)
    return threshold, admitted(measured, new_state, state)


def _moved_std(std, deviation, weight, kept):
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
    """Clips to a quantile of the last norms, including the current one.

    This is AutoClip. The quantile is interpolated linearly, as ``numpy.quantile``
    does: 0 clips every step to the smallest norm in the window, 1 never clips.

    The authors' code differs in that it

    * keeps every norm ever seen, where this keeps the last ``window``;
    * clips from the first step on;
    * takes an inf or NaN into the history for good.

    Args:
      q: which quantile, from 0 to 1, static; 0.5 clips the longer half of all steps.
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
    q = as_scalar("q", q, 0, 1, static=True)
    window = as_count("window", window, 1)
    warmup_steps = as_count("warmup_steps", warmup_steps, 0)
    # Where the quantile of 1, 2, ... sorted norms lies. In float64, here and not in
    # the update: between 1 and a spike of 1e6 a float32 position is 4 off.
    below, share = np.divmod(q * np.arange(window), 1)
    below, share = below.astype(np.int32), share.astype(np.float32)

    def init() -> QuantileState:
        return QuantileState(np.full(window, np.inf, np.float32), np.int32(0))

    def update(norm, state, count):
        check_same("threshold_state", state, init())
        return _quantile_step(norm, state, below, share, warmup_steps)

    return Threshold(init, update)


@jax.jit
def _quantile_step(norm, state, below, share, warmup_steps):
    proposed = QuantileState(
        jnp.append(state.recent_norms[1:], norm),
        jnp.asarray(optax.safe_increment(state.num_norms)),
    )
    new_state = admitted(norm, proposed, state)
    last = jnp.clip(new_state.num_norms, 1, below.size) - 1
    ascending = jnp.sort(new_state.recent_norms)
    # Those that are not there yet are inf, and inf - inf is NaN.
    ascending = jnp.where(jnp.isfinite(ascending), ascending, 0)
    low = _entry(below, last)
    lower, upper = (_entry(ascending, i) for i in (low, jnp.minimum(low + 1, last)))
    quantile = lower + _entry(share, last) * (upper - lower)
    judged = (state.num_norms >= warmup_steps) & (new_state.num_norms > 0)
    return jnp.where(judged, quantile, jnp.inf), new_state


def _entry(array: jax.Array, i: jax.Array) -> jax.Array:
    """``array[i]``, selected: JAX cannot vmap an index over an explicit axis."""
    here = jnp.arange(array.size, dtype=i.dtype) == i
    return jnp.sum(jnp.where(here, array, 0), dtype=array.dtype)
