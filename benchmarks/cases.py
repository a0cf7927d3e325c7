"""The cases: what is timed, on what, and by whom."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

import optax_globalclip

from . import by_hand, peers
from .measure import Contender, compiled, interleaved, rows
from .trees import gpt2_small_shapes, normals, num_entries, resnet50_shapes

Rows = list[dict[str, Any]]
Clips = dict[str, optax.GradientTransformation]

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "AdamW": lambda: optax.adamw(1e-3),
    "SGD with momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "Lion": lambda: optax.lion(1e-4),
    "Adafactor": lambda: optax.adafactor(1e-3),
}


def clips(max_norm: float = 1.0) -> Clips:
    """The clips that all cases compare."""
    return {
        "by hand": by_hand.clip_by_global_norm(max_norm),
        "optax": optax.clip_by_global_norm(max_norm),
        "ours": optax_globalclip.clip_by_global_norm(max_norm),
    }


def added_to_step(
    optimizer: str,
    shapes: Any,
    dtype: str,
    rounds: int,
    progress: rich.progress.Progress,
    *,
    case: str | None = None,
    one_read: bool = True,
) -> Rows:
    """What clipping adds to a step that updates parameters in place."""
    tx = OPTIMIZERS[optimizer]()
    params, grads = normals(shapes, dtype), normals(shapes, dtype, 0.1)
    contenders: dict[str, Contender] = {}
    for name, clip in {"none": optax.identity(), **clips()}.items():
        chained = optax.chain(clip, tx)
        contenders[name] = _step(chained, params, grads)
    if one_read:
        read, step = reader(grads), contenders["none"].run
        contenders["one read"] = Contender(lambda value: (step(value), read())[0])
    interleaved(contenders, rounds, progress, shared=(params, tx.init(params)))
    return rows(case or f"added to {optimizer}", dtype, contenders, beside="none")


def _step(chained: optax.GradientTransformation, params: Any, grads: Any) -> Contender:
    """A step of the clip and an optimizer, whose state the contenders share."""
    state: Any = chained.init(params)
    clip_state, inner = state

    def step(params, state, grads):
        updates, state = chained.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    executable, built = compiled(
        step, params, (clip_state, inner), grads, donate=(0, 1)
    )

    def run(value: Any) -> Any:
        nonlocal clip_state
        params, inner = value
        params, (clip_state, inner) = executable(params, (clip_state, inner), grads)
        return jax.block_until_ready((params, inner))

    return Contender(run, **built)


def alone(
    case: str,
    shapes: Any,
    dtype: str,
    rounds: int,
    progress: rich.progress.Progress,
    *,
    donate: bool = True,
) -> Rows:
    """The clip by itself, in place if ``donate``."""
    tree = normals(shapes, dtype)
    # To entries that are not subnormal in float16.
    max_norm = 0.5 * math.sqrt(num_entries(tree))
    contenders: dict[str, Contender] = {}
    for name, tx in clips(max_norm).items():
        contenders[name] = _in_place(tx, tree, donate)
    contenders |= peers.contenders(tree, max_norm)
    contenders["one read"] = _read_and_scale(tree)
    contenders["copy"] = Contender(
        lambda _: jax.block_until_ready(jax.tree.map(jnp.copy, tree))
    )
    interleaved(contenders, rounds, progress)
    found = rows(case, dtype, contenders)
    copy = contenders["copy"].median()
    for row in found:
        # The clip reads twice and writes once, the copy reads and writes.
        share = 1.5 * copy / contenders[row["contender"]].median()
        clips_ = row["contender"] in clips()
        row["share_of_copy_bandwidth"] = round(share, 3) if clips_ else None
    return found


def _in_place(tx: optax.GradientTransformation, tree: Any, donate: bool) -> Contender:
    state = tx.init(tree)
    executable, built = compiled(tx.update, tree, state, donate=(0,) if donate else ())

    def run(updates: Any) -> Any:
        return jax.block_until_ready(executable(updates, state))[0]

    # Above the threshold again: within it nothing need be written.
    doubled = jax.jit(
        lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0
    )
    return Contender(
        run,
        lambda: jax.tree.map(jnp.copy, tree),
        lambda updates: jax.block_until_ready(doubled(updates)) if donate else updates,
        **built,
    )


def reader(tree: Any) -> Callable[[], None]:
    """One read of as many bytes as the tree has, in float32: a sum of squares."""
    memory = _as_many_bytes(tree)
    executable, _ = compiled(lambda x: jnp.sum(jnp.square(x)), memory)
    return lambda: executable(memory).block_until_ready()


def _read_and_scale(tree: Any) -> Contender:
    """A read of as many bytes as the tree has, then a read and a write of them."""
    read, memory = reader(tree), _as_many_bytes(tree)
    scale, _ = compiled(lambda x: x * np.float32(0.999), memory, donate=(0,))

    def run(value: jax.Array) -> jax.Array:
        read()
        return scale(value).block_until_ready()

    return Contender(run, lambda: memory)


def _as_many_bytes(tree: Any) -> jax.Array:
    """Ones in float32, which take as many bytes as the tree."""
    return jnp.ones(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) // 4)


def many_leaves(
    count: int, dtype: str, rounds: int, progress: rich.progress.Progress
) -> Rows:
    """Many leaves of 1,000 entries."""
    case = f"{count:,} leaves of 1,000"
    return alone(case, [(1000,)] * count, dtype, rounds, progress, donate=False)


def resnet50(dtype: str, rounds: int, progress: rich.progress.Progress) -> Rows:
    """The tree of a model of many medium leaves."""
    return alone("ResNet-50", resnet50_shapes(), dtype, rounds, progress)


def outside_jit(dtype: str, rounds: int, progress: rich.progress.Progress) -> Rows:
    """A call that is not compiled, on as many leaves as GPT-2 small, but narrow ones.

    It is the call that is timed.
    """
    shapes = jax.tree.map(lambda size: max(1, size // 64), gpt2_small_shapes())
    tree = normals(shapes, dtype)

    def contender(tx: optax.GradientTransformation) -> Contender:
        state = tx.init(tree)
        return Contender(lambda _: jax.block_until_ready(tx.update(tree, state)))

    contenders = {name: contender(tx) for name, tx in clips().items()}
    contenders |= peers.contenders(tree, 1.0, eager=True)
    interleaved(contenders, rounds, progress)
    return rows("outside jit, 148 leaves", dtype, contenders)


def rescue_not_taken(
    size: int, dtype: str, rounds: int, progress: rich.progress.Progress
) -> Rows:
    """The norm, beside one that cannot recover from an overflow."""
    leaf = normals((size,), dtype)
    norms = {
        "plain": lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)))),
        "ours": optax_globalclip.global_norm,
    }
    contenders: dict[str, Contender] = {}
    for name, norm in norms.items():
        executable, built = compiled(norm, leaf)
        contenders[name] = Contender(
            lambda _, executable=executable: executable(leaf).block_until_ready(),
            **built,
        )
    interleaved(contenders, rounds, progress)
    return rows("norm, no overflow", dtype, contenders, reference="plain")


# --- How cost grows.


def against_parameters(
    sizes: list[int], rounds: int, progress: rich.progress.Progress
) -> Rows:
    """What clipping adds to AdamW, for models of more and more parameters."""
    found = []
    for size in sizes:
        shapes = [(size // 16,)] * 16
        case = f"parameters: {size}"
        found += added_to_step(
            "AdamW", shapes, "float32", rounds, progress, case=case, one_read=False
        )
    return found


def against_leaves(counts: list[int], progress: rich.progress.Progress) -> Rows:
    """What building the clip takes, for trees of more and more leaves."""
    found = []
    task = progress.add_task("  leaves", total=len(counts))
    for count in counts:
        tree = normals([(1000,)] * count, "float32")
        for name, tx in clips().items():
            _, built = compiled(tx.update, tree, tx.init(tree))
            found.append(
                {
                    "case": f"leaves: {count}",
                    "dtype": "float32",
                    "contender": name,
                    "build_seconds": round(built["build_seconds"], 3),
                }
            )
        progress.advance(task)
    progress.remove_task(task)
    return found
