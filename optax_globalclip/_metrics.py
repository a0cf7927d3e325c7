"""What the states know, as scalars for a logger."""

import jax
import jax.numpy as jnp
import optax

from ._transform import ClipByGlobalNormState


def metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The clip's scalars, found anywhere inside an optimizer's state.

    Works inside and outside ``jit``, through every wrapper whose state is a pytree
    (``chain``, ``partition``, ``masked``, ``MultiSteps``, ``inject_hyperparams``).

    Args:
      opt_state: the state of an optimizer with :func:`clip_by_global_norm` in it.

    Returns:
      float32 scalars, under the names

      * ``global_norm``: the norm before the last clip,
      * ``clipped_norm``: the norm after it,
      * ``clip_scale``: what the updates were multiplied by,
      * ``threshold``: what the norm was clipped to,
      * ``clip_fraction``: the share of all updates so far that were clipped,
      * ``nonfinite_fraction``: the share that had an inf or NaN entry.

      Where there are several such states, each name is prefixed with the path of
      its state and a slash. An empty dictionary where there is none.

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
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), state)
        for path, state in jax.tree.leaves_with_path(opt_state, is_leaf=_is_clip)
        if _is_clip(state)
    ]
    if len(found) == 1:
        return _clip_metrics(found[0][1])
    return {
        f"{path}/{name}": value
        for path, state in found
        for name, value in _clip_metrics(state).items()
    }


def _is_clip(node: object) -> bool:
    return isinstance(node, ClipByGlobalNormState)


def _clip_metrics(state: ClipByGlobalNormState) -> dict[str, jax.Array]:
    # Flax NNX keeps each field in a Variable, which changes at the next update.
    state = ClipByGlobalNormState(*map(jnp.asarray, state[:-1]), threshold_state=())
    updates = jnp.maximum(state.num_updates, 1).astype(jnp.float32)
    return {
        "global_norm": state.global_norm,
        "clipped_norm": _clipped_norm(state),
        "clip_scale": state.clip_scale,
        "threshold": state.threshold,
        "clip_fraction": state.num_clipped.astype(jnp.float32) / updates,
        "nonfinite_fraction": state.num_nonfinite.astype(jnp.float32) / updates,
    }


def _clipped_norm(state: ClipByGlobalNormState) -> jax.Array:
    """Norm times scale: 0 even where that is inf times 0, at most the threshold."""
    product = jnp.where(state.clip_scale == 0, 0, state.global_norm * state.clip_scale)
    return jnp.minimum(product, state.threshold)
