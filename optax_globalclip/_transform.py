"""The clip as an Optax gradient transformation."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ._axis_name import AxisName, leaf_axes
from ._clip import (
    NonFinite,
    UseNorm,
    check_finite,
    check_nonfinite,
    clip_leaves,
    norm_given,
    norm_of,
)
from ._leaves import split_leaves
from ._mesh import replicated
from ._norm import as_ord
from ._threshold import MaxNorm, ThresholdState, as_threshold, next_threshold


class ClipByGlobalNormState(NamedTuple):
    """State of :func:`clip_by_global_norm`: what the last update found and did.

    Attributes:
      global_norm: norm of the updates before the clip, float32 scalar; 0 at first.
      clip_scale: what the updates were multiplied by, float32 scalar; 1 at first,
        and wherever the updates were returned as they were.
      threshold: what the norm was clipped to, float32 scalar; inf at first, and
        where ``max_norm`` is None.
      num_updates: updates so far, int32 scalar; saturates, as the next two.
      num_clipped: how many of them were clipped, int32 scalar.
      num_nonfinite: how many of them had an inf or NaN entry, int32 scalar.
      threshold_state: the threshold's own state; ``()`` for a number or schedule.
    """

    global_norm: jax.Array
    clip_scale: jax.Array
    threshold: jax.Array
    num_updates: jax.Array
    num_clipped: jax.Array
    num_nonfinite: jax.Array
    threshold_state: ThresholdState


def clip_by_global_norm(
    max_norm: MaxNorm | None = None,
    *,
    ord: chex.Numeric = 2,
    nonfinite: NonFinite = "nan",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates by their global norm, and keeps the norm in the state.

    .. math:: g_i \leftarrow g_i \cdot \min(1, \text{max\_norm} / \lVert g \rVert)

    A drop-in for ``optax.clip_by_global_norm``. What it guarantees of the updates,
    and what it does in each edge case, is the table of :func:`clip_updates`. Of the
    state it guarantees that:

    * it has the same structure, shapes and dtypes from ``init`` and from every
      update, with and without ``jax_enable_x64``;
    * it lies, from ``init`` on, on every device of the mesh that the parameters are on;
    * ``init`` looks at no value: it takes None and abstract arrays as well;
    * ``None`` or ``optax.EmptyState()`` in its place, as in a bare call or in a
      checkpoint written with Optax's clip, stands for the state before any update.

    Args:
      max_norm: the largest global norm to let through: a number or scalar array, a
        schedule (called with ``num_updates``, before it increments), a
        :class:`Threshold`, or None to measure and never clip.
      ord: the order of the norm, a real number of at least 1 or ``inf``. Under
        ``optax.inject_hyperparams`` name it in ``static_args``: a traced one is
        right, but costs a second read of the updates.
      nonfinite: what becomes of updates with an inf or NaN entry: ``"nan"`` makes
        every entry NaN, ``"zero"`` makes every entry 0, ``"error"`` adds a
        ``checkify`` check. All are counted in ``num_nonfinite``, and passed through
        if ``max_norm`` is None.
      axis_name: as for :func:`global_norm`.

    Returns:
      A transformation whose ``update(updates, state, params=None, *, use_norm=None)``
      takes, as an extra argument, a scalar to use as the global norm.

    Raises:
      TypeError: for a ``max_norm`` that is none of these; from ``update``, for a leaf
        without a norm, by its path.
      ValueError: for a concrete ``max_norm`` that is negative, NaN or no scalar, an
        ``ord`` less than 1, an unknown ``nonfinite``.

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

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://proceedings.mlr.press/v28/pascanu13.html>`_, 2013
    """
    threshold = None if max_norm is None else as_threshold(max_norm)
    checked_ord = as_ord(ord)
    check_nonfinite(nonfinite)

    def init_fn(params: optax.Params) -> ClipByGlobalNormState:
        device = replicated(params)
        scalar = functools.partial(jnp.full, (), device=device)
        threshold_state = () if threshold is None else threshold.init()
        return ClipByGlobalNormState(
            global_norm=scalar(0, jnp.float32),
            clip_scale=scalar(1, jnp.float32),
            threshold=scalar(jnp.inf, jnp.float32),
            num_updates=scalar(0, jnp.int32),
            num_clipped=scalar(0, jnp.int32),
            num_nonfinite=scalar(0, jnp.int32),
            threshold_state=jax.device_put(threshold_state, device),
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState | None,
        params: optax.Params | None = None,
        *,
        use_norm: UseNorm = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, ClipByGlobalNormState]:
        del params, extra_args
        if state is None or isinstance(state, optax.EmptyState):
            state = init_fn(())
        leaves, join = split_leaves(updates)
        axes = leaf_axes(leaves, updates, axis_name)
        leaves, clip, new_state = _update(
            leaves,
            state,
            norm_given(use_norm, leaves, checked_ord, axes),
            None if threshold is None else threshold.update,
            checked_ord,
            nonfinite,
            axes,
        )
        check_finite(clip, nonfinite)
        return join(leaves), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnames=("nonfinite", "axes"))
def _update(leaves, state, use_norm, threshold_update, ord, nonfinite, axes):
    """All the arithmetic of one update, so that it is one call outside ``jit`` too."""
    norm = norm_of(leaves, use_norm, ord, axes)
    threshold, threshold_state = None, state.threshold_state
    if threshold_update is not None:
        measured = norm.as_float().astype(jnp.float32)
        threshold, threshold_state = next_threshold(
            threshold_update, measured, threshold_state, state.num_updates
        )
    leaves, clip = clip_leaves(leaves, norm, threshold, nonfinite)
    state = ClipByGlobalNormState(
        global_norm=clip.norm.astype(jnp.float32),
        clip_scale=clip.scale.astype(jnp.float32),
        threshold=clip.threshold.astype(jnp.float32),
        num_updates=count_if(state.num_updates, True),
        num_clipped=count_if(state.num_clipped, clip.clipped),
        num_nonfinite=count_if(state.num_nonfinite, ~clip.finite),
        threshold_state=threshold_state,
    )
    return leaves, clip, state


def count_if(counter: jax.Array, happened: jax.Array | bool) -> jax.Array:
    """The counter, incremented where it happened; it saturates."""
    return jnp.where(happened, optax.safe_increment(counter), counter)
