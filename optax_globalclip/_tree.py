"""What counts as a leaf, over which mesh axes it is sharded, and how to put it back."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._checks import described, unwrapped
from ._mesh import Axes, is_typed, varying_axes, whole

# The third is a tree prefix.
AxisName: TypeAlias = str | Axes | Iterable[Any] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass  # Not frozen: that takes four times as long to make.
class Leaf:
    """An array of the updates.

    Attributes:
      array: a float or complex array, or a BCOO or BCSR matrix of them.
      axes: the manual mesh axes over which it is one shard of a larger array.
    """

    array: Any
    axes: Axes = dataclasses.field(default=(), metadata={"static": True})


def split_updates(
    updates: optax.Updates, axis_name: AxisName
) -> tuple[list[Leaf], Callable[[Sequence[Any]], optax.Updates]]:
    """Splits a tree into the leaves that count and a function that puts arrays back.

    ``None`` and ``optax.MaskedNode`` hold no leaves, and float0 leaves (the
    tangents of integers) hold no numbers: all three stay where they are.

    Args:
      updates: a tree of float or complex arrays, NumPy arrays or scalars, or of BCOO
        or BCSR matrices of them.
      axis_name: ``None`` to read the axes off each leaf's type, else a name, a
        tuple of names, or a tree prefix of them.

    Returns:
      The leaves that count, in the tree's order, and ``join``, which takes as
      many arrays and returns a tree like ``updates`` with them in place.

    Raises:
      TypeError: naming the path and dtype of a leaf that has no norm.
      NameError: for a name that no ``shard_map``, ``pmap`` or ``vmap`` binds.
      ValueError: for a leaf that a tree prefix has no names for.
    """
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_sparse)
    arrays = [_as_array(updates, i, leaf) for i, leaf in enumerate(leaves)]
    if axis_name is None:
        axes = [varying_axes(values_of(array)) for array in arrays]
    else:
        axes = _named_axes(axis_name, updates, arrays)
    counted = [i for i, array in enumerate(arrays) if not is_float0(array)]

    def join(new_arrays: Sequence[Any]) -> optax.Updates:
        joined = list(arrays)
        for i, array in zip(counted, new_arrays, strict=True):
            joined[i] = array
        return treedef.unflatten(joined)

    return [Leaf(arrays[i], axes[i]) for i in counted], join


def values_of(array: Any) -> jax.Array:
    """The values that a sparse matrix stores; a dense array itself."""
    return array.data if is_sparse(array) else array


def with_values(array: Any, values: jax.Array) -> Any:
    """The array with other values: indices, shape and flags stay."""
    if not is_sparse(array):
        return values
    (_, *indices), treedef = jax.tree.flatten(array)
    return treedef.unflatten([values, *indices])


def matrix_values(array: Any, dtype: jnp.dtype) -> jax.Array:
    """The array, or the stored values of a sparse matrix, each index of it once.

    Values at one index are summed in ``dtype``, unless the indices are unique. Indices
    outside the shape (JAX's padding) do not count.
    """
    if not is_sparse(array) or is_float0(array.indices):
        # The cotangent of a sparse matrix has float0 in place of indices.
        return values_of(array)
    from jax.experimental.sparse import BCOO, BCSR, bcoo_sum_duplicates

    batch = array.shape[: array.n_batch]

    def full(part: jax.Array) -> jax.Array:
        """The part with batch dimensions of size 1 broadcast, as JAX reads them."""
        # JAX does not sort over an explicit axis.
        return jnp.broadcast_to(whole(part, part), batch + part.shape[len(batch) :])

    (data, *indices), treedef = jax.tree.flatten(array)
    index_dtype = np.promote_types(array.indices.dtype, np.int32)
    indices = [full(part).astype(index_dtype) for part in indices]
    matrix = treedef.unflatten([full(data).astype(wide(data, dtype)), *indices])
    if isinstance(matrix, BCSR):
        # Values after ``indptr[-1]`` get a row outside the shape.
        matrix = matrix.to_bcoo()
    sizes = matrix.shape[matrix.n_batch :][: matrix.n_sparse]
    sizes = jnp.broadcast_to(jnp.asarray(sizes, index_dtype), matrix.indices.shape)
    # As in NumPy, negative indices count from the end.
    indices = jnp.where(matrix.indices < 0, matrix.indices + sizes, matrix.indices)
    counted = jnp.all((indices >= 0) & (indices < sizes), -1)
    counted = jnp.expand_dims(counted, tuple(range(-matrix.n_dense, 0)))
    data = jnp.where(counted, matrix.data, jnp.zeros_like(matrix.data))
    if array.unique_indices:
        return data
    matrix = BCOO((data, indices), shape=matrix.shape)
    # Not the method ``sum_duplicates``: it drops zeros, and with them their derivative.
    return bcoo_sum_duplicates(matrix, nse=matrix.nse).data


def wide(array: jax.Array, accumulator: jnp.dtype) -> jnp.dtype:
    """The dtype to compute with an array in: the accumulator's, complex if it is."""
    if not jnp.iscomplexobj(array):
        return accumulator
    return jnp.dtype(f"complex{2 * jnp.finfo(accumulator).bits}")


def is_float0(leaf: object) -> bool:
    """Whether the leaf is the tangent of an integer, which holds no numbers."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def is_sparse(leaf: object) -> bool:
    """Whether the leaf is a sparse matrix, of whatever format."""
    # No leaf is, unless something has imported this: the package itself does not.
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(leaf, sparse.JAXSparse)


def _as_array(updates: optax.Updates, place: int, leaf: Any) -> Any:
    """The leaf as an array, strongly typed if it was a scalar.

    Raises:
      TypeError: if it has no norm, naming its path: ``place`` is its number.
    """
    # The usual case first: this is much of a call outside ``jit``.
    if isinstance(leaf, jax.Array) and _is_inexact(leaf.dtype):
        return leaf
    leaf = unwrapped(leaf)
    if is_float0(leaf):
        return leaf
    if remedy := _remedy(leaf):
        path, _ = jax.tree.leaves_with_path(updates, is_leaf=is_sparse)[place]
        raise TypeError(
            f"updates{jax.tree_util.keystr(path)} is {described(leaf)}, but a global "
            f"norm takes float or complex arrays. {remedy}"
        )
    if isinstance(leaf, jax.Array) or is_sparse(leaf):
        return leaf
    return jnp.asarray(leaf, dtype=jnp.result_type(leaf))


def _remedy(leaf: Any) -> str | None:
    """What to pass instead of a leaf without a norm; None if it has one."""
    if isinstance(leaf, float | complex):
        return None
    if is_sparse(leaf) and not hasattr(leaf, "n_batch"):
        return "Pass a BCOO or BCSR matrix, which CSR, CSC and COO convert to."
    if isinstance(leaf, np.ma.MaskedArray):
        return "It is masked: pass its .filled(0)."
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "Pass an abstract array through jax.eval_shape of this function."
    if isinstance(leaf, Iterable) and not hasattr(leaf, "dtype"):
        return "Pass list(...) of an iterator, or a pytree of its arrays."
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(dtype, np.dtype) or not _is_inexact(dtype):
        return "Leave it out with optax.masked, or put None in its place."
    if jnp.finfo(dtype).bits > 64 or not dtype.isnative:
        return "JAX has no such arrays: pass .astype of a native dtype of 64 bits."
    if not (is_sparse(leaf) or isinstance(leaf, jax.Array | np.ndarray | np.generic)):
        return f"It is a {type(leaf).__name__}: pass an array of JAX or NumPy."
    return None


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _named_axes(axis_name, updates, arrays) -> list[Axes]:
    """The names given for each leaf, less typed axes that it does not vary on."""
    skeleton = jax.tree.map(lambda _: 0, updates, is_leaf=is_sparse)
    try:
        tree = jax.tree.broadcast(axis_name, skeleton, is_leaf=_is_names)
        names = [_as_axes(x) for x in jax.tree.structure(skeleton).flatten_up_to(tree)]
    except ValueError as error:
        raise ValueError(
            f"axis_name={axis_name!r} is no tree prefix of the updates. Pass a name, a "
            "tuple of names, or a tree prefix of the updates with one of them for each "
            "leaf; () says that every device holds the whole leaf."
        ) from error
    typed = {name: is_typed(name) for own in names for name in own}
    # A sum over an axis that a leaf does not vary over would count it repeatedly.
    varying = [varying_axes(values_of(array)) for array in arrays]
    return [
        tuple(name for name in own if not typed[name] or name in axes)
        for own, axes in zip(names, varying, strict=True)
    ]


def _is_names(node: object) -> bool:
    """Whether the node is a name, a plain tuple of names, or None."""
    if type(node) is tuple:
        return all(isinstance(name, str) for name in node)
    return node is None or isinstance(node, str)


def _as_axes(names: Any) -> Axes:
    if not _is_names(names):
        raise ValueError(f"{names!r} is no name and no tuple of names.")
    return (names,) if isinstance(names, str) else tuple(sorted(set(names or ())))
