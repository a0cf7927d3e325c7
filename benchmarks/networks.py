"""The networks whose training steps are compiled and measured, and their shapes.

Each is what users write: parameters in one dtype, the calculation in bfloat16. They are
small, so that a training step compiles in seconds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

Shapes = Any  # A tree of tuples.
BATCH, LENGTH, VOCABULARY = 8, 256, 16_384


class Network(NamedTuple):
    """A network, and what it is trained on.

    Attributes:
      shapes: of its parameters.
      loss_of: of parameters and data, a scalar.
      data: abstract arrays.
      optimizer: by its name in ``cases.OPTIMIZERS``.
    """

    shapes: Shapes
    loss_of: Callable[[Any, Any], jax.Array]
    data: Any
    optimizer: str = "AdamW"


def abstract(shapes: Shapes, dtype: Any) -> Any:
    """Leaves of those shapes, with no values."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        shapes,
        is_leaf=lambda node: type(node) is tuple,
    )


def normals(tree: Any, scale: float = 1.0) -> Any:
    """Such leaves with values: normal entries, or integers below 1,000."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        if jnp.issubdtype(dtype, jnp.integer):
            return jax.random.randint(key, shape, 0, 1000, dtype)
        return (scale * jax.random.normal(key, shape)).astype(dtype)

    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(drawn)


# --- Trees of the shapes of real models.


def gpt2_small() -> Shapes:
    """The 148 parameters of GPT-2 small: 124 million entries."""
    return _decoder_shapes(768, [_block(768)] * 12, 50257, 1024)


def resnet50() -> Shapes:
    """The 161 parameters of ResNet-50: 25.6 million entries."""
    blocks, inputs = [], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(count):
            block = {
                "reduce": _convolution(1, inputs, width),
                "convolve": _convolution(3, width, width),
                "expand": _convolution(1, width, 4 * width),
            }
            if i == 0:
                block["shortcut"] = _convolution(1, inputs, 4 * width)
            blocks.append(block)
            inputs = 4 * width
    stem = _convolution(7, 3, 64)
    return {"stem": stem, "blocks": blocks, "head": _dense(2048, 1000)}


def llama_70b(layers: int = 80) -> tuple[Shapes, Any]:
    """The 723 parameters of Llama 70B, 70.6 billion entries: shapes and specs.

    Sharded as usual over the axes "fsdp" and "model": matrices over both, in the order
    that keeps what a layer hands on to the next on "model"; scales on every device.
    """
    width, hidden, keys, vocabulary = 8192, 28672, 1024, 128256
    layer = {
        "attention_norm": (width,),
        "query": (width, width),
        "key": (width, keys),
        "value": (width, keys),
        "output": (width, width),
        "mlp_norm": (width,),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    into, out_of = P("fsdp", "model"), P("model", "fsdp")
    specs = {"attention_norm": P(), "output": out_of, "mlp_norm": P(), "down": out_of}
    ends = {"embedding": (vocabulary, width), "norm": (width,)}
    ends["head"] = (width, vocabulary)
    return (
        {**ends, "layers": [layer] * layers},
        {
            **{"embedding": out_of, "norm": P(), "head": into},
            "layers": [{name: specs.get(name, into) for name in layer}] * layers,
        },
    )


def _dense(inputs: int, outputs: int) -> Shapes:
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def _norm(width: int) -> Shapes:
    return {"scale": (width,), "bias": (width,)}


def _convolution(size: int, inputs: int, outputs: int) -> Shapes:
    return {"kernel": (size, size, inputs, outputs), **_norm(outputs)}


def _block(width: int) -> dict[str, Shapes]:
    return {
        "norm_1": _norm(width),
        "attention": _dense(width, 3 * width),
        "projection": _dense(width, width),
        "norm_2": _norm(width),
        "up": _dense(width, 4 * width),
        "down": _dense(4 * width, width),
    }


def _decoder_shapes(width: int, blocks: Any, vocabulary: int, length: int) -> Shapes:
    return {
        "tokens": (vocabulary, width),
        "positions": (length, width),
        "blocks": blocks,
        "norm": _norm(width),
    }


# --- Networks.


def dense(width: int = 2048, layers: int = 2) -> Network:
    """Nearly all of its gradients are matrix products, which a sum may fuse with."""

    def loss_of(params: Any, x: jax.Array) -> jax.Array:
        for layer in _halved(params):
            x = jax.nn.gelu(_apply(layer, x))
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    return Network([_dense(width, width)] * layers, loss_of, _bf16(2 * width, width))


def decoder(
    width: int = 256, blocks: int = 2, *, batch: int = BATCH, stacked: bool = False
) -> Network:
    """A small GPT-2, with its blocks listed, or stacked for ``scan`` with remat."""
    listed = [_block(width)] * blocks
    stack = jax.tree.map(
        lambda shape: (blocks, *shape),
        _block(width),
        is_leaf=lambda n: type(n) is tuple,
    )
    shapes = _decoder_shapes(width, stack if stacked else listed, VOCABULARY, LENGTH)
    return Network(shapes, _next_token_loss, _int32(batch, LENGTH))


def vision_transformer(width: int = 256, blocks: int = 2) -> Network:
    """256 patches of 16 × 16 pixels, 1,000 classes."""
    shapes = {
        "patches": _dense(768, width),
        "positions": (256, width),
        "blocks": [_block(width)] * blocks,
        "norm": _norm(width),
        "head": _dense(width, 1000),
    }

    def loss_of(params: Any, data: Any) -> jax.Array:
        small = _halved(params)
        x = _apply(small["patches"], data["images"]) + small["positions"][None]
        for block in small["blocks"]:
            x = _transform(block, x, causal=False)
        x = _normed(small["norm"], x).mean(axis=1)
        return _cross_entropy(_apply(small["head"], x), data["labels"])

    return Network(
        shapes, loss_of, {"images": _bf16(BATCH, 256, 768), "labels": _int32(BATCH)}
    )


def convolutions(widths: tuple[int, ...] = (128,)) -> Network:
    """A residual network on images of 32 × 32 pixels."""
    inputs = (widths[0], *widths)
    stages = [
        [_convolution(3, a, b), _convolution(3, b, b), _convolution(3, b, b)]
        for a, b in zip(inputs, widths, strict=False)
    ]
    stem = _convolution(3, 3, widths[0])
    shapes = {"stem": stem, "stages": stages, "head": _dense(widths[-1], 1000)}

    def convolve(layer: Any, x: jax.Array, stride: int = 1) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], strides, "SAME", dimension_numbers=layout
        )
        return jax.nn.relu(_normed(layer, x))

    def loss_of(params: Any, data: Any) -> jax.Array:
        small = _halved(params)
        x = convolve(small["stem"], data["images"])
        for reduce, first, second in small["stages"]:
            x = convolve(reduce, x, stride=2)
            x += convolve(second, convolve(first, x))
        x = x.mean(axis=(1, 2))
        return _cross_entropy(_apply(small["head"], x), data["labels"])

    images = _bf16(BATCH, 32, 32, 3)
    return Network(shapes, loss_of, {"images": images, "labels": _int32(BATCH)})


def lstm(width: int = 256, layers: int = 2, steps: int = 64) -> Network:
    """Predicts the next token."""
    shapes = {
        "tokens": (VOCABULARY, width),
        "layers": [_dense(2 * width, 4 * width)] * layers,
        "head": _dense(width, VOCABULARY),
    }

    def run(layer: Any, inputs: jax.Array) -> jax.Array:
        def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            hidden, cell = carry
            gates = _apply(layer, jnp.concatenate([x, hidden], axis=-1))
            enter, keep, write, show = jnp.split(jax.nn.sigmoid(gates), 4, axis=-1)
            cell = keep * cell + enter * (2 * write - 1)
            hidden = show * jnp.tanh(cell)
            return (hidden, cell), hidden

        start = jnp.zeros_like(inputs[0])
        return jax.lax.scan(step, (start, start), inputs)[1]

    def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
        small = _halved(params)
        x = small["tokens"][tokens]
        for layer in small["layers"]:
            x = run(layer, x)
        return _cross_entropy(_apply(small["head"], x[:-1]), tokens[1:])

    return Network(shapes, loss_of, _int32(steps, 4 * BATCH))


def experts(width: int = 256, count: int = 8, blocks: int = 1) -> Network:
    """A decoder that sends each token to one of several experts, as in Switch."""
    mixture = {"route": (width, count), "up": (count, width, 2 * width)}
    mixture["down"] = (count, 2 * width, width)
    listed = [_block(width) | mixture] * blocks
    shapes = _decoder_shapes(width, listed, VOCABULARY, LENGTH)

    def feed_forward(block: Any, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, width)
        shares = jax.nn.softmax(flat @ block["route"])
        chosen = jax.nn.one_hot(shares.argmax(axis=-1), count, dtype=jnp.float32)
        place = (jnp.cumsum(chosen, axis=0) - 1) * chosen
        capacity = len(flat) // count
        slot = place.sum(axis=-1).astype(jnp.int32)
        slots = jax.nn.one_hot(slot, capacity, dtype=x.dtype)
        sent = chosen.astype(x.dtype)[:, :, None] * slots[:, None, :]
        inside = jnp.einsum("nec,nd->ecd", sent, flat)
        inside = jax.nn.gelu(jnp.einsum("ecd,edh->ech", inside, block["up"]))
        outside = jnp.einsum("ech,ehd->ecd", inside, block["down"])
        back = sent * (shares * chosen.astype(x.dtype)).sum(axis=-1)[:, None, None]
        return jnp.einsum("nec,ecd->nd", back, outside).reshape(x.shape)

    loss_of = functools.partial(_next_token_loss, feed_forward=feed_forward)
    return Network(shapes, loss_of, _int32(BATCH, LENGTH))


def embedding_tables(rows: int = 100_000, width: int = 64, count: int = 8) -> Network:
    """A recommender: large tables, of which a batch reads few rows, and SGD."""
    tables, hidden = [(rows, width)] * count, _dense(count * width, 256)
    shapes = {"tables": tables, "hidden": hidden, "head": _dense(256, 1)}

    def loss_of(params: Any, data: Any) -> jax.Array:
        small, ids = _halved(params), data["ids"]
        read = [table[ids[:, i]] for i, table in enumerate(small["tables"])]
        x = jax.nn.relu(_apply(small["hidden"], jnp.concatenate(read, axis=-1)))
        error = _apply(small["head"], x)[:, 0] - data["ratings"]
        return jnp.mean(jnp.square(error.astype(jnp.float32)))

    data = {"ids": _int32(4096, count), "ratings": _bf16(4096)}
    return Network(shapes, loss_of, data, "SGD")


def lora(width: int = 256, blocks: int = 4, rank: int = 8) -> Network:
    """A decoder that is frozen, but for small leaves beside queries and values."""
    base = decoder(width, blocks)
    pair = {"into": (width, rank), "out_of": (rank, width)}

    def loss_of(params: Any, data: Any) -> jax.Array:
        listed = zip(data["frozen"]["blocks"], params, strict=True)
        merged = [block | {"beside": beside} for block, beside in listed]
        return _next_token_loss(data["frozen"] | {"blocks": merged}, data["tokens"])

    frozen = abstract(base.shapes, jnp.bfloat16)
    data = {"frozen": frozen, "tokens": base.data}
    return Network([{"query": pair, "value": pair}] * blocks, loss_of, data)


NETWORKS: dict[str, Callable[..., Network]] = {
    "dense": dense,
    "decoder": decoder,
    "stacked decoder": functools.partial(decoder, blocks=4, stacked=True),
    "vision transformer": vision_transformer,
    "convolutions": convolutions,
    "LSTM": lstm,
    "experts": experts,
    "embedding tables": embedding_tables,
    "LoRA": lora,
}

# As wide as GPT-2 small, on eight devices: in data parallel, and in FSDP.
ON_EIGHT: dict[str, Callable[..., Network]] = {
    "decoder": functools.partial(decoder, 768, 4, batch=64),
    "stacked decoder": functools.partial(decoder, 768, 12, batch=64, stacked=True),
}


# --- Their parts.


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _halved(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)


def _is_explicit() -> bool:
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _gathered(params: Any) -> Any:
    """Whole on every device of a mesh: what FSDP does before it uses a layer."""
    if jax.sharding.get_abstract_mesh().empty:
        return params
    gather = (
        jax.sharding.reshard if _is_explicit() else jax.lax.with_sharding_constraint
    )
    return jax.tree.map(lambda leaf: gather(leaf, P()), params)


def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    if _is_explicit():
        return table.at[ids].get(out_sharding=jax.typeof(ids).sharding.spec)
    return table[ids]


def _apply(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def _normed(layer: Any, x: jax.Array) -> jax.Array:
    wide = jax.nn.standardize(x.astype(jnp.float32)).astype(x.dtype)
    return wide * layer["scale"] + layer["bias"]


def _attention(block: Any, x: jax.Array, *, causal: bool) -> jax.Array:
    mixed = _apply(block["attention"], x)
    if beside := block.get("beside"):
        query, value = (
            x @ low["into"].astype(x.dtype) @ low["out_of"].astype(x.dtype)
            for low in (beside["query"], beside["value"])
        )
        mixed += jnp.concatenate([query, jnp.zeros_like(query), value], axis=-1)
    heads = mixed.reshape(*x.shape[:2], 3, -1, 64)
    query, key, value = (heads[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32) / 8
    if causal:
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
    shares = jax.nn.softmax(scores).astype(x.dtype)
    read = jnp.einsum("bhqk,bkhd->bqhd", shares, value)
    return _apply(block["projection"], read.reshape(x.shape))


def _feed_forward(block: Any, x: jax.Array) -> jax.Array:
    return _apply(block["down"], jax.nn.gelu(_apply(block["up"], x)))


def _transform(
    block: Any, x: jax.Array, *, causal: bool, feed_forward: Callable = _feed_forward
) -> jax.Array:
    block = _gathered(block)
    x += _attention(block, _normed(block["norm_1"], x), causal=causal)
    return x + feed_forward(block, _normed(block["norm_2"], x))


def _next_token_loss(
    params: Any, tokens: jax.Array, *, feed_forward: Callable = _feed_forward
) -> jax.Array:
    ends = [params[name] for name in ("tokens", "positions", "norm")]
    table, positions, norm = _gathered(_halved(ends))
    x = _rows(table, tokens) + positions[None, : tokens.shape[1]]

    def transform(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
        block = _halved(block)
        return _transform(block, x, causal=True, feed_forward=feed_forward), None

    if isinstance(params["blocks"], list):
        for block in params["blocks"]:
            x, _ = transform(x, block)
    else:
        x, _ = jax.lax.scan(jax.checkpoint(transform), x, params["blocks"])
    return _cross_entropy((_normed(norm, x) @ table.T)[:, :-1], tokens[:, 1:])


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    right = labels[..., None] == jnp.arange(logits.shape[-1])
    picked = jnp.where(right, logits, 0).sum(axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)
