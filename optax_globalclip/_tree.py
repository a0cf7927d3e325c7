"""What counts as a leaf, over which mesh axes it is sharded, and how to put it back."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._mesh import Axes, is_typed, varying_axes
from ._range import wide

AxisName = str | Axes | Iterable[Any] | None  # The third is a tree prefix.

_WITHOUT = (
    "Leave such leaves out with optax.masked or optax.partition, "
    "or put None in their place."
)
_WHAT_TO_PASS = (
    "Pass a name, a tuple of names, or a tree prefix of the updates with one of them "
    "for each leaf; () says that every device holds the whole leaf."
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"]
)
@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the updates.

    Attributes:
      array: a float or complex array, or a BCOO or BCSR matrix of them.
      axes: the manual mesh axes over which it is one shard of a larger array.
    """

    array: Any
    axes: Axes = ()


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
    arrays, treedef = jax.tree.flatten(updates)
    join = treedef.unflatten
    # The usual case first: the search for others is most of a call outside ``jit``.
    if not all(map(_is_inexact_array, arrays)):
        arrays, join = _split_unusual(updates)
    if axis_name is None:
        return [Leaf(array, varying_axes(values_of(array))) for array in arrays], join
    named = _named_axes(updates, axis_name)
    typed = {name: is_typed(name) for own in named for name in own}
    # A sum over an axis that a leaf does not vary over would count it repeatedly.
    counted = [
        tuple(n for n in own if not typed[n] or n in varying_axes(values_of(array)))
        for array, own in zip(arrays, named, strict=True)
    ]
    return list(map(Leaf, arrays, counted)), join


def accumulator_dtype(arrays: Sequence[Any]) -> jnp.dtype:
    """float64 if any array is float64 or complex128, else float32."""
    wide = (jnp.float64, jnp.complex128)
    return jnp.dtype(
        jnp.float64 if any(a.dtype in wide for a in arrays) else jnp.float32
    )


def values_of(array: Any) -> jax.Array:
    """The values that a sparse matrix stores; a dense array itself."""
    return array.data if _is_matrix(array) else array


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
    if not _is_matrix(array) or is_float0(array.indices):
        # The cotangent of a sparse matrix has float0 in place of indices.
        return values_of(array)
    from jax.experimental.sparse import BCOO, BCSR, bcoo_sum_duplicates

    matrix = _with_full_batches(array)
    counted = _stored(matrix)
    if isinstance(matrix, BCSR):
        matrix = matrix.to_bcoo()
    indices = matrix.indices.astype(jnp.promote_types(matrix.indices.dtype, "int32"))
    sizes = matrix.shape[matrix.n_batch :][: matrix.n_sparse]
    sizes = jnp.broadcast_to(jnp.asarray(sizes, indices.dtype), indices.shape)
    # As in NumPy, negative indices count from the end.
    indices = jnp.where(indices < 0, indices + sizes, indices)
    counted &= jnp.all((indices >= 0) & (indices < sizes), -1)
    counted = jnp.expand_dims(counted, tuple(range(-matrix.n_dense, 0)))
    data = matrix.data.astype(wide(matrix.data, dtype))
    data = jnp.where(counted, data, jnp.zeros_like(data))
    if array.unique_indices:
        return data
    return bcoo_sum_duplicates(
        BCOO((data, indices), shape=matrix.shape), nse=matrix.nse
    ).data


def is_float0(leaf: object) -> bool:
    """Whether the leaf is the tangent of an integer, which holds no numbers."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def is_sparse(leaf: object) -> bool:
    """Whether the leaf is a sparse matrix, of whatever format."""
    # No leaf is, unless something has imported this: the package itself does not.
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(leaf, sparse.JAXSparse)


def _is_matrix(leaf: object) -> bool:
    """Whether the leaf is a sparse matrix of a format that has a norm here."""
    sparse = sys.modules.get("jax.experimental.sparse")
    return sparse is not None and isinstance(leaf, sparse.BCOO | sparse.BCSR)


def _split_unusual(updates: optax.Updates) -> tuple[list[Any], Callable[..., Any]]:
    """The same for a tree with sparse or float0 leaves, NumPy arrays or numbers."""
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_sparse)
    leaves = [_unwrapped(leaf) for leaf in leaves]
    counted = [i for i, leaf in enumerate(leaves) if not is_float0(leaf)]
    if not all(_has_norm(leaves[i]) for i in counted):
        raise _no_norm(updates)

    def join(arrays: Sequence[Any]) -> optax.Updates:
        joined = list(leaves)
        for i, array in zip(counted, arrays, strict=True):
            joined[i] = array
        return treedef.unflatten(joined)

    return [_as_array(leaves[i]) for i in counted], join


def _with_full_batches(matrix: Any) -> Any:
    """The matrix with batch dimensions of size 1 broadcast, as JAX reads them."""
    batch = matrix.shape[: matrix.n_batch]

    def full(array: jax.Array) -> jax.Array:
        return jnp.broadcast_to(array, batch + array.shape[len(batch) :])

    parts, treedef = jax.tree.flatten(matrix)
    return treedef.unflatten(map(full, parts)) if batch else matrix


def _stored(matrix: Any) -> jax.Array:
    """Which of the places for values hold one; BCSR's after ``indptr[-1]`` do not."""
    batch = matrix.shape[: matrix.n_batch]
    places = jnp.broadcast_to(jnp.arange(matrix.nse), (*batch, matrix.nse))
    if not hasattr(matrix, "indptr"):
        return places >= 0
    return places < matrix.indptr[..., -1:].astype(places.dtype)


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


def _as_axes(path: tuple[Any, ...], names: object) -> Axes:
    if isinstance(names, str):
        return (names,)
    if not _is_names(names):
        raise ValueError(
            f"axis_name{jax.tree_util.keystr(path)} is {names!r}. {_WHAT_TO_PASS}"
        )
    return tuple(sorted(set(names or ())))


def _is_inexact_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and _is_inexact(leaf.dtype)


def _unwrapped(leaf: Any) -> Any:
    """The array that an object converts to by ``__jax_array__``; others as they are."""
    if isinstance(leaf, jax.Array) or not hasattr(leaf, "__jax_array__"):
        return leaf
    return leaf.__jax_array__()


def _has_norm(leaf: object) -> bool:
    if is_sparse(leaf) and not _is_matrix(leaf):
        return False
    if isinstance(leaf, type | jax.ShapeDtypeStruct):
        return False
    try:
        return _is_inexact(getattr(leaf, "dtype", type(leaf)))
    except TypeError:  # The dtype of another framework.
        return False


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    if dtype in (float, complex):
        return True
    return jnp.issubdtype(dtype, jnp.inexact) and not _is_extended(dtype)


def _is_extended(dtype: Any) -> bool:
    """Whether the dtype is a long double, which JAX has no arrays of."""
    extended = np.dtype(np.longdouble), np.dtype(np.clongdouble)
    return dtype in extended and dtype not in (np.float64, np.complex128)


def _as_array(leaf: Any) -> jax.Array:
    """The leaf as an array, strongly typed if it was a Python scalar."""
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
    if is_sparse(leaf) and not _is_matrix(leaf):
        return TypeError(
            f"{where} is a {type(leaf).__name__}, but sparse leaves are BCOO or BCSR. "
            "Pass jax.experimental.sparse.BCOO.fromdense of its todense()."
        )
    if hasattr(leaf, "dtype") and not isinstance(leaf, type):
        shape = ",".join(map(str, getattr(leaf, "shape", ())))
        what = f"{leaf.dtype}[{shape}]"
        if remedy := _remedy(leaf):
            return TypeError(f"{where} is {what}, {remedy}")
    else:
        what = f"{leaf!r}, of type {type(leaf).__name__}"
    return TypeError(
        f"{where} is {what}, but a global norm takes float or complex arrays. "
        f"{_WITHOUT}"
    )


def _remedy(leaf: Any) -> str | None:
    """What to do about a leaf that is an array, but none of JAX or NumPy."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return (
            "but abstract: it has no entries. Pass it through jax.eval_shape of this "
            "function."
        )
    try:
        extended = _is_extended(np.dtype(leaf.dtype))
    except TypeError:
        extended = False
        if not isinstance(leaf, jax.Array):
            return (
                f"a {type(leaf).__module__}.{type(leaf).__name__}, but a global norm "
                "takes arrays of JAX or NumPy. Pass jax.dlpack.from_dlpack of it."
            )
    if extended:
        return (
            "which JAX has no arrays of. Pass it .astype of numpy.float64 or "
            "numpy.complex128."
        )
    return None
