"""The five lines that an expert writes in place of a library's clip."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Sums in float32, and one product for each leaf: right in bfloat16, too.

    An overflow in float32, shards in ``shard_map`` and non-finite entries are not
    looked after, and the state holds no norm.
    """

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        wide = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(updates)]
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in wide))
        factor = max_norm / jnp.maximum(norm, max_norm)
        clipped = jax.tree.map(
            lambda x: (x.astype(jnp.float32) * factor).astype(x.dtype), updates
        )
        return clipped, state

    return optax.GradientTransformation(init_fn, update_fn)
