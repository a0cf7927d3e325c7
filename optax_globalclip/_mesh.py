"""Mesh axes: over which ones a leaf is split, and sums across them.

In ``shard_map`` and ``pmap`` a leaf is one device's shard, and a sum must say over
which axes it goes on. Where the axes are explicit, the types of the leaves tell as
much, and ``on_shards`` enters ``shard_map``. Where they are auto, XLA alone knows how
leaves are split, and sums across devices by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._leaves import is_float0

Axes = tuple[str, ...]
AxisName = str | Axes | chex.ArrayTree | None

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_WHAT_TO_PASS = (
    "Pass a name, a tuple of names, or a tree prefix of the updates with one of them "
    "for each leaf; () says that every device holds the whole leaf."
)


def leaf_axes(
    leaves: Sequence[chex.Array], updates: optax.Updates, axis_name: AxisName
) -> tuple[Axes, ...]:
    """The manual mesh axes over which each leaf is one shard of a larger array.

    Args:
      leaves: the leaves of ``updates`` that count.
      updates: the tree that they come from.
      axis_name: ``None`` to read the axes off each leaf's type, else a name, a
        tuple of names, or a tree prefix of them.

    Raises:
      NameError: for a name that no ``shard_map``, ``pmap`` or ``vmap`` binds.
      ValueError: for a leaf that a tree prefix has no names for.
    """
    if axis_name is None:
        return tuple(_varying_axes(leaf) for leaf in leaves)
    named = _named_axes(updates, axis_name)
    typed = {name: _has_type(name) for name in {name for own in named for name in own}}
    return tuple(
        # A sum over an axis that a leaf does not vary over would count it repeatedly.
        tuple(name for name in own if not typed[name] or name in _varying_axes(leaf))
        for leaf, own in zip(leaves, named, strict=True)
    )


def on_shards(
    measure: Callable[..., _Result],
    leaves: Sequence[jax.Array],
    axes: tuple[Axes, ...],
    *args: Any,
) -> _Result:
    """``measure(leaves, axes, *args)``, in ``shard_map`` if all axes are explicit.

    There it takes one all-reduce for all leaves split over the same axes. XLA would
    take one for each leaf and axis, and merge some of them.

    Args:
      measure: a function to scalars that are the same on every device.
      leaves: arrays.
      axes: the manual mesh axes of each.
      *args: trees of scalars.
    """
    shardings = [jax.typeof(leaf).sharding for leaf in leaves]
    meshes = [sharding.mesh for sharding in shardings]
    # Not where some axes are manual: JAX 0.10 has no gradient of one shard_map in
    # another if they differ in axes, as it orders the axes of residuals wrongly.
    mesh = next((m for m in meshes if set(m.axis_types) == {AxisType.Explicit}), None)
    if mesh is None:
        return measure(leaves, axes, *args)

    specs = [sharding.spec.update(reduced=frozenset()) for sharding in shardings]
    leaves = [
        jax.sharding.reshard(leaf, NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]

    def measure_shards(leaves: list[jax.Array], *args: Any) -> _Result:
        return measure(leaves, tuple(map(_varying_axes, leaves)), *args)

    return jax.shard_map(
        measure_shards,
        mesh=mesh,
        in_specs=(specs, *[PartitionSpec()] * len(args)),
        out_specs=PartitionSpec(),
    )(leaves, *args)


def by_axes(items: Sequence[_Item], axes: Sequence[Axes]) -> dict[Axes, list[_Item]]:
    """The items of each set of axes."""
    groups: dict[Axes, list[_Item]] = {}
    for item, own in zip(items, axes, strict=True):
        groups.setdefault(own, []).append(item)
    return groups


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
    for names, members in by_axes(range(len(values)), axes).items():
        if names:
            together = collective(jnp.stack([values[i] for i in members]), names)
            for i, value in zip(members, together, strict=True):
                reduced[i] = value
    return reduced


def is_unreduced(leaf: jax.Array) -> bool:
    """Whether the leaf is the sum, put off, of what the devices hold."""
    spec = jax.typeof(leaf).sharding.spec
    return bool(_manual_type(leaf, "unreduced") or spec.unreduced)


def reduced(leaf: jax.Array) -> jax.Array:
    """The leaf, in manual mode, with that sum carried out."""
    unreduced = _manual_type(leaf, "unreduced")
    return lax.psum(leaf, unreduced) if unreduced else leaf


def factor_of(leaf: jax.Array, scalar: jax.Array) -> jax.Array:
    """The scalar as a factor of the leaf.

    JAX asks that it be marked as reduced over the axes over which the leaf is not, or
    is marked so.
    """
    spec = jax.typeof(leaf).sharding.spec
    if manual := _manual_type(leaf, "unreduced"):
        return lax.pcast(scalar, manual, to="reduced")
    if explicit := spec.unreduced | spec.reduced:
        return jax.sharding.reshard(scalar, PartitionSpec(reduced=explicit))
    return scalar


def varying_as(leaf: jax.Array, array: jax.Array) -> jax.Array:
    """The array, typed to vary over the manual axes over which the leaf does."""
    return lax.pcast(array, _varying_axes(leaf), to="varying")


def replicated(params: optax.Params | None) -> NamedSharding | None:
    """Every device of the mesh that the parameters lie on; None if on none so far."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            if isinstance(leaf.sharding, NamedSharding):
                return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return None


def is_local(leaf: jax.Array) -> bool:
    """Whether the leaf lies on one device, or whole on each, or is one device's shard.

    What XLA may yet shard is not to be read in chunks: it would gather it first.
    """
    sharding = jax.typeof(leaf).sharding
    unknown = AxisType.Auto in sharding.mesh.axis_types
    return not unknown and sharding.is_fully_replicated


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


def _named_axes(updates: optax.Updates, axis_name: AxisName) -> list[Axes]:
    """The names given for each leaf that counts."""
    given = {
        path: _as_axes(path, names)
        for path, names in jax.tree.leaves_with_path(axis_name, is_leaf=_is_names)
    }
    named = []
    for path, leaf in jax.tree.leaves_with_path(updates):
        if is_float0(leaf):
            continue
        prefixes = [path[:i] for i in range(len(path) + 1) if path[:i] in given]
        if not prefixes:
            raise ValueError(
                f"axis_name={axis_name!r} has no names for "
                f"updates{jax.tree_util.keystr(path)}. {_WHAT_TO_PASS}"
            )
        named.append(given[prefixes[0]])
    return named


def _is_names(node: object) -> TypeGuard[Axes | None]:
    return node is None or (
        isinstance(node, tuple) and all(isinstance(name, str) for name in node)
    )


def _as_axes(path: tuple, names: object) -> Axes:
    if isinstance(names, str):
        return (names,)
    if not _is_names(names):
        raise ValueError(
            f"axis_name{jax.tree_util.keystr(path)} is {names!r}. {_WHAT_TO_PASS}"
        )
    return tuple(sorted(set(names or ())))


def _has_type(name: str) -> bool:
    """Whether the types of leaves tell if they vary over this axis."""
    try:
        return name in _varying_axes(lax.axis_index(name))
    except NameError:
        manual = _axes_of(jax.sharding.get_abstract_mesh(), AxisType.Manual)
        raise NameError(
            f"axis_name={name!r} is not bound here, where the manual mesh axes are "
            f"{sorted(manual)}. Pass one of those, in pmap or in shard_map with "
            "check_vma=False. Leave axis_name out elsewhere: under plain jit the norm "
            "is global already."
        ) from None


def _axes_of(mesh: jax.sharding.AbstractMesh, type_: AxisType) -> set[str]:
    names = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, own in names if own == type_}


def _varying_axes(leaf: chex.Array) -> Axes:
    return _manual_type(leaf, "varying")


def _manual_type(leaf: chex.Array, kind: str) -> Axes:
    """The manual axes over which the leaf varies, or is unreduced."""
    if not isinstance(leaf, Tracer):
        return ()
    aval = jax.typeof(leaf)
    # jax 0.10 moved ``vma`` into ``mat``; older releases have the former only.
    if hasattr(aval, "mat"):
        return tuple(sorted(getattr(aval.mat, kind)))
    return tuple(sorted(aval.vma)) if kind == "varying" else ()
