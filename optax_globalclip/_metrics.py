"""What the states know, as scalars for a logger."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._skip import SkipByGlobalNormState
from ._transform import ClipByGlobalNormState


def metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The scalars of clips and skips, found anywhere inside an optimizer's state.

    Works inside and outside ``jit``, through every wrapper whose state is a pytree
    (``chain``, ``partition``, ``masked``, ``MultiSteps``, ``inject_hyperparams``).

    Args:
      opt_state: the state of an optimizer with :func:`clip_by_global_norm` or
        :func:`skip_by_global_norm` in it.

    Returns:
      float32 scalars. Of a clip, under the names

      * ``global_norm``: the norm before the last clip,
      * ``clipped_norm``: the norm after it,
      * ``clip_scale``: what the updates were multiplied by,
      * ``threshold``: what the norm was clipped to,
      * ``clip_fraction``: the share of all updates so far that were clipped,
      * ``nonfinite_fraction``: the share that had an inf or NaN entry;

      and of a skip, under the names

      * ``global_norm``: the norm of the last step, taken or skipped,
      * ``threshold``: above what norm it was to be skipped,
      * ``skip_fraction``: the share of all steps so far that were skipped.

      Where there are several such states, each name is prefixed with the path of
      its state and a slash; a clip in a skip has ``inner_state/`` in its own, and
      tells of the last step that was taken. An empty dictionary where there is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_globalclip
      >>> tx = optax.chain(optax_globalclip.clip_by_global_norm(1.0), optax.adam(1e-3))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, opt_state = tx.update(grads, tx.init(grads), grads)
      >>> for name, value in optax_globalclip.metrics(opt_state).items():
      ...     print(f"{name}: {value:.1f}")
      global_norm: 5.0
      clipped_norm: 1.0
      clip_scale: 0.2
      threshold: 1.0
      clip_fraction: 1.0
      nonfinite_fraction: 0.0
    """
    found = list(_states(opt_state))
    if len(found) == 1:
        return _metrics_of(found[0][1])
    return {
        "/".join(filter(None, (_name(path), name))): value
        for path, state in found
        for name, value in _metrics_of(state).items()
    }


def _states(opt_state: optax.OptState) -> Iterator[tuple[tuple, Any]]:
    """Our states, each with its path, an outer one before those in it."""
    for path, state in jax.tree.leaves_with_path(opt_state, is_leaf=_is_ours):
        if _is_ours(state):
            yield path, state
        if isinstance(state, SkipByGlobalNormState):
            field = jax.tree_util.GetAttrKey("inner_state")
            for inner_path, inner in _states(state.inner_state):
                yield (*path, field, *inner_path), inner


def _is_ours(node: object) -> bool:
    return isinstance(node, ClipByGlobalNormState | SkipByGlobalNormState)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _metrics_of(
    state: ClipByGlobalNormState | SkipByGlobalNormState,
) -> dict[str, jax.Array]:
    # Each makes arrays of the fields first: Flax NNX keeps each in a Variable, which
    # changes at the next update.
    is_skip = isinstance(state, SkipByGlobalNormState)
    return _skip_metrics(state) if is_skip else _clip_metrics(state)


def _skip_metrics(state: SkipByGlobalNormState) -> dict[str, jax.Array]:
    scalars = map(jnp.asarray, state[:-2])
    state = SkipByGlobalNormState(*scalars, threshold_state=(), inner_state=())
    return {
        "global_norm": state.global_norm,
        "threshold": state.threshold,
        "skip_fraction": _share(state.num_skipped, state.num_updates),
    }


def _clip_metrics(state: ClipByGlobalNormState) -> dict[str, jax.Array]:
    state = ClipByGlobalNormState(*map(jnp.asarray, state[:-1]), threshold_state=())
    return {
        "global_norm": state.global_norm,
        "clipped_norm": _clipped_norm(state),
        "clip_scale": state.clip_scale,
        "threshold": state.threshold,
        "clip_fraction": _share(state.num_clipped, state.num_updates),
        "nonfinite_fraction": _share(state.num_nonfinite, state.num_updates),
    }


def _clipped_norm(state: ClipByGlobalNormState) -> jax.Array:
    """Norm times scale: 0 even where that is inf times 0, at most the threshold."""
    product = jnp.where(state.clip_scale == 0, 0, state.global_norm * state.clip_scale)
    return jnp.minimum(product, state.threshold)


def _share(count: jax.Array, updates: jax.Array) -> jax.Array:
    return count.astype(jnp.float32) / jnp.maximum(updates, 1).astype(jnp.float32)
