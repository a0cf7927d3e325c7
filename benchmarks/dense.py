"""A dense network: nearly all of its gradients are matrix products."""

from typing import Any

import jax
import jax.numpy as jnp

WIDTH = 2048
BATCH = (2 * WIDTH, WIDTH)


def shapes(layers: int = 4) -> list[dict[str, tuple[int, ...]]]:
    """With four layers 17 million parameters: with AdamW too many for a TPU's VMEM."""
    return [{"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}] * layers


def loss_of(params: Any, x: jax.Array) -> jax.Array:
    """The mean square of what it makes of a batch, calculated in the batch's dtype."""
    layers = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    for layer in layers:
        x = jax.nn.gelu(x @ layer["kernel"] + layer["bias"][None])
    return jnp.mean(jnp.square(x.astype(jnp.float32)))
