"""The Optax gradient transformations, and their states."""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import (
    NonFinite,
    Numeric,
    as_ord,
    check_count,
    check_like,
    check_nonfinite,
    check_pair,
)
from ._clip import check_finite, clip_leaves, kept_or_zero, norm_given
from ._errors import explained
from ._mesh import replicated
from ._norm import GlobalNorm, formula_of, known_norm, measure
from ._threshold import (
    MaxNorm,
    QuantileState,
    Threshold,
    ThresholdState,
    ZScoreState,
    as_max_norm,
    initial_state,
    next_threshold,
)
from ._tree import (
    AxisName,
    Leaf,
    is_float0,
    is_sparse,
    split_updates,
    values_of,
    with_values,
)

# The fields of the states that are no scalars.
TREES = {"threshold_state", "inner_state"}


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


def clip_by_global_norm(
    max_norm: MaxNorm | None,
    *,
    ord: Numeric = 2,
    nonfinite: NonFinite = "nan",
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates by their global norm, and keeps the norm in the state.

    .. math:: g_i \leftarrow g_i \cdot \min(1, \text{max\_norm} / \lVert g \rVert)

    A drop-in for ``optax.clip_by_global_norm``. :func:`clip_updates` has the guarantees
    and the edge cases of the updates. The state has these guarantees:

    * It has the same structure, shapes and dtypes from ``init`` and from every
      update, with and without ``jax_enable_x64``.
    * If ``init`` is called outside ``jit``, the state lies on every device of the mesh
      that the parameters are on.
    * ``init`` reads no value: it takes None and abstract arrays as well.
    * Any other object passed as the state (``None``, ``optax.EmptyState()``, another
      transformation's state) counts as the state before the first update. Optax's
      clip ignores its state, and published code relies on this. (The state of a clip
      with another adaptive threshold is a TypeError.)

    Args:
      max_norm: the largest global norm to let through: a number or scalar array, a
        schedule (called with ``num_updates``, before it increments), a
        :class:`Threshold`, or None to measure and never clip.
      ord: the order of the norm, a real number of at least 1 or ``inf``. Under
        ``optax.inject_hyperparams`` name it in ``static_args``: a traced one is
        right, but costs a second read of the updates.
      nonfinite: what becomes of updates with an inf or NaN entry: ``"nan"`` makes
        every entry NaN, ``"zero"`` makes every entry 0, ``"error"`` adds a
        ``checkify`` check. Such updates are counted in ``num_nonfinite``. If
        ``max_norm`` is None, they are passed through, and only ``"nan"`` is accepted.
      axis_name: as for :func:`global_norm`.

    Returns:
      A transformation whose ``update(updates, state, params=None, *, use_norm=None)``
      takes, as an extra argument, a scalar to use as the global norm.

    Raises:
      TypeError: for a ``max_norm`` that is none of these; from ``update``, for a leaf
        without a norm, by its path.
      ValueError: for a ``max_norm`` that is a negative or NaN number, or no scalar, an
        ``ord`` less than 1, a ``nonfinite`` that is unknown, or not ``"nan"`` while
        ``max_norm`` is None.

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
    max_norm, order = as_max_norm(max_norm), as_ord(ord)
    formula = formula_of(order)
    check_nonfinite(nonfinite, max_norm)

    def init_fn(params: optax.Params | None) -> ClipByGlobalNormState:
        # The norm, the scale and the threshold.
        fields = _initial_fields([0, 1, math.inf], max_norm, params)
        return ClipByGlobalNormState(*fields)

    @explained(max_norm=max_norm, ord=ord)
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
        _check_scalars(state)
        leaves, join = split_updates(updates, axis_name)
        norm = norm_given(leaves, use_norm, order)
        if norm is None and isinstance(max_norm, Threshold):
            norm = measure(leaves, formula)
        norm, threshold, threshold_state = next_threshold(max_norm, norm, state)
        # Without the threshold's state: what is the user's is handed to no jit of ours.
        own = state._replace(threshold_state=None)
        arrays, clip, own = _clip(leaves, norm, threshold, own, formula, nonfinite)
        check_finite(clip, nonfinite)
        return join(arrays), own._replace(threshold_state=threshold_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, static_argnames="nonfinite")
def _clip(leaves, norm, threshold, state, formula, nonfinite):
    """Clips and counts, and measures unless a threshold needed the norm before.

    Outside ``jit`` an update by a number or a schedule is this one call.
    """
    norm = measure(leaves, formula) if norm is None else norm
    arrays, clip = clip_leaves(leaves, norm, threshold, nonfinite)
    state = state._replace(
        global_norm=clip.norm.astype(jnp.float32),
        clip_scale=clip.scale.astype(jnp.float32),
        threshold=clip.threshold.astype(jnp.float32),
        num_updates=_count_if(True, state.num_updates),
        num_clipped=_count_if(clip.clipped, state.num_clipped),
        num_nonfinite=_count_if(~clip.finite, state.num_nonfinite),
    )
    return arrays, clip, state


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


def skip_by_global_norm(
    inner: optax.GradientTransformation,
    max_norm: MaxNorm | None = None,
    *,
    ord: Numeric = 2,
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

    A :func:`clip_by_global_norm` that comes first inside does not measure the norm a
    second time. The update does not block Python and has no branch: ``inner`` always
    runs, and its results are selected. So it can be vmapped, sharded and scanned over.

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
      ValueError: for a ``max_norm`` that is a negative or NaN number, or no scalar, an
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
    run_inner = _with_extra_args(inner)
    max_norm, order = as_max_norm(max_norm), as_ord(ord)
    formula = formula_of(order)
    if max_consecutive_skips is not None:
        otherwise = ", or None for no limit"
        check_count("max_consecutive_skips", max_consecutive_skips, 0, otherwise)

    def init_fn(params: optax.Params) -> SkipByGlobalNormState:
        # The norm and the threshold.
        fields = _initial_fields([0, math.inf], max_norm, params)
        return SkipByGlobalNormState(*fields, inner_state=inner.init(params))

    @explained(max_norm=max_norm, ord=ord)
    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SkipByGlobalNormState]:
        if not isinstance(state, SkipByGlobalNormState):
            state = init_fn(updates if params is None else params)
        _check_scalars(state)
        leaves, join = split_updates(updates, axis_name)
        norm = norm_given(leaves, extra_args.get("use_norm"), order)
        if norm is None and isinstance(max_norm, Threshold):
            norm = measure(leaves, formula)
        judged, threshold, threshold_state = next_threshold(max_norm, norm, state)
        own = state._replace(threshold_state=None, inner_state=None)
        taken, leaves, norm, own = _judge(
            leaves, norm, judged, threshold, own, formula, max_consecutive_skips
        )
        kept = join([leaf.array for leaf in leaves])
        with known_norm(leaves, order, norm):
            returned = run_inner(kept, state.inner_state, params, **extra_args)
        _check_returned(returned, state.inner_state)
        new_updates, inner_state = _select(taken, *returned, state.inner_state)
        own = own._replace(threshold_state=threshold_state, inner_state=inner_state)
        return new_updates, own

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _with_extra_args(inner: Any) -> Any:
    """The inner update, which is passed extra arguments only if it takes any."""
    takes_any = isinstance(inner, optax.GradientTransformationExtraArgs)
    if not isinstance(inner, optax.GradientTransformation):
        # Such as optax.MultiSteps, which is no transformation but has its methods.
        parameters = inspect.signature(inner.update).parameters.values()
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    if takes_any:
        return inner.update
    return lambda updates, state, params, **_: inner.update(updates, state, params)


@jax.jit
def _judge(leaves, norm, judged, threshold, state, formula, max_consecutive_skips):
    """Judges as a clip does, and measures unless a threshold needed the norm before.

    Returns also the leaves to run the inner update on, and their norm. They are zeros
    if the step is skipped, so that no check or line search inside sees what is skipped.
    """
    if norm is None:
        norm = judged = measure(leaves, formula)
    _, clip = clip_leaves([], judged, threshold, "nan")
    above = clip.clipped
    if max_consecutive_skips is not None:
        above &= state.num_consecutive_skips < max_consecutive_skips
    taken = clip.finite & ~above
    consecutive = _count_if(True, state.num_consecutive_skips)
    state = state._replace(
        global_norm=clip.norm.astype(jnp.float32),
        threshold=clip.threshold.astype(jnp.float32),
        num_updates=_count_if(True, state.num_updates),
        num_skipped=_count_if(~taken, state.num_skipped),
        num_consecutive_skips=jnp.where(taken, 0, consecutive),
    )

    values = kept_or_zero([values_of(leaf.array) for leaf in leaves], taken)
    leaves = [
        Leaf(with_values(leaf.array, x), leaf.axes)
        for leaf, x in zip(leaves, values, strict=True)
    ]
    measured, value = (jnp.where(taken, x, 0) for x in (norm.norm, norm.value))
    norm = GlobalNorm(measured, value, norm.unit)
    return taken, leaves, norm, state


@jax.jit
def _select(taken, updates, new_state, state):
    """Updates and new state if taken, else zeros and the state as it was."""

    def update_or_zero(update: Any) -> Any:
        values = values_of(update)
        if is_float0(values):
            return update
        return with_values(update, jnp.where(taken, values, jnp.zeros_like(values)))

    def new_or_old(new: Any, old: Any) -> jax.Array:
        old = jnp.asarray(old)
        return jnp.where(taken, jnp.asarray(new, old.dtype), old)

    updates = jax.tree.map(update_or_zero, updates, is_leaf=is_sparse)
    return updates, jax.tree.map(new_or_old, new_state, state)


def _check_returned(returned: Any, state: Any) -> None:
    """Raises if the inner update did not return updates and a state like before."""
    who = "The inner update"
    check_pair(who, returned, "Pass an inner whose update returns (updates, state).")
    for name, tree in zip(("updates", "inner_state"), returned, strict=True):
        # Only a failure needs paths, which would slow every call outside ``jit``.
        if all(map(_is_array, jax.tree.leaves(tree))):
            continue
        paths = jax.tree.leaves_with_path(tree)
        path, leaf = next((p, leaf) for p, leaf in paths if not _is_array(leaf))
        raise TypeError(
            f"{who} returned {name}{jax.tree_util.keystr(path)} of type "
            f"{type(leaf).__name__}, but every leaf of both must be an array. Pass an "
            "inner whose init and update return arrays."
        )
    remedy = (
        "A step cannot be skipped if the inner state changes: pass the state that "
        "inner.init returns, and an inner that keeps its structure and its shapes."
    )
    check_like(who, "inner_state", returned[1], state, remedy)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)


def _check_scalars(state: ClipByGlobalNormState | SkipByGlobalNormState) -> None:
    """Raises if a field of the state is no scalar, as in a batch of states."""
    for name, value in state._asdict().items():
        if name in TREES:
            continue
        if not _is_array(value):
            raise TypeError(
                f"state.{name} is {value!r}, of type {type(value).__name__}, but a "
                "scalar array is kept there. Pass the state that init or the last "
                "update returned, or None to begin anew."
            )
        if jnp.shape(value) != ():
            raise ValueError(
                f"state.{name} has shape {jnp.shape(value)}, but it is a scalar. Pass "
                "the state of one optimizer; for a batch of them, call update in "
                "jax.vmap or jax.pmap."
            )


def _initial_fields(
    floats: list[float], max_norm: MaxNorm | None, params: optax.Params | None
) -> tuple[Any, ...]:
    """The floats, three counters at 0 and the threshold's state.

    All lie on every device of the mesh that the parameters are on. They come from
    NumPy, because ``jax_debug_infs`` objects to an inf that is computed.
    """
    scalars = *np.array(floats, np.float32), *np.zeros(3, np.int32)
    return jax.device_put((*scalars, initial_state(max_norm)), replicated(params))


def _count_if(happened: jax.Array | bool, counter: jax.Array) -> jax.Array:
    """The counter, incremented if it happened; it saturates."""
    return jnp.where(happened, optax.safe_increment(counter), counter)


for _state in (
    ClipByGlobalNormState,
    SkipByGlobalNormState,
    ZScoreState,
    QuantileState,
):
    jax.export.register_namedtuple_serialization(
        _state, serialized_name=f"optax_globalclip.{_state.__name__}"
    )
