"""What the states know, as scalars for a logger."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from ._checks import is_array
from ._skip import SkipByGlobalNormState
from ._transform import ClipByGlobalNormState

# The fields of the states that are no scalars.
_TREES = {"threshold_state", "inner_state"}


def metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Collects the scalars of all clips and skips in an optimizer's state.

    Works inside and outside ``jit``, through every wrapper whose state is a pytree
    (``chain``, ``partition``, ``masked``, ``MultiSteps``, ``inject_hyperparams``). The
    states may also be mappings with the names of their fields as keys, as in
    ``flax.nnx.state(optimizer)`` and in checkpoints.

    Args:
      opt_state: the state of an optimizer with :func:`clip_by_global_norm` or
        :func:`skip_by_global_norm` in it.

    Returns:
      float32 scalars; arrays of a state that ``jax.vmap`` made. Of a clip, under the
      names

      * ``global_norm``: the norm of the last update, before the clip,
      * ``clipped_norm``: the norm after it,
      * ``clip_scale``: what the updates were multiplied by,
      * ``threshold``: the threshold at the last update,
      * ``clip_fraction``: the share of all updates so far that were clipped,
      * ``nonfinite_fraction``: the share that had an inf or NaN entry;

      and of a skip, under the names

      * ``global_norm``: the norm of the last step, taken or skipped,
      * ``threshold``: the norm above which it was to be skipped,
      * ``skip_fraction``: the share of all steps so far that were skipped,
      * ``consecutive_skips``: how many of the latest steps in a row were skipped.

      Of one clip and one skip the names begin with ``clip/`` and ``skip/``. Of more
      states they begin with the path of the state. The metrics of a clip in a skip
      are those of the last step that was taken.

    Raises:
      TypeError: for a field that is no number.
      ValueError: if there is no such state.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_globalclip
      >>> tx = optax.chain(optax_globalclip.clip_by_global_norm(1.0), optax.adam(1e-3))
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, opt_state = tx.update(grads, tx.init(grads), grads)
      >>> for name, value in optax_globalclip.metrics(opt_state).items():
      ...     print(f"{name}: {value:.1f}")
      clip_fraction: 1.0
      clip_scale: 0.2
      clipped_norm: 1.0
      global_norm: 5.0
      nonfinite_fraction: 0.0
      threshold: 1.0
    """
    found = list(_states(opt_state, ()))
    if not found:
        raise ValueError(
            "opt_state holds no state of clip_by_global_norm or skip_by_global_norm. "
            "Pass the state of an optimizer with one of them in it."
        )
    return {
        f"{prefix}/{name}" if prefix else name: value
        for prefix, (_, fields) in zip(_prefixes(found), found, strict=True)
        for name, value in _metrics_of(fields).items()
    }


Path: TypeAlias = tuple[Any, ...]
Fields: TypeAlias = Mapping[str, Any]


def _states(node: Any, path: Path) -> Iterator[tuple[Path, Fields]]:
    """The fields of our states, each with its path, an outer one before those in it."""
    for inner_path, leaf in jax.tree.leaves_with_path(node, is_leaf=_is_ours):
        if not _is_ours(leaf):
            continue
        fields = leaf if isinstance(leaf, Mapping) else leaf._asdict()
        yield (*path, *inner_path), fields
        if "inner_state" in fields:
            field = jax.tree_util.GetAttrKey("inner_state")
            yield from _states(fields["inner_state"], (*path, *inner_path, field))


def _is_ours(node: object) -> bool:
    types = ClipByGlobalNormState, SkipByGlobalNormState
    if not isinstance(node, Mapping):
        return isinstance(node, types)
    # Converters may leave out a threshold_state that is None.
    return any(
        set(state._fields) - _TREES <= set(node) <= set(state._fields)
        for state in types
    )


def _prefixes(found: list[tuple[Path, Fields]]) -> list[str]:
    """Nothing for one state; ``clip`` and ``skip`` for one of each; else the paths."""
    kinds = ["skip" if "num_skipped" in fields else "clip" for _, fields in found]
    if len(set(kinds)) == len(kinds):
        return kinds if len(kinds) > 1 else [""]
    paths = [path for path, _ in found]
    short = [jax.tree_util.keystr(p, simple=True, separator="/") for p in paths]
    # Short paths may be equal: those of the keys 1 and "1", or of "a/b" and a, then b.
    unique = len(set(short)) == len(short)
    return short if unique else [jax.tree_util.keystr(path) for path in paths]


def _metrics_of(fields: Fields) -> dict[str, jax.Array]:
    # Arrays first: Flax NNX keeps each field in a Variable, which changes at the next
    # update. Then one call outside ``jit``, which transfers no constant.
    return _of_scalars(
        {name: _as_array(name, x) for name, x in fields.items() if name not in _TREES}
    )


@jax.jit
def _of_scalars(state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    norm, threshold = state["global_norm"], state["threshold"]
    logs = {"global_norm": norm, "threshold": threshold}

    def share(counter: str) -> jax.Array:
        updates = jnp.maximum(state["num_updates"], 1).astype(jnp.float32)
        return state[counter].astype(jnp.float32) / updates

    if "num_skipped" in state:
        run = state["num_consecutive_skips"].astype(jnp.float32)
        return logs | {"skip_fraction": share("num_skipped"), "consecutive_skips": run}
    scale = state["clip_scale"]
    return logs | {
        # The norm may be larger than a float can hold, and the scale is rounded.
        "clipped_norm": jnp.where(scale > 0, jnp.minimum(norm, threshold), scale),
        "clip_scale": scale,
        "clip_fraction": share("num_clipped"),
        "nonfinite_fraction": share("num_nonfinite"),
    }


def _as_array(name: str, value: Any) -> jax.Array:
    """The scalar of a field, also as Orbax restores one of Flax NNX without a target.

    Raises:
      TypeError: for anything but a scalar.
    """
    if isinstance(value, Mapping) and set(value) == {"value"}:
        value = value["value"]
    if not is_array(value):
        raise TypeError(
            f"opt_state has {name}={value!r}, but a scalar is kept there. Pass the "
            "state that init or the last update returned."
        )
    return jnp.asarray(value)
