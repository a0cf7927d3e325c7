"""What is timed: a step with each clip, and the clips alone."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress

from . import cases, networks
from .cases import Case
from .measure import Contender, compiled, interleaved, rows
from .results import Row


def rows_of(case: Case, rounds: int, progress: rich.progress.Progress) -> list[Row]:
    """A step with each clip, or the clips alone."""
    return (_alone if case.optimizer is None else _added)(case, rounds, progress)


def _added(case: Case, rounds: int, progress: rich.progress.Progress) -> list[Row]:
    """What clipping adds to a step that updates parameters in place."""
    params, data = networks.normals(case.params), networks.normals(case.data, 0.1)
    contenders = {name: _step(case, name, params, data) for name in case.contenders}
    read, step = _reader(params), contenders["none"].run
    contenders["one read"] = Contender(lambda value: (step(value), read())[0])
    assert case.optimizer is not None
    inner = cases.OPTIMIZERS[case.optimizer]().init(params)
    interleaved(contenders, rounds, progress, shared=(params, inner))
    return rows(case.name, case.dtype, contenders, beside="none")


def _step(case: Case, contender: str, params: Any, data: Any) -> Contender:
    """A step of the clip and an optimizer, whose state the contenders share."""
    tx = case.transformation(contender)
    state: Any = tx.init(params)
    around = hasattr(state, "inner_state")  # A skip; or else a chain.
    executable, built = compiled(
        case.step(tx), params, state, data, donate=case.donated
    )

    def run(value: Any) -> Any:
        nonlocal state
        params, inner = value
        state = state._replace(inner_state=inner) if around else (state[0], inner)
        params, state = jax.block_until_ready(executable(params, state, data))
        return params, state.inner_state if around else state[1]

    return Contender(run, built=built)


def _alone(case: Case, rounds: int, progress: rich.progress.Progress) -> list[Row]:
    """The clip by itself, beside a copy."""
    tree = networks.normals(case.params)
    # To entries that are not subnormal in float16.
    max_norm = 0.5 * math.sqrt(sum(leaf.size for leaf in jax.tree.leaves(tree)))
    contenders = {name: _clip(case, name, tree, max_norm) for name in case.contenders}
    contenders["one read"] = _read_and_scale(tree)
    contenders["copy"] = Contender(
        lambda _: jax.block_until_ready(jax.tree.map(jnp.copy, tree))
    )
    interleaved(contenders, rounds, progress)
    found = rows(case.name, case.dtype, contenders)
    for row in found:
        # The clip reads twice and writes once, the copy reads and writes.
        share = (
            1.5 * contenders["copy"].median() / contenders[row["contender"]].median()
        )
        if row["contender"] in case.contenders:
            row["share_of_copy_bandwidth"] = round(share, 3)
    return found


def _clip(case: Case, contender: str, tree: Any, max_norm: float) -> Contender:
    tx = case.transformation(contender, max_norm)
    state = tx.init(tree)
    donate = case.donated[:1]
    executable, built = compiled(case.step(tx), tree, state, (), donate=donate)

    def run(updates: Any) -> Any:
        return jax.block_until_ready(executable(updates, state, ()))[0]

    # Above the threshold again: within it nothing need be written.
    doubled = jax.jit(
        lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0
    )
    return Contender(
        run,
        lambda: jax.tree.map(jnp.copy, tree),
        lambda updates: jax.block_until_ready(doubled(updates)) if donate else updates,
        built,
    )


def _reader(tree: Any) -> Callable[[], None]:
    """One read of as many bytes as the tree has, in float32: a sum of squares."""
    memory = _as_many_bytes(tree)
    executable, _ = compiled(lambda x: jnp.sum(jnp.square(x)), memory)
    return lambda: executable(memory).block_until_ready()


def _read_and_scale(tree: Any) -> Contender:
    """A read of as many bytes as the tree has, then a read and a write of them."""
    read, memory = _reader(tree), _as_many_bytes(tree)
    scale, _ = compiled(lambda x: x * np.float32(0.999), memory, donate=(0,))

    def run(value: jax.Array) -> jax.Array:
        read()
        return scale(value).block_until_ready()

    return Contender(run, lambda: memory)


def _as_many_bytes(tree: Any) -> jax.Array:
    """Ones in float32, which take as many bytes as the tree."""
    return jnp.ones(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) // 4)


def outside_jit(rounds: int, progress: rich.progress.Progress) -> list[Row]:
    """Calls that are not compiled, on as many leaves as GPT-2 small, but narrow ones.

    It is the call that is timed.
    """
    shapes = cases.divided(networks.gpt2_small(), 64)
    tree = networks.normals(networks.abstract(shapes, "float32"))

    def contender(name: str) -> Contender:
        tx = cases.clip(name)
        state = tx.init(tree)
        return Contender(lambda _: jax.block_until_ready(tx.update(tree, state)))

    contenders = {name: contender(name) for name in (*cases.CLIPS, "z-score")}
    interleaved(contenders, rounds, progress)
    return rows("outside jit, 148 leaves", "float32", contenders)
