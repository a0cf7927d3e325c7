"""Trees of the shapes of real models."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def gpt2_small_shapes() -> dict:
    """The 148 parameters of GPT-2 small: 124 million entries."""
    width = 768
    norm = {"scale": (width,), "bias": (width,)}

    def dense(inputs, outputs):
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    block = {
        "norm_1": norm,
        "attention": dense(width, 3 * width),
        "projection": dense(width, width),
        "norm_2": norm,
        "up": dense(width, 4 * width),
        "down": dense(4 * width, width),
    }
    return {
        "tokens": (50257, width),
        "positions": (1024, width),
        "blocks": [block] * 12,
        "norm": norm,
    }


def resnet50_shapes() -> dict:
    """The 161 parameters of ResNet-50: 25.6 million entries."""

    def convolution(size, inputs, outputs):
        return {
            "kernel": (size, size, inputs, outputs),
            "scale": (outputs,),
            "bias": (outputs,),
        }

    blocks, inputs = [], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(count):
            block = {
                "reduce": convolution(1, inputs, width),
                "convolve": convolution(3, width, width),
                "expand": convolution(1, width, 4 * width),
            }
            if i == 0:
                block["shortcut"] = convolution(1, inputs, 4 * width)
            blocks.append(block)
            inputs = 4 * width
    return {
        "stem": convolution(7, 3, 64),
        "blocks": blocks,
        "head": {"kernel": (2048, 1000), "bias": (1000,)},
    }


def normals(shapes: Any, dtype: Any, scale: float = 1.0) -> Any:
    """A tree of normal entries."""
    shapes, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = jax.jit(jax.random.normal, static_argnums=1)
    leaves = [
        (scale * draw(key, shape)).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    return treedef.unflatten(leaves)


def num_entries(tree: Any) -> int:
    """How many numbers there are in it."""
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def llama_70b(layers: int = 80) -> Any:
    """The 723 parameters of Llama 70B, 70.6 billion entries, as (shape, spec).

    Sharded as usual over the axes "fsdp" and "model": matrices over both, in the order
    that keeps what a layer hands on to the next on "model"; scales on every device.
    """
    width, hidden, keys, vocabulary = 8192, 28672, 1024, 128256
    into, out_of = PartitionSpec("fsdp", "model"), PartitionSpec("model", "fsdp")
    scale = ((width,), PartitionSpec())
    layer = {
        "attention_norm": scale,
        "query": ((width, width), into),
        "key": ((width, keys), into),
        "value": ((width, keys), into),
        "output": ((width, width), out_of),
        "mlp_norm": scale,
        "gate": ((width, hidden), into),
        "up": ((width, hidden), into),
        "down": ((hidden, width), out_of),
    }
    return {
        "embedding": ((vocabulary, width), out_of),
        "layers": [layer] * layers,
        "norm": scale,
        "head": ((width, vocabulary), into),
    }
