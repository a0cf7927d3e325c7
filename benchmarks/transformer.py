"""A small GPT-2, as users write it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .trees import gpt2_small_shapes

HEADS = 12
BATCH = (8, 1024)


def shapes(blocks: int = 4) -> dict:
    """GPT-2 small with fewer blocks: with four, 68 million parameters."""
    small = gpt2_small_shapes()
    return small | {"blocks": small["blocks"][:blocks]}


def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next token, calculated in bfloat16."""
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    length = tokens.shape[1]
    hidden = small["tokens"][tokens] + small["positions"][None, :length]
    for block in small["blocks"]:
        hidden += _attention(block, _normed(block["norm_1"], hidden))
        hidden += _feed_forward(block, _normed(block["norm_2"], hidden))
    logits = _normed(small["norm"], hidden) @ small["tokens"].T
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return losses.mean()


def _normed(params: Any, x: jax.Array) -> jax.Array:
    wide = jax.nn.standardize(x.astype(jnp.float32)).astype(x.dtype)
    return wide * params["scale"] + params["bias"]


def _dense(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _attention(block: Any, x: jax.Array) -> jax.Array:
    mixed = _dense(block["attention"], x)
    heads = mixed.reshape(*x.shape[:2], 3, HEADS, -1)
    query, key, value = (heads[:, :, i] for i in range(3))
    read = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    return _dense(block["projection"], read.reshape(x.shape))


def _feed_forward(block: Any, x: jax.Array) -> jax.Array:
    return _dense(block["down"], jax.nn.gelu(_dense(block["up"], x)))
