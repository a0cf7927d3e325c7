"""The skip around an optimizer, and its state."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import as_count, as_ord, check_same, exported
from ._clip import clip_leaves
from ._mesh import laid_out_like, on_mesh_of, zero_if
from ._norm import measure
from ._threshold import MaxNorm, ThresholdState, as_max_norm, begin, next_threshold
from ._transform import count_if
from ._tree import AxisName, is_float0, is_sparse, split_updates, values_of, with_values


@exported
class SkipByGlobalNormState(NamedTuple):
    """State of :func:`skip_by_global_norm`: what the last update found and did.

    Attributes:
      global_norm: norm of the updates, float32 scalar; 0 at first.
      threshold: the norm above which they are skipped, float32 scalar; inf at first,
        and where ``max_norm`` is None.
      num_updates: updates so far, skipped ones too, int32 scalar; saturates, as the
        next two.
      num_skipped: how many of them were skipped, int32 scalar.
      num_consecutive_skips: how many of the latest in a row were skipped, int32
        scalar; 0 if the last one was taken.
      threshold_state: the threshold's own state; None if it keeps nothing.
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


_FIELDS: list[Any] = [*np.array([0, math.inf], np.float32), *np.zeros(3, np.int32)]
_BEFORE = SkipByGlobalNormState(*_FIELDS, threshold_state=None, inner_state=())


def skip_by_global_norm(
    inner: optax.GradientTransformation,
    max_norm: MaxNorm | None = None,
    *,
    ord: float | None = None,
    axis_name: AxisName = None,
    max_consecutive_skips: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips every step with an inf or NaN entry, or a norm above a threshold.

    For such a step the updates are zeros, and the state of ``inner`` stays as it was,
    bit for bit, with all its moments and counters. For any other step, updates and
    state are those of ``inner``. Wrap the whole optimizer, with the
    learning rate and weight decay in it::

        skip_by_global_norm(
            optax.chain(clip_by_global_norm(1.0), optax.adamw(1e-3)),
            zscore_threshold(6.0),
        )

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

    The update does not block Python and has no branch: ``inner`` always runs, with the
    updates as they are, and its results are selected. So it can be vmapped, sharded and
    scanned over. A :func:`clip_by_global_norm` that comes first inside does not read
    the updates a second time under ``jit``: XLA merges the two norms. (An inner check,
    such as a clip with ``nonfinite="error"``, fires for a skipped step too.)

    Put ``optax.MultiSteps`` inside. Around a skip it keeps a NaN in its accumulator for
    ever, since Optax resets that by multiplying with 0, and no step is ever taken
    again: pass it ``should_skip_update_fn=optax.skip_not_finite``.

    Args:
      inner: the transformation to skip, such as a whole optimizer.
      max_norm: the largest norm of a step to be taken: a number or scalar array, a
        schedule (called with ``num_updates``, before it increments), a
        :class:`Threshold`, or None to skip non-finite updates only.
      ord: the order of the norm, static: a number of at least 1 or ``inf``; None for
        the 2-norm.
      axis_name: as for :func:`global_norm`.
      max_consecutive_skips: after so many skips in a row, a step above the threshold
        is taken, so that a threshold too low cannot stall a run for ever. One that is
        not finite is skipped all the same. None for no such limit.

    Returns:
      A transformation whose ``update(updates, state, params=None, *, use_norm=None)``
      takes, as an extra argument, a scalar to use as the global norm. It and all
      other extra arguments are handed on to ``inner``. So to skip by a loss with
      ``use_norm=loss`` makes a clip inside take the loss for the norm.

    Raises:
      TypeError: for an ``inner`` that is no transformation, a ``max_norm`` that is none
        of these, or an array as ``ord``; from ``update``, for a leaf without a norm, by
        its path, or a state of another transformation.
      ValueError: for a ``max_norm`` that is a negative or NaN number, or no scalar, an
        ``ord`` less than 1, a ``max_consecutive_skips`` less than 0.

    Guarantees of the state:

    * Updates and inner state keep their dtypes and shapes.
    * None and ``optax.EmptyState()`` begin anew. A mapping with exactly the fields of
      :class:`SkipByGlobalNormState` is taken for it. Any other state is a TypeError,
      as the moments in it would be lost: to add a skip in mid-run, pass
      ``tx.init(params)._replace(inner_state=state)``.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"inner={inner!r} is no gradient transformation. Pass the optimizer first: "
            "skip_by_global_norm(optax.adam(1e-3), max_norm)."
        )
    # Others, such as optax.MultiSteps, have the methods of one.
    transformation = isinstance(inner, optax.GradientTransformation)
    run_inner = optax.with_extra_args_support(inner) if transformation else inner
    max_norm, order = as_max_norm(max_norm), as_ord(ord)
    most_skips = 2**31 - 1 if max_consecutive_skips is None else max_consecutive_skips
    as_count("max_consecutive_skips", most_skips, 0)

    def init_fn(params: optax.Params) -> SkipByGlobalNormState:
        state = begin(_BEFORE, max_norm, params)
        return state._replace(inner_state=inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipByGlobalNormState]:
        if not isinstance(state, SkipByGlobalNormState):
            state = _as_state(state, init_fn, updates if params is None else params)
        own = state._replace(threshold_state=None, inner_state=())
        check_same("state", own, _BEFORE)
        leaves, join = split_updates(updates, axis_name)
        norm, threshold, threshold_state = next_threshold(
            max_norm, leaves, extra_args.get("use_norm"), order, state
        )
        taken, own = _judge(leaves, norm, threshold, own, order, most_skips)
        updates, old = join([leaf.array for leaf in leaves]), state.inner_state
        new_updates, new = run_inner.update(updates, old, params, **extra_args)
        check_same("The state that inner.update returned", new, old)
        new_updates, new = _select(taken, new_updates, new, old)
        own = own._replace(threshold_state=threshold_state, inner_state=new)
        return new_updates, own

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_state(state: Any, init: Any, params: Any) -> SkipByGlobalNormState:
    """The state of a mapping with its fields; one before any update for no state.

    Raises:
      TypeError: for any other state, which would be lost.
    """
    if state is None or isinstance(state, optax.EmptyState):
        return init(params)
    fields = SkipByGlobalNormState._fields
    if isinstance(state, Mapping) and set(state) == set(fields):
        like = init(params)
        state = _restored(state, like)
        check_same("The mapping given as the state", state, like)
        return state
    raise TypeError(
        f"state is a {type(state).__name__}, but no SkipByGlobalNormState, so the "
        "moments in it would be lost. For the state of the optimizer inside pass "
        "tx.init(params)._replace(inner_state=state); None to begin anew."
    )


def _restored(node: Any, like: Any) -> Any:
    """The node with tuples in place of mappings and lists, where the other has them."""
    if not jax.tree.leaves(like):
        return like
    if not isinstance(like, tuple) or not isinstance(node, Mapping | list):
        return node
    names = getattr(like, "_fields", [str(i) for i in range(len(like))])
    parts = node if isinstance(node, Mapping) else dict(zip(names, node, strict=False))
    if len(node) > len(names):
        raise TypeError(f"The state given has {list(parts)} in place of {list(names)}.")
    make: Any = getattr(type(like), "_make", tuple)
    return make([_restored(parts.get(k), x) for k, x in zip(names, like, strict=True)])


@functools.partial(jax.jit, static_argnames="ord")
def _judge(leaves, norm, threshold, state, ord, most_skips):
    """Judges as a clip does, and measures unless a threshold needed the norm before."""
    norm = measure(leaves, ord, norm)
    _, clip = clip_leaves([], norm, threshold, "nan")
    state = on_mesh_of(clip.norm, state)
    above = clip.clipped & (state.num_consecutive_skips < most_skips)
    taken = clip.finite & ~above
    consecutive = count_if(True, state.num_consecutive_skips)
    return taken, state._replace(
        global_norm=clip.norm.astype(jnp.float32),
        threshold=clip.threshold.astype(jnp.float32),
        num_updates=count_if(True, state.num_updates),
        num_skipped=count_if(~taken, state.num_skipped),
        num_consecutive_skips=jnp.where(taken, 0, consecutive),
    )


@jax.jit
def _select(taken, updates, new_state, state):
    """Updates and new state if taken, else zeros and the state as it was."""

    def update_or_zero(update: Any) -> Any:
        values = values_of(update)
        if is_float0(values):
            return update
        return with_values(update, zero_if(~taken, values))

    def new_or_old(new: Any, old: Any) -> jax.Array:
        old = jnp.asarray(old)
        new = on_mesh_of(taken, jnp.asarray(new, old.dtype))
        return jnp.where(taken, new, laid_out_like(old, new))

    updates = jax.tree.map(update_or_zero, updates, is_leaf=is_sparse)
    return updates, jax.tree.map(new_or_old, new_state, state)
