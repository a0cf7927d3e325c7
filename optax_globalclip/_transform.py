"""The clip as a gradient transformation, and its state."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import NonFinite, Numeric, as_ord, check_nonfinite, check_same, exported
from ._clip import check_finite, clip_leaves
from ._mesh import on_mesh_of
from ._norm import measure
from ._threshold import MaxNorm, ThresholdState, as_max_norm, begin, next_threshold
from ._tree import AxisName, split_updates


@exported
class ClipByGlobalNormState(NamedTuple):
    """State of :func:`clip_by_global_norm`: what the last update found and did.

    Attributes:
      global_norm: norm of the updates before the clip, float32 scalar; 0 at first.
      clip_scale: what the updates were multiplied by, float32 scalar; 1 at first,
        and if the updates were returned as they were. At least the smallest normal
        float32, unless every update became 0.
      threshold: what the norm was clipped to, float32 scalar; inf at first, and
        where ``max_norm`` is None.
      num_updates: updates so far, int32 scalar; saturates, as the next two.
      num_clipped: how many of them were clipped, int32 scalar.
      num_nonfinite: how many of them had an inf or NaN entry, int32 scalar.
      threshold_state: the threshold's own state; None if it keeps nothing, as
        a number or a schedule.
    """

    global_norm: jax.Array
    clip_scale: jax.Array
    threshold: jax.Array
    num_updates: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    threshold_state: ThresholdState


_FIELDS: list[Any] = [*np.array([0, 1, math.inf], np.float32), *np.zeros(3, np.int32)]
_BEFORE = ClipByGlobalNormState(*_FIELDS, threshold_state=None)


def clip_by_global_norm(
    max_norm: MaxNorm | None,
    *,
    ord: float | None = None,
    nonfinite: NonFinite = "nan",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates by their global norm, and keeps the norm in the state.

    .. math:: g_i \leftarrow g_i \cdot \min(1, \text{max\_norm} / \lVert g \rVert)

    A drop-in for ``optax.clip_by_global_norm``. :func:`clip_updates` has the guarantees
    and the edge cases of the updates.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_globalclip import clip_by_global_norm
      >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(1.0))
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
      >>> updates, state = jax.jit(tx.update)(grads, state, params)
      >>> print(optax.tree.get(state, "global_norm"), updates["b"])
      5.0 [-0.8]

    Args:
      max_norm: the largest global norm to let through: a number or scalar array, a
        schedule (called with ``num_updates``, before it increments), a
        :class:`Threshold`, or None to measure and never clip.
      ord: the order of the norm, static: a number of at least 1 or ``inf``; None for
        the 2-norm.
      nonfinite: what becomes of updates with an inf or NaN entry: ``"nan"`` makes
        every entry NaN, ``"zero"`` makes every entry 0, ``"error"`` adds a
        ``checkify`` check. Such updates are counted in ``num_nonfinite``. If
        ``max_norm`` is None, they are passed through, and only ``"nan"`` is accepted.
      axis_name: as for :func:`global_norm`.

    Returns:
      A transformation whose ``update(updates, state, params=None, *, use_norm=None)``
      takes, as an extra argument, a scalar to use as the global norm.

    Raises:
      TypeError: for a ``max_norm`` that is none of these, or an array as ``ord``; from
        ``update``, for a leaf without a norm, by its path.
      ValueError: for a ``max_norm`` that is a negative or NaN number, or no scalar, an
        ``ord`` less than 1, a ``nonfinite`` that is unknown, or not ``"nan"`` while
        ``max_norm`` is None.

    Guarantees of the state:

    * It has the same structure, shapes and dtypes from ``init`` and from every
      update, with and without ``jax_enable_x64``.
    * If ``init`` is called outside ``jit``, the state lies where the parameters lie:
      on every device of their mesh, or on their one device.
    * ``init`` accepts None and ``jax.ShapeDtypeStruct`` leaves.
    * A foreign state (None, ``optax.EmptyState()``, another transformation's)
      restarts the counters. Optax's clip ignores its state, and published code relies
      on this. (The state of a clip with another adaptive threshold raises.)

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://proceedings.mlr.press/v28/pascanu13.html>`_, 2013
    """
    max_norm, order = as_max_norm(max_norm), as_ord(ord)
    check_nonfinite(nonfinite, max_norm)

    def init_fn(params: optax.Params | None) -> ClipByGlobalNormState:
        return begin(_BEFORE, max_norm, params)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        use_norm: Numeric | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ClipByGlobalNormState]:
        del params, extra_args
        if not isinstance(state, ClipByGlobalNormState):
            state = init_fn(None)
        # Without the threshold's state: what is the user's is handed to no jit of ours.
        own = state._replace(threshold_state=None)
        check_same("state", own, _BEFORE)
        leaves, join = split_updates(updates, axis_name)
        norm, threshold, new = next_threshold(max_norm, leaves, use_norm, order, state)
        arrays, clip, own = _clip(leaves, norm, threshold, own, order, nonfinite)
        check_finite(clip, nonfinite)
        return join(arrays), own._replace(threshold_state=new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnames=("ord", "nonfinite"))
def _clip(leaves, norm, threshold, state, ord, nonfinite):
    """Clips and counts, and measures unless a threshold needed the norm before.

    Outside ``jit`` an update by a number or a schedule is this one call.
    """
    norm = measure(leaves, ord, norm)
    arrays, clip = clip_leaves(leaves, norm, threshold, nonfinite)
    state = on_mesh_of(clip.norm, state)
    state = state._replace(
        global_norm=clip.norm.astype(jnp.float32),
        clip_scale=clip.scale.astype(jnp.float32),
        threshold=clip.threshold.astype(jnp.float32),
        num_updates=count_if(True, state.num_updates),
        num_clipped=count_if(clip.clipped, state.num_clipped),
        num_nonfinite=count_if(~clip.finite, state.num_nonfinite),
    )
    return arrays, clip, state


def count_if(happened: jax.Array | bool, counter: jax.Array) -> jax.Array:
    """The counter, incremented if it happened; int32, and it saturates."""
    return jnp.where(happened, optax.safe_increment(counter), counter).astype(jnp.int32)
