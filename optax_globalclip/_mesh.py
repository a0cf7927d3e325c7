"""Manual mesh axes: which ones a leaf is split over, and sums across them.

Under plain ``jit`` XLA reduces across devices by itself and no leaf has any
manual axis. Inside ``shard_map`` and ``pmap`` the leaf is one device's shard,
and reductions must say over which axes.
"""

from collections.abc import Callable, Sequence
from typing import TypeGuard

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType

Axes = tuple[str, ...]
AxisName = str | Axes | chex.ArrayTree | None


def leaf_axes(
    leaves: Sequence[chex.Array], updates: optax.Updates, axis_name: AxisName
) -> tuple[Axes, ...]:
    """The manual mesh axes over which each leaf is one shard of a larger array.

    Args:
      leaves: the leaves of ``updates`` that count.
      updates: the tree that they come from.
      axis_name: ``None`` to read the axes off each leaf's type, else a name, a
        tuple of names, or a tree prefix of them.
    """
    if axis_name is None:
        return tuple(_varying_axes(leaf) for leaf in leaves)
    if _is_names(axis_name):
        return (_as_axes(axis_name),) * len(leaves)
    broadcast = jax.tree.map(
        lambda names, subtree: jax.tree.map(lambda _: names, subtree),
        axis_name,
        updates,
        is_leaf=_is_names,
    )
    return tuple(map(_as_axes, jax.tree.leaves(broadcast, is_leaf=_is_names)))


def all_reduce(
    values: Sequence[jax.Array],
    axes: Sequence[Axes],
    collective: Callable[[jax.Array, Axes], jax.Array],
) -> list[jax.Array]:
    """Reduces each value over its own axes, with one collective for each set of axes.

    Args:
      values: arrays of one shape and dtype.
      axes: the manual mesh axes of each value; ``()`` where there are none.
      collective: ``jax.lax.psum`` or ``jax.lax.pmax``.
    """
    reduced = list(values)
    for names in sorted(set(axes) - {()}):
        members = [i for i, own in enumerate(axes) if own == names]
        together = collective(jnp.stack([values[i] for i in members]), names)
        for i, value in zip(members, together, strict=True):
            reduced[i] = value
    return reduced


def is_local(leaf: jax.Array) -> bool:
    """Whether the leaf lies on one device, or is one device's shard.

    What XLA may yet shard is not to be read in chunks: it would gather it first.
    """
    return set(jax.typeof(leaf).sharding.mesh.axis_types) <= {AxisType.Manual}


def by_type(leaves: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """The leaves in groups of one shape, dtype and, as far as is known, sharding.

    Those of a group can be added without moving them between devices. Where XLA has
    yet to choose the shardings, each leaf is a group of its own.
    """
    groups: dict[object, list[jax.Array]] = {}
    for i, leaf in enumerate(leaves):
        type_ = jax.typeof(leaf)
        unknown = AxisType.Auto in type_.sharding.mesh.axis_types
        groups.setdefault(i if unknown else type_, []).append(leaf)
    return list(groups.values())


def _is_names(node: object) -> TypeGuard[str | Axes]:
    return isinstance(node, str) or (
        isinstance(node, tuple) and all(isinstance(name, str) for name in node)
    )


def _as_axes(names: str | Axes) -> Axes:
    return (names,) if isinstance(names, str) else names


def _varying_axes(leaf: chex.Array) -> Axes:
    if not isinstance(leaf, Tracer):
        return ()
    aval = jax.typeof(leaf)
    # jax 0.10 moved ``vma`` into ``mat``; older releases have the former only.
    varying = aval.mat.varying if hasattr(aval, "mat") else aval.vma
    return tuple(sorted(varying))
