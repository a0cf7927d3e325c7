"""Mesh axes: over which ones an array is a shard, as its type says; all-reduces.

In ``shard_map`` and ``pmap`` an array is one device's shard, and its type says over
which manual axes it varies. With auto or explicit axes it is the whole array, and XLA
reduces it over devices by itself.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

Axes: TypeAlias = tuple[str, ...]


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


def reduced(array: jax.Array) -> jax.Array:
    """The array with its pending sum over devices carried out, and no such marks."""
    if manual := _manual_axes(array, "unreduced"):
        return lax.psum(array, manual)
    own = jax.typeof(array).sharding
    if own.spec.unreduced | own.spec.reduced:
        # Before JAX 0.10 a spec was a tuple of its partitions.
        spec = P(*getattr(own.spec, "partitions", own.spec))
        return jax.sharding.reshard(array, NamedSharding(own.mesh, spec))
    return array


def factor_of(array: jax.Array, scalar: jax.Array) -> jax.Array:
    """The scalar as a factor of the array.

    JAX requires it to be marked as reduced over the axes over which the array is
    unreduced, or is marked as reduced.
    """
    if manual := _manual_axes(array, "unreduced"):
        return lax.pcast(scalar, manual, to="reduced")
    own = jax.typeof(array).sharding
    if axes := own.spec.unreduced | own.spec.reduced:
        return jax.sharding.reshard(scalar, NamedSharding(own.mesh, P(reduced=axes)))
    return scalar


def on_mesh_of(array: jax.Array, tree: Any) -> Any:
    """The tree, with what lies on no mesh whole on every device of the array's.

    JAX cannot vmap over an explicit axis what is selected from values on no mesh. (JAX
    0.9 cannot if they are on one either: there the tree stays as it is. So it does
    outside ``jit``, where arrays are on devices already.)
    """
    if not isinstance(array, Tracer) or not hasattr(P, "partitions"):
        return tree
    return jax.tree.map(lambda x: x if has_mesh(x) else whole(x, array), tree)


def whole(array: jax.Array, like: jax.Array) -> jax.Array:
    """The array whole on every device of the other's mesh, over explicit axes."""
    mesh = jax.typeof(like).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return array
    return jax.sharding.reshard(array, _replicated(mesh, array))


def laid_out_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array with the sharding of another, if that has one over explicit axes."""
    wanted = jax.typeof(other).sharding
    if wanted.mesh.empty or jax.typeof(array).sharding == wanted:
        return array
    return jax.sharding.reshard(array, wanted)


def either(condition: jax.Array, one: float, other: float, dtype: Any) -> jax.Array:
    """One of two numbers. JAX cannot vmap a selection of two over an explicit axis."""
    rest = (~condition).astype(dtype) * other
    return jnp.where(condition, jnp.array(one, dtype), rest)


def zero_if(condition: jax.Array, array: jax.Array) -> jax.Array:
    """Zeros, else the array; in this order JAX can vmap it over an explicit axis."""
    return lax.select(condition, jnp.zeros_like(array), array)


def placed(tree: Any, params: Any) -> Any:
    """The tree on every device of the mesh that the parameters lie on, or on their one.

    If they are committed to none, nor is the tree.
    """
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, Tracer):
            # As results of an operation: JAX's vmap maps no constant over an explicit
            # axis, nor over a mesh axis, even if device_put returned it.
            return jax.tree.map(lambda x: jnp.where(True, x, x), tree)
        if isinstance(leaf, jax.Array):
            place = leaf.sharding
            if isinstance(place, NamedSharding):
                places = jax.tree.map(functools.partial(_replicated, place.mesh), tree)
                return jax.device_put(tree, places)
            if leaf.committed and len(place.device_set) == 1:
                return jax.device_put(tree, *place.device_set)
    return jax.device_put(tree)


def _replicated(mesh: Any, array: Any) -> NamedSharding:
    """On every device, in the words in which an update returns it."""
    dimensions = jnp.ndim(array) if AxisType.Explicit in mesh.axis_types else 0
    return NamedSharding(mesh, P(*[None] * dimensions))


def has_mesh(array: jax.Array) -> bool:
    """Whether the array lies on a mesh, or is a shard of one that does."""
    return not jax.typeof(array).sharding.mesh.empty


def is_local(array: jax.Array) -> bool:
    """Whether the array is on one device, is a shard, or is whole on every device."""
    own = jax.typeof(array).sharding
    return AxisType.Auto not in own.mesh.axis_types and own.is_fully_replicated


def _manual_axes(array: Any, kind: str) -> Axes:
    """The manual axes over which the array varies, or is unreduced."""
    if not isinstance(array, Tracer):
        return ()
    aval = jax.typeof(array)
    if hasattr(aval, "mat"):
        return tuple(sorted(getattr(aval.mat, kind)))
    # Before JAX 0.10 the type has the former only, and the sharding has the latter.
    manual = aval.sharding.spec.unreduced & set(aval.sharding.mesh.manual_axes)
    return tuple(sorted(aval.vma if kind == "varying" else manual))
