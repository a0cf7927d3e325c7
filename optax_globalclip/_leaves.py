"""What counts as a leaf, and the errors that name one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.experimental.sparse import BCOO, BCSR, JAXSparse, bcoo_sum_duplicates

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
      updates: a tree of float or complex arrays, NumPy arrays or scalars, or of BCOO
        or BCSR matrices of them.

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
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_sparse)
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


def values_of(leaf: Any) -> jax.Array:
    """The values that a sparse leaf stores; a dense leaf itself."""
    return leaf.data if isinstance(leaf, BCOO | BCSR) else leaf


def with_values(leaf: jax.Array, values: jax.Array) -> jax.Array:
    """The leaf with other values: indices, shape and flags stay."""
    if not is_sparse(leaf):
        return values
    (_, *indices), treedef = jax.tree.flatten(leaf)
    return treedef.unflatten([values, *indices])


def merged_values(leaf: jax.Array) -> jax.Array:
    """The values of which the norm is the leaf's: those at one index summed up.

    Not where the leaf says that no index is there twice, or has no indices: a cotangent
    has float0 in their place.
    """
    values = values_of(leaf)
    if not isinstance(leaf, BCOO | BCSR) or leaf.unique_indices:
        return values
    if is_float0(leaf.indices):
        return values
    matrix = leaf.to_bcoo() if isinstance(leaf, BCSR) else leaf
    return bcoo_sum_duplicates(matrix, nse=matrix.nse).data


def accumulator_dtype(leaves: Sequence[chex.Array]) -> jnp.dtype:
    """float64 if any leaf is float64 or complex128, else float32."""
    wide = (jnp.float64, jnp.complex128)
    dtypes = [leaf.dtype for leaf in leaves]
    return jnp.dtype(jnp.float64 if any(d in wide for d in dtypes) else jnp.float32)


def is_float0(leaf: object) -> bool:
    """Whether the leaf is the tangent of an integer, which holds no numbers."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def _is_inexact_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and _is_inexact(leaf.dtype)


def is_sparse(leaf: object) -> bool:
    """Whether the leaf is a sparse matrix, of whatever format."""
    return isinstance(leaf, JAXSparse)


def _unwrapped(leaf: Any) -> Any:
    """The array in what is none itself, but tells JAX of one."""
    if isinstance(leaf, jax.Array) or not hasattr(leaf, "__jax_array__"):
        return leaf
    return leaf.__jax_array__()


def _has_norm(leaf: object) -> bool:
    if is_sparse(leaf) and not isinstance(leaf, BCOO | BCSR):
        return False
    return _is_inexact(getattr(leaf, "dtype", type(leaf)))


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    return dtype in (float, complex) or jnp.issubdtype(dtype, jnp.inexact)


def _as_array(leaf: Any) -> jax.Array:
    """The leaf as an array, strongly typed where it was a Python scalar."""
    if isinstance(leaf, jax.Array) or is_sparse(leaf):
        return leaf
    return jnp.asarray(leaf, dtype=jnp.result_type(leaf))


def _no_norm(updates: optax.Updates) -> TypeError:
    """The error for the first leaf that has no norm."""
    paths = jax.tree.leaves_with_path(updates, is_leaf=is_sparse)
    path, leaf = next(
        (path, leaf)
        for path, leaf in paths
        if not is_float0(leaf) and not _has_norm(_unwrapped(leaf))
    )
    where = f"updates{jax.tree_util.keystr(path)}"
    if is_sparse(leaf) and not isinstance(leaf, BCOO | BCSR):
        return TypeError(
            f"{where} is a {type(leaf).__name__}, but sparse leaves are BCOO or BCSR. "
            "Pass jax.experimental.sparse.BCOO.fromdense of its todense()."
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
