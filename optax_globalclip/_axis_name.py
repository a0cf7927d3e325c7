"""The argument ``axis_name``, for leaves whose types do not tell how they are split."""

from collections.abc import Sequence
from typing import TypeGuard

import chex
import jax
import optax
from jax import lax
from jax.sharding import AxisType

from ._leaves import is_float0, is_sparse, values_of
from ._mesh import Axes, varying_axes

AxisName = str | Axes | chex.ArrayTree | None

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
        return tuple(varying_axes(values_of(leaf)) for leaf in leaves)
    named = _named_axes(updates, axis_name)
    typed = {name: _has_type(name) for name in {name for own in named for name in own}}
    return tuple(
        # A sum over an axis that a leaf does not vary over would count it repeatedly.
        tuple(name for name in own if not typed[name] or name in varying_axes(leaf))
        for leaf, own in zip(map(values_of, leaves), named, strict=True)
    )


def _named_axes(updates: optax.Updates, axis_name: AxisName) -> list[Axes]:
    """The names given for each leaf that counts."""
    given = {
        path: _as_axes(path, names)
        for path, names in jax.tree.leaves_with_path(axis_name, is_leaf=_is_names)
    }
    named = []
    for path, leaf in jax.tree.leaves_with_path(updates, is_leaf=is_sparse):
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
        return name in varying_axes(lax.axis_index(name))
    except NameError:
        mesh = jax.sharding.get_abstract_mesh()
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        manual = [name for name, type_ in types if type_ == AxisType.Manual]
        raise NameError(
            f"axis_name={name!r} is not bound here, where the manual mesh axes are "
            f"{manual}. Pass one of those, in pmap or in shard_map with "
            "check_vma=False. Leave axis_name out elsewhere: under plain jit the norm "
            "is global already."
        ) from None
