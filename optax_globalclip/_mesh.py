"""Mesh axes: over which ones an array is sharded, as its type says; all-reduces.

In ``shard_map`` and ``pmap`` an array is one device's shard, and its type says over
which manual axes it varies. If axes are explicit, the type has the sharding, and
``on_shards`` enters ``shard_map``. If axes are auto, XLA alone knows the shardings, and
reduces over devices by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import optax
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Axes = tuple[str, ...]

_Result = TypeVar("_Result")


def varying_axes(array: Any) -> Axes:
    """The manual axes over which the array differs, as far as its type says."""
    return _manual_axes(array, "varying")


def is_typed(name: str) -> bool:
    """Whether the types of arrays say if they vary over this manual axis.

    Raises:
      NameError: if no ``shard_map``, ``pmap`` or ``vmap`` binds the axis.
    """
    try:
        return name in varying_axes(lax.axis_index(name))
    except NameError:
        manual = list(jax.sharding.get_abstract_mesh().manual_axes)
        raise NameError(
            f"axis_name={name!r} is not bound here, where the manual mesh axes are "
            f"{manual}. Pass one of those, in pmap or in shard_map with "
            "check_vma=False. Leave axis_name out elsewhere: under plain jit the norm "
            "is global already."
        ) from None


def on_shards(
    measure: Callable[..., _Result], arrays: Sequence[jax.Array], *args: Any
) -> _Result | None:
    """``measure(arrays, axes, *args)`` in ``shard_map``, if all axes are explicit.

    Otherwise None. In ``shard_map`` one all-reduce serves all arrays sharded over the
    same axes. XLA would insert one for each array and axis.

    Args:
      measure: a function to scalars that are the same on every device.
      arrays: arrays.
      *args: trees of scalars.
    """
    shardings = [jax.typeof(array).sharding for array in arrays]
    meshes = [sharding.mesh for sharding in shardings]
    # Not if some axes are manual: JAX 0.10 orders the axes of residuals wrongly in the
    # gradient of a nested shard_map: https://github.com/jax-ml/jax/pull/26588
    mesh = next((m for m in meshes if set(m.axis_types) == {AxisType.Explicit}), None)
    if mesh is None:
        return None

    unmarked = [sharding.spec.update(reduced=frozenset()) for sharding in shardings]
    arrays = jax.sharding.reshard(
        list(arrays), [NamedSharding(mesh, spec) for spec in unmarked]
    )
    return jax.shard_map(
        lambda arrays, *args: measure(arrays, list(map(varying_axes, arrays)), *args),
        mesh=mesh,
        out_specs=PartitionSpec(),
    )(arrays, *args)


def is_marked(array: jax.Array) -> bool:
    """Whether the array is marked as unreduced, or as reduced over explicit axes.

    The sum of an unreduced array over devices is still pending. JAX permits few
    operations on such arrays but products with scalars.
    """
    spec = jax.typeof(array).sharding.spec
    explicit = spec.unreduced | spec.reduced
    return bool(explicit or _manual_axes(array, "unreduced"))


def reduced(array: jax.Array) -> jax.Array:
    """The array, in manual mode, with that sum carried out."""
    unreduced = _manual_axes(array, "unreduced")
    return lax.psum(array, unreduced) if unreduced else array


def factor_of(array: jax.Array, scalar: jax.Array) -> jax.Array:
    """The scalar as a factor of the array.

    JAX requires it to be marked as reduced over the axes over which the array is
    unreduced, or is marked as reduced.
    """
    spec = jax.typeof(array).sharding.spec
    if manual := _manual_axes(array, "unreduced"):
        return lax.pcast(scalar, manual, to="reduced")
    if explicit := spec.unreduced | spec.reduced:
        return jax.sharding.reshard(scalar, PartitionSpec(reduced=explicit))
    return scalar


def replicated(params: optax.Params | None) -> NamedSharding | None:
    """Every device of the mesh that the parameters lie on; None if on none so far."""
    for leaf in jax.tree.leaves(params):
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if placed and isinstance(leaf.sharding, NamedSharding):
            return NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return None


def has_mesh(array: jax.Array) -> bool:
    """Whether the array lies on a mesh, or is a shard of one that does."""
    return not jax.typeof(array).sharding.mesh.empty


def on_tpu_mesh(array: jax.Array) -> bool:
    """Whether the array lies on a mesh of TPUs, or is a shard of one that does."""
    device = jax.typeof(array).sharding.mesh.abstract_device
    return device is not None and device.device_kind.startswith("TPU")


def is_local(array: jax.Array) -> bool:
    """Whether the array lies on one device, or is one device's shard."""
    return set(jax.typeof(array).sharding.mesh.axis_types) <= {AxisType.Manual}


def _manual_axes(array: Any, kind: str) -> Axes:
    """The manual axes over which the array varies, or is unreduced."""
    if not isinstance(array, Tracer):
        return ()
    aval = jax.typeof(array)
    # jax 0.10 moved ``vma`` into ``mat``; older releases have the former only.
    if hasattr(aval, "mat"):
        return tuple(sorted(getattr(aval.mat, kind)))
    return tuple(sorted(aval.vma)) if kind == "varying" else ()
