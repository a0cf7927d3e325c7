"""Skipping whole steps whose norm is not finite or too large."""

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ._axis_name import AxisName, leaf_axes
from ._clip import Measured, UseNorm, check_count, norm_given, norm_of
from ._leaves import is_float0, is_sparse, split_leaves, values_of, with_values
from ._mesh import replicated
from ._norm import as_ord
from ._threshold import MaxNorm, ThresholdState, as_threshold, next_threshold
from ._transform import count_if


class SkipByGlobalNormState(NamedTuple):
    """State of :func:`skip_by_global_norm`: what the last update found and did.

    Attributes:
      global_norm: norm of the updates, float32 scalar; 0 at first.
      threshold: above what norm they are skipped, float32 scalar; inf at first, and
        where ``max_norm`` is None.
      num_updates: updates so far, skipped ones too, int32 scalar; saturates, as the
        next two.
      num_skipped: how many of them were skipped, int32 scalar.
      num_consecutive_skips: how many of the last in a row, int32 scalar; so the last
        was skipped if it is not 0.
      threshold_state: the threshold's own state; ``()`` for a number or schedule.
      inner_state: state of the inner transformation after the last update that was
        not skipped.
    """

    global_norm: jax.Array
    threshold: jax.Array
    num_updates: jax.Array
    num_skipped: jax.Array
    num_consecutive_skips: jax.Array
    threshold_state: ThresholdState
    inner_state: optax.OptState


def skip_by_global_norm(
    inner: optax.GradientTransformation,
    max_norm: MaxNorm | None = None,
    *,
    ord: chex.Numeric = 2,
    axis_name: AxisName = None,
    max_consecutive_skips: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips updates whose norm is not finite or above a threshold, whole.

    For such a step the updates are zeros, and the state of ``inner`` stays as it was,
    bit for bit: no moment and no counter of an optimizer knows of it. For any other
    step, updates and state are those of ``inner``. Wrap the whole optimizer, with the
    learning rate and weight decay in it:

    ``skip_by_global_norm(optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3)),
    zscore_threshold(6.0))``

    A :func:`clip_by_global_norm` inside that comes first does not measure the norm a
    second time. Nothing waits for the device, or branches: ``inner`` always runs, and
    its results are selected, so that this can be vmapped, sharded and scanned over.

    Args:
      inner: the transformation to skip, such as a whole optimizer.
      max_norm: the largest norm of a step to be taken: a number or scalar array, a
        schedule (called with ``num_updates``, before it increments), a
        :class:`Threshold`, or None to skip non-finite updates only.
      ord: the order of the norm, a real number of at least 1 or ``inf``.
      axis_name: as for :func:`global_norm`.
      max_consecutive_skips: after so many skips in a row, a step above the threshold
        is taken, so that a threshold too low cannot stall a run for ever. One that is
        not finite is skipped all the same. None for no such limit.

    Returns:
      A transformation whose ``update(updates, state, params=None, *, use_norm=None)``
      takes, as an extra argument, a scalar to use as the global norm. It and all
      other extra arguments are handed on to ``inner``.

    Raises:
      TypeError: for an ``inner`` that is no transformation or a ``max_norm`` that is
        none of these; from ``update``, for a leaf without a norm, by its path.
      ValueError: for a concrete ``max_norm`` that is negative, NaN or no scalar, an
        ``ord`` less than 1, a ``max_consecutive_skips`` less than 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from optax_globalclip import skip_by_global_norm
      >>> tx = skip_by_global_norm(optax.adam(0.1), max_norm=10.0)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for grads in (jnp.ones(2), jnp.full(2, 99.0), jnp.full(2, jnp.nan)):
      ...     updates, state = tx.update(grads, state, params)
      >>> print(updates, state.num_skipped, optax.tree.get(state, "mu"))
      [0. 0.] 2 [0.1 0.1]
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"inner={inner!r} is no gradient transformation. Pass the optimizer first: "
            "skip_by_global_norm(optax.adam(1e-3), max_norm)."
        )
    inner = optax.with_extra_args_support(inner)
    threshold = as_threshold(math.inf if max_norm is None else max_norm)
    checked_ord = as_ord(ord)
    if max_consecutive_skips is not None:
        check_count(
            "max_consecutive_skips",
            max_consecutive_skips,
            at_least=0,
            otherwise=", or None for no limit",
        )

    def init_fn(params: optax.Params) -> SkipByGlobalNormState:
        device = replicated(params)
        scalar = functools.partial(jnp.full, (), device=device)
        return SkipByGlobalNormState(
            global_norm=scalar(0, jnp.float32),
            threshold=scalar(jnp.inf, jnp.float32),
            num_updates=scalar(0, jnp.int32),
            num_skipped=scalar(0, jnp.int32),
            num_consecutive_skips=scalar(0, jnp.int32),
            threshold_state=jax.device_put(threshold.init(), device),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        use_norm: UseNorm = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipByGlobalNormState]:
        leaves, join = split_leaves(updates)
        axes = leaf_axes(leaves, updates, axis_name)
        given = norm_given(use_norm, leaves, checked_ord, axes)
        norm, taken, new_state = _judge(
            leaves,
            state._replace(inner_state=None),
            given,
            threshold.update,
            checked_ord,
            axes,
            max_consecutive_skips,
        )
        if given is None:
            use_norm = Measured(leaves, norm, checked_ord, axes)
        updates, inner_state = inner.update(
            join(leaves), state.inner_state, params, use_norm=use_norm, **extra_args
        )
        updates, inner_state = _select(taken, updates, inner_state, state.inner_state)
        return updates, new_state._replace(inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnames=("axes", "max_consecutive_skips"))
def _judge(leaves, state, use_norm, threshold_update, ord, axes, max_consecutive_skips):
    """The norm, whether the step is to be taken, and the state but for the inner."""
    norm = norm_of(leaves, use_norm, ord, axes)
    measured = norm.as_float()
    threshold, threshold_state = next_threshold(
        threshold_update,
        measured.astype(jnp.float32),
        state.threshold_state,
        state.num_updates,
    )
    threshold = jnp.maximum(jnp.asarray(threshold, measured.dtype), 0)
    # So that a threshold that is NaN skips, rather than lets all through.
    taken = measured <= threshold
    if max_consecutive_skips is not None:
        taken |= state.num_consecutive_skips >= max_consecutive_skips
    taken &= jnp.isfinite(norm.value)
    consecutive = count_if(state.num_consecutive_skips, True)
    return (
        norm,
        taken,
        state._replace(
            global_norm=measured.astype(jnp.float32),
            threshold=threshold.astype(jnp.float32),
            num_updates=count_if(state.num_updates, True),
            num_skipped=count_if(state.num_skipped, ~taken),
            num_consecutive_skips=jnp.where(taken, 0, consecutive),
            threshold_state=threshold_state,
        ),
    )


@jax.jit
def _select(taken, updates, new_state, state):
    """Updates and new state if taken, else zeros and the state as it was."""

    def or_zero(leaf):
        values = values_of(leaf)
        if is_float0(values):
            return leaf
        return with_values(leaf, jnp.where(taken, values, jnp.zeros_like(values)))

    updates = jax.tree.map(or_zero, updates, is_leaf=is_sparse)
    return updates, jax.tree.map(functools.partial(jnp.where, taken), new_state, state)
