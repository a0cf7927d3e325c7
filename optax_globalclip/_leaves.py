"""What counts as a leaf, and the errors that name one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import JAXSparse

_WITHOUT = (
    "Leave such leaves out with optax.masked or optax.partition, "
    "or put None in their place."
)


def split_leaves(
    updates: optax.Updates,
) -> tuple[list[jax.Array], Callable[[Sequence[jax.Array]], optax.Updates]]:
    """Splits a tree into the leaves that count and a function that puts them back.

    ``None`` and ``optax.MaskedNode`` hold no leaves, and float0 leaves (the
    tangents of integers) hold no numbers: all three stay where they are.

    Args:
      updates: a tree of float or complex arrays, NumPy arrays or scalars.

    Returns:
      The leaves that count, in the tree's order, and ``join``, which takes as
      many leaves and returns a tree like ``updates`` with them in place.

    Raises:
      TypeError: naming the path and dtype of a leaf that has no norm.
    """
    leaves, treedef = jax.tree.flatten(updates)
    if all(map(_is_inexact_array, leaves)):
        # By far the most common tree, and most of what a call costs outside ``jit``.
        return leaves, treedef.unflatten
    leaves, treedef = jax.tree.flatten(updates, is_leaf=_is_sparse)
    leaves = [_unwrapped(leaf) for leaf in leaves]
    counted = [i for i, leaf in enumerate(leaves) if not is_float0(leaf)]
    if not all(_has_norm(leaves[i]) for i in counted):
        raise _no_norm(updates)

    def join(new_leaves: Sequence[jax.Array]) -> optax.Updates:
        joined = list(leaves)
        for i, leaf in zip(counted, new_leaves, strict=True):
            joined[i] = leaf
        return treedef.unflatten(joined)

    return [_as_array(leaves[i]) for i in counted], join


def accumulator_dtype(leaves: Sequence[chex.Array]) -> jnp.dtype:
    """float64 if any leaf is float64 or complex128, else float32."""
    wide = (jnp.float64, jnp.complex128)
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    return jnp.dtype(jnp.float64 if any(d in wide for d in dtypes) else jnp.float32)


def is_float0(leaf: object) -> bool:
    """Whether the leaf is the tangent of an integer, which holds no numbers."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def _is_inexact_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and _is_inexact(leaf.dtype)


def _is_sparse(leaf: object) -> bool:
    return isinstance(leaf, JAXSparse)


def _unwrapped(leaf: Any) -> Any:
    """The array in what is none itself, but tells JAX of one."""
    if isinstance(leaf, jax.Array) or not hasattr(leaf, "__jax_array__"):
        return leaf
    return leaf.__jax_array__()


def _has_norm(leaf: object) -> bool:
    if _is_sparse(leaf):
        return False
    return _is_inexact(getattr(leaf, "dtype", type(leaf)))


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    return dtype in (float, complex) or jnp.issubdtype(dtype, jnp.inexact)


def _as_array(leaf: jax.typing.ArrayLike) -> jax.Array:
    """The leaf as an array, strongly typed where it was a Python scalar."""
    if isinstance(leaf, jax.Array):
        return leaf
    return jnp.asarray(leaf, dtype=jnp.result_type(leaf))


def _no_norm(updates: optax.Updates) -> TypeError:
    """The error for the first leaf that has no norm."""
    paths = jax.tree.leaves_with_path(updates, is_leaf=_is_sparse)
    path, leaf = next(
        (path, leaf)
        for path, leaf in paths
        if not is_float0(leaf) and not _has_norm(_unwrapped(leaf))
    )
    where = f"updates{jax.tree_util.keystr(path)}"
    if _is_sparse(leaf):
        return TypeError(
            f"{where} is a {type(leaf).__name__}, and sparse leaves are not "
            f"supported yet. Pass its todense(). {_WITHOUT}"
        )
    if hasattr(leaf, "dtype"):
        shape = ",".join(map(str, getattr(leaf, "shape", ())))
        what = f"{leaf.dtype}[{shape}]"
    else:
        what = f"{leaf!r}, of type {type(leaf).__name__}"
    return TypeError(
        f"{where} is {what}, but a global norm takes float or complex arrays. "
        f"{_WITHOUT}"
    )
