"""The global norm of a tree, and the norm of each of its leaves."""

import dataclasses
import functools
import numbers
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._axis_name import AxisName, leaf_axes
from ._l2 import ScaledNorm, l2_norm
from ._leaves import accumulator_dtype, is_float0, merged_values, split_leaves
from ._lp import Ord, lp_norm, lp_norms
from ._mesh import Axes, on_shards, reduced


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StaticOrd:
    """An ``ord`` known at trace time: each one compiles to code of its own."""

    value: float


def global_norm(
    updates: optax.Updates, *, ord: chex.Numeric = 2, axis_name: AxisName = None
) -> jax.Array:
    r"""The norm of all entries of a tree, taken as one long vector.

    .. math:: \lVert g \rVert_p = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Formal guarantees:

    * Sums are accumulated in float32, or in float64 if any leaf is float64 or
      complex128, whatever the dtypes of the leaves.
    * The norm is right for every tree of finite entries whose norm is a normal float
      of the result's dtype: entries whose powers overflow or underflow are rescaled.
      (For orders other than 2, and where auto mesh axes leave the sharding to XLA, it
      reads subnormal entries as zero on CPU.)
    * It is the norm of whole leaves however they are sharded, at one all-reduce for
      all leaves split over the same mesh axes (XLA merges fewer where axes are auto).
    * It can be differentiated twice. Its gradient at zero is zero.
    * Outside ``jit`` it is one compiled call.

    =============================== ========================================
    updates                         norm
    =============================== ========================================
    no leaves, or only empty ones   0
    ``None``, ``MaskedNode``        not counted
    float0 leaves                   not counted
    complex leaves                  by their modulus
    infinite entries                inf
    NaN entries                     NaN
    =============================== ========================================

    Args:
      updates: a tree of float or complex arrays of any shapes, NumPy arrays, Python
        scalars, or BCOO and BCSR matrices, whose values at one index count as their
        sum unless ``unique_indices`` is set.
      ord: the order p of the norm, a real number of at least 1, or ``inf`` for
        the largest modulus. A traced scalar is accepted, and costs a second read.
      axis_name: for ``pmap``, and ``shard_map`` with ``check_vma=False``: the
        mesh axes over which leaves are sharded, as a name, a tuple of names, or
        a tree prefix of them; ``()`` for leaves that every device holds whole, as
        it is for all if nothing is passed. Elsewhere the types of the leaves tell.

    Returns:
      A float32 scalar; float64 if any leaf is float64 or complex128.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path.
      ValueError: if ``ord`` is less than 1 or NaN, or ``axis_name`` a tree that has no
        names for a leaf.
      NameError: for an axis that no ``pmap``, ``shard_map`` or ``vmap`` binds.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0]), "frozen": None}
      >>> print(optax_globalclip.global_norm(grads))
      5.0

    References:
      `tf.linalg.global_norm
      <https://www.tensorflow.org/api_docs/python/tf/linalg/global_norm>`_
    """
    leaves, _ = split_leaves(updates)
    axes = leaf_axes(leaves, updates, axis_name)
    return _global_norm(leaves, as_ord(ord), axes)


def leaf_norms(
    updates: optax.Updates, *, ord: chex.Numeric = 2, axis_name: AxisName = None
) -> optax.Updates:
    """The norm of each leaf by itself, to log layers or to find the bad one.

    Args:
      updates: as for :func:`global_norm`.
      ord: as for :func:`global_norm`.
      axis_name: as for :func:`global_norm`.

    Returns:
      A tree like ``updates``, each leaf a float32 scalar (float64 for a float64 or
      complex128 leaf). ``None`` and ``MaskedNode`` stay; float0 leaves give 0.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path.
      ValueError: if ``ord`` is less than 1 or NaN.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([jnp.nan])}
      >>> norms = optax_globalclip.leaf_norms(grads)
      >>> print(norms["w"])
      5.0
      >>> bad = [path for path, norm in jax.tree.leaves_with_path(norms)
      ...        if not jnp.isfinite(norm)]
      >>> print(jax.tree_util.keystr(bad[0]))
      ['b']
    """
    leaves, join = split_leaves(updates)
    axes = leaf_axes(leaves, updates, axis_name)
    norms = join(_leaf_norms(leaves, as_ord(ord), axes))
    return jax.tree.map(lambda x: jnp.float32(0) if is_float0(x) else x, norms)


def as_ord(ord: chex.Numeric) -> StaticOrd | jax.Array:
    """Checks ``ord``, and makes it static unless it is traced."""
    if isinstance(ord, Tracer):
        return ord
    real = isinstance(ord, numbers.Real | np.ndarray | jax.Array)
    if not real or np.shape(ord) != () or not ord >= 1:
        raise ValueError(
            f"ord={ord!r}: the order of a norm is a real number of at least 1, "
            "or math.inf for the largest entry."
        )
    return StaticOrd(float(ord))


def measure(
    leaves: Sequence[jax.Array], ord: StaticOrd | jax.Array, axes: tuple[Axes, ...]
) -> ScaledNorm:
    """The global norm of the leaves, each sharded over its own manual mesh axes."""
    if not leaves:
        return ScaledNorm(jnp.float32(0), jnp.float32(1))
    return on_shards(_measure, list(map(merged_values, leaves)), axes, ord)


@functools.partial(jax.jit, static_argnames="axes")
def _global_norm(leaves, ord, axes):
    return measure(leaves, ord, axes).as_float()


@functools.partial(jax.jit, static_argnames="axes")
def _leaf_norms(leaves, ord, axes):
    return on_shards(_measure_each, list(map(merged_values, leaves)), axes, ord)


def _measure(leaves, axes, ord):
    leaves = list(map(reduced, leaves))
    if isinstance(ord, StaticOrd) and ord.value == 2:
        return l2_norm(leaves, axes)
    return lp_norm(leaves, _exponent(ord), axes)


def _measure_each(leaves, axes, ord):
    norms = lp_norms(list(map(reduced, leaves)), _exponent(ord), axes)
    return [
        norm.astype(accumulator_dtype([leaf]))
        for norm, leaf in zip(norms, leaves, strict=True)
    ]


def _exponent(ord: StaticOrd | jax.Array) -> Ord:
    return ord.value if isinstance(ord, StaticOrd) else ord
