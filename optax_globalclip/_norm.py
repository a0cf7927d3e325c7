"""The norms: of a whole tree, and of each of its leaves.

Each is ``value * unit``, with the unit a power of two, so that neither overflows. The
sums of squares of the 2-norm are in ``_reduce``, and in ``_cpu`` for one CPU.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import _cpu
from ._checks import Scalar, as_ord
from ._mesh import Axes, factor_of, reduced
from ._reduce import Range, add, real_parts, root_of_squares, two_sums
from ._tree import (
    AxisName,
    Leaf,
    accumulator_dtype,
    is_float0,
    matrix_values,
    split_updates,
)


def global_norm(
    updates: optax.Updates, *, ord: float | None = None, axis_name: AxisName = None
) -> jax.Array:
    r"""Returns the norm of all entries of a tree, taken as one vector.

    .. math:: \lVert g \rVert_p = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Formal guarantees:

    * Sums are accumulated in float32, or in float64 if any leaf is float64 or
      complex128, whatever the dtypes of the leaves.
    * The norm is right for every tree of finite entries whose norm is a normal float
      of the result's dtype: entries whose powers overflow or underflow are rescaled.
      (On CPU it reads subnormal entries as zero for orders other than 2, where auto
      mesh axes leave the sharding to XLA, and in float32 leaves beside float64 ones.)
    * It is the norm of whole leaves however they are sharded. All leaves split over
      the same mesh axes share one all-reduce, or a few where axes are auto.
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
    sparse values at one index      as their sum, inf if it overflows
    =============================== ========================================

    Args:
      updates: a tree of float or complex arrays of any shapes, NumPy arrays, Python
        scalars, or BCOO and BCSR matrices. Of a matrix with ``unique_indices``, each
        stored value is an entry.
      ord: the order p of the norm, a real number of at least 1, or ``inf`` for
        the largest modulus. A traced scalar is accepted, and costs a second read.
      axis_name: for ``pmap``, and ``shard_map`` with ``check_vma=False``: the
        mesh axes over which leaves are sharded, as a name, a tuple of names, or
        a tree prefix of them; ``()`` for leaves that every device holds whole. If
        None is passed there, all leaves count as whole. Under ``vmap``: the name, for
        one norm of all examples. Elsewhere the types of the leaves say how they are
        sharded.

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
    leaves, _ = split_updates(updates, axis_name)
    return measure(leaves, as_ord(ord)).norm


def leaf_norms(
    updates: optax.Updates, *, ord: float | None = None, axis_name: AxisName = None
) -> optax.Updates:
    """Measures each leaf by itself, to log layers or to find a leaf with a NaN.

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
    leaves, join = split_updates(updates, axis_name)
    tree = join(_each_norm(leaves, as_ord(ord)))
    return jax.tree.map(lambda x: jnp.float32(0) if is_float0(x) else x, tree)


@functools.partial(jax.jit, static_argnames="ord")
def _each_norm(leaves: list[Leaf], ord: float) -> list[jax.Array]:
    return [measure([leaf], ord).norm for leaf in leaves]


# From here on a norm is in two parts, and larger than a float can hold.
_LARGE = 2.0**64


class GlobalNorm(NamedTuple):
    """A norm that may be larger than a float can hold, as ``value * unit``.

    Attributes:
      value: scalar, at most about 2**64, so that its reciprocal is normal; non-finite
        only if an entry of the tree is.
      unit: scalar, 1 or a large power of two.
    """

    value: jax.Array
    unit: jax.Array

    @property
    def norm(self) -> jax.Array:
        """The norm; inf if it is too large for a float."""
        return self.value * lax.stop_gradient(self.unit)

    def as_divisor(self) -> "GlobalNorm":
        """The norm; 1 if it is 0 or not finite."""
        usable = jnp.isfinite(self.value) & (self.value > 0)
        return GlobalNorm(*(jnp.where(usable, x, 1) for x in self))

    @classmethod
    def of(cls, norm: Scalar, dtype: jnp.dtype) -> "GlobalNorm":
        """A norm that is given as one float."""
        norm = jnp.asarray(norm, dtype)
        large, shrink = norm >= _LARGE, Range.of(dtype).shrink
        value = norm * jnp.where(large, shrink, 1).astype(dtype)
        unit = jnp.where(large, 1 / shrink, 1).astype(dtype)
        return cls(*hidden(value, unit))


def hidden(*scalars: jax.Array) -> Sequence[jax.Array]:
    """The scalars, as no constants to XLA.

    XLA makes ``x * (a * b)`` of ``(x * a) * b`` if a and b are constants, though
    ``a * b`` may underflow. A barrier is no constant.
    """
    return lax.optimization_barrier(scalars)


def over(array: jax.Array, norm: GlobalNorm) -> jax.Array:
    """The array divided by a norm that is a constant, and neither 0 nor subnormal."""
    factors = (1 / norm.value, 1 / norm.unit)
    value, unit = (factor_of(array, x.astype(array.dtype)) for x in factors)
    return array * value * unit


@jax.custom_jvp
def divide(array: jax.Array, norm: GlobalNorm) -> jax.Array:
    """The array divided by the norm; by 1 if that is 0.

    Its derivative is (array˙ - array/norm · norm˙)/norm. By hand, because the square of
    the norm may overflow or underflow.
    """
    return over(array, norm._replace(value=jnp.where(norm.value == 0, 1, norm.value)))


@divide.defjvp
def _divide_jvp(primals, tangents):
    (array, norm), (array_dot, norm_dot) = primals, tangents
    quotient = divide(array, norm)
    slope = norm_dot.value * lax.stop_gradient(norm.unit)
    slope = factor_of(array, slope.astype(array.dtype))
    return quotient, divide(array_dot - quotient * slope, norm)


@functools.partial(jax.jit, static_argnames="ord")
def measure(leaves: list[Leaf], ord: float) -> GlobalNorm:
    """The global norm of the leaves."""
    dtype = accumulator_dtype([leaf.array for leaf in leaves])
    if not leaves:
        return GlobalNorm.of(0.0, dtype)
    with jax.named_scope("global_norm"):
        leaves = [
            Leaf(reduced(matrix_values(leaf.array, dtype)), leaf.axes)
            for leaf in leaves
        ]
        if ord == 2:
            return _two_norm(leaves)
        return _largest(leaves) if ord == math.inf else _p_norm(leaves, ord)


# --- The 2-norm.


@jax.custom_jvp
def _two_norm(leaves: list[Leaf]) -> GlobalNorm:
    """The root of the sum of squares."""
    dtype, arrays = _dtype(leaves), [leaf.array for leaf in leaves]

    def root(arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums = functools.partial(two_sums, dtype=dtype)
        axes = [leaf.axes for leaf in leaves]
        return root_of_squares(_over_devices(arrays, axes, sums, lax.psum, add))

    if any(leaf.axes for leaf in leaves) or not all(map(_cpu.can_sum, arrays)):
        return GlobalNorm(*hidden(*root(arrays)))
    on_cpu = functools.partial(_cpu.root_of_squares, dtype=dtype)
    return GlobalNorm(
        *hidden(*lax.platform_dependent(arrays, cpu=on_cpu, default=root))
    )


@_two_norm.defjvp
def _two_norm_jvp(primals, tangents):
    norm = _two_norm(*primals)
    scaled = functools.partial(_scaled_p_norm, ord=2, scale=norm)
    return norm, jax.jvp(scaled, primals, tangents)[1]


# --- Norms of other orders.


@jax.custom_jvp
def _largest(leaves: list[Leaf]) -> GlobalNorm:
    """The largest modulus of any entry."""
    norm = GlobalNorm.of(_largest_part(leaves), _dtype(leaves))
    if not any(jnp.iscomplexobj(leaf.array) for leaf in leaves):
        return norm
    # A modulus may be larger than both of its parts, and overflow where they do not.
    largest, _ = _largest_shares(leaves, norm)
    return norm._replace(value=jnp.where(norm.value > 0, norm.value * largest, norm.value))


@_largest.defjvp
def _largest_jvp(primals, tangents):
    norm = _largest(*primals)
    return norm, jax.jvp(functools.partial(_mean_of_ties, norm), primals, tangents)[1]


def _mean_of_ties(norm: GlobalNorm, leaves: list[Leaf]) -> GlobalNorm:
    """The mean of the largest moduli, which are ties; its derivative is the norm's."""
    norm = lax.stop_gradient(norm)
    largest, shares = _largest_shares(leaves, norm)
    ties = [
        Leaf((share, (share == largest).astype(share.dtype)), leaf.axes)
        for share, leaf in zip(shares, leaves, strict=True)
    ]
    total = _total(ties, lambda pair: pair[0] * pair[1])
    return norm._replace(
        value=norm.value * total / jnp.maximum(_total(ties, lambda pair: pair[1]), 1)
    )


def _largest_shares(
    leaves: list[Leaf], norm: GlobalNorm
) -> tuple[jax.Array, list[jax.Array]]:
    """The moduli of all entries divided by the norm, and the largest of them first."""
    shares = [_modulus(leaf.array, norm.as_divisor()) for leaf in leaves]
    axes = [leaf.axes for leaf in leaves]
    return _largest_part(list(map(Leaf, shares, axes))), shares


def _p_norm(leaves: list[Leaf], ord: float) -> GlobalNorm:
    """The root of the sum of powers, of entries divided by the largest."""
    return _scaled_p_norm(leaves, ord, _largest(lax.stop_gradient(leaves)))


def _scaled_p_norm(leaves: list[Leaf], ord: float, scale: GlobalNorm) -> GlobalNorm:
    """``scale * (Σ (|x| / scale)**ord)**(1 / ord)``, which no scale changes.

    So the scale is a constant, and the derivative that JAX finds is that of the norm.
    """
    scale = lax.stop_gradient(scale).as_divisor()

    def powers(array: jax.Array) -> jax.Array:
        if ord == 2:
            parts = real_parts(array, scale.value.dtype)
            return add([jnp.square(over(part, scale)) for part in parts])
        return _power(_modulus(array, scale), ord)

    root = _power(_total(leaves, powers), 1 / ord)
    return scale._replace(value=root * scale.value)


def _power(x: jax.Array, exponent: float) -> jax.Array:
    """``x ** exponent`` for x >= 0; 0, inf and NaN stay, and have no slope."""
    if exponent == 1:
        return x
    regular = jnp.isfinite(x) & (x > 0)
    powers = jnp.where(regular, x, 1) ** exponent
    return jnp.where(regular, powers, lax.stop_gradient(x))


def _modulus(array: jax.Array, unit: GlobalNorm) -> jax.Array:
    """The moduli of the entries, divided by a constant unit."""
    parts = [over(part, unit) for part in real_parts(array, unit.value.dtype)]
    return jnp.abs(parts[0] if len(parts) == 1 else lax.complex(*parts))


def _largest_part(leaves: list[Leaf]) -> jax.Array:
    """The largest absolute real or imaginary part, or NaN if there is one; a constant.

    By their bits, which for floats without a sign are in the same order, with NaN at
    the end: a maximum of floats loses a NaN on its way over devices.
    """
    dtype = _dtype(leaves)
    integer = jnp.dtype(f"int{jnp.finfo(dtype).bits}")

    def largest(arrays: Sequence[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.maximum, arrays)

    def of_arrays(arrays: Sequence[jax.Array]) -> jax.Array:
        parts = [part for array in arrays for part in real_parts(array, dtype)]
        bits = [lax.bitcast_convert_type(jnp.abs(part), integer) for part in parts]
        return largest([jnp.max(x, initial=0) for x in bits])

    arrays = [lax.stop_gradient(leaf.array) for leaf in leaves]
    axes = [leaf.axes for leaf in leaves]
    bits = _over_devices(arrays, axes, of_arrays, lax.pmax, largest)
    return hidden(lax.bitcast_convert_type(bits, dtype))[0]


# --- What all of them share.


def _dtype(leaves: Sequence[Leaf]) -> jnp.dtype:
    return accumulator_dtype([leaf.array for leaf in leaves])


def _over_devices(
    arrays: Sequence[jax.Array],
    axes: Sequence[Axes],
    reduce: Callable[[list[jax.Array]], jax.Array],
    collective: Callable[[jax.Array, Axes], jax.Array],
    combine: Callable[[Sequence[jax.Array]], jax.Array],
) -> jax.Array:
    """Reduces arrays on this device, then over devices, and combines the results.

    Arrays sharded over the same axes are reduced together, by one collective.
    """
    alike: dict[Axes, list[jax.Array]] = {}
    for array, own in zip(arrays, axes, strict=True):
        alike.setdefault(own, []).append(array)
    return combine(
        [
            collective(reduce(group), own) if own else reduce(group)
            for own, group in alike.items()
        ]
    )


def _total(leaves: Sequence[Leaf], terms: Callable[[Any], jax.Array]) -> jax.Array:
    """The sum of the terms that each array gives."""
    return _over_devices(
        [leaf.array for leaf in leaves],
        [leaf.axes for leaf in leaves],
        lambda arrays: add([jnp.sum(terms(x)) for x in arrays]),
        lax.psum,
        add,
    )
