"""Mesh axes: over which ones a leaf is split, as its type tells, and sums across them.

In ``shard_map`` and ``pmap`` a leaf is one device's shard, and a sum must say over
which axes it goes on. Where the axes are explicit, the types of the leaves tell as
much, and ``on_shards`` enters ``shard_map``. Where they are auto, XLA alone knows how
leaves are split, and sums across devices by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = tuple[str, ...]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def varying_axes(leaf: chex.Array) -> Axes:
    """The manual axes over which the leaf differs, as far as its type tells."""
    return _manual_type(leaf, "varying")


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
        return measure(leaves, tuple(map(varying_axes, leaves)), *args)

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


def _manual_type(leaf: chex.Array, kind: str) -> Axes:
    """The manual axes over which the leaf varies, or is unreduced."""
    if not isinstance(leaf, Tracer):
        return ()
    aval = jax.typeof(leaf)
    # jax 0.10 moved ``vma`` into ``mat``; older releases have the former only.
    if hasattr(aval, "mat"):
        return tuple(sorted(getattr(aval.mat, kind)))
    return tuple(sorted(aval.vma)) if kind == "varying" else ()
