"""The norms: of a whole tree, and of each of its leaves.

Each is ``value * unit``, with the unit a power of two, so that neither overflows. The
sums of squares of the 2-norm are in ``_reduce``, and in ``_cpu`` for one CPU.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from . import _cpu
from ._checks import Numeric, as_ord
from ._mesh import Axes, either, factor_of, reduced, zero_if
from ._reduce import Range, add, hidden, real_parts, root_of_squares, two_sums
from ._tree import AxisName, Leaf, is_float0, matrix_values, split_updates


def global_norm(
    updates: optax.Updates, *, ord: float | None = None, axis_name: AxisName = None
) -> jax.Array:
    r"""Returns the norm of all entries of a tree, taken as one vector.

    .. math:: \lVert g \rVert_p = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_globalclip
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0]), "frozen": None}
      >>> print(optax_globalclip.global_norm(grads))
      5.0

    Args:
      updates: a tree of float or complex arrays of any shapes, NumPy arrays, Python
        scalars, or BCOO and BCSR matrices. Of a matrix with ``unique_indices``, each
        stored value is an entry.
      ord: the order p of the norm: a Python or NumPy number of at least 1, or ``inf``
        for the largest modulus; None for the 2-norm. It is static.
      axis_name: for ``pmap``, and ``shard_map`` with ``check_vma=False``: the mesh axes
        over which leaves are sharded, as a name, a tuple of names, or a tree prefix of
        them; ``()`` for leaves that every device holds whole. (For a tuple of two
        leaves pass ``(("x",), ("y",))``, as ``("x", "y")`` is a tuple of names.) If
        None is passed there, all leaves count as whole. Under ``vmap``: the name, for
        one norm of all examples. Elsewhere the types of the leaves say how they are
        sharded.

    Returns:
      A float32 scalar; float64 if any leaf is float64 or complex128.

    Raises:
      TypeError: for an integer, bool or other leaf without a norm, by its path; for an
        ``ord`` that is an array.
      ValueError: if ``ord`` is less than 1 or NaN, or ``axis_name`` is no tree prefix
        of ``updates``.
      NameError: for an axis that no ``pmap``, ``shard_map`` or ``vmap`` binds.

    Edge cases:

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

    Formal guarantees:

    * Sums are accumulated in float32, or in float64 if any leaf is float64 or
      complex128, whatever the dtypes of the leaves.
    * The norm is right for every tree of finite entries of at least 5e-23, even if
      their squares overflow. Smaller entries may count as 0, and a norm below 2e-13 of
      many such entries may be less precise. On one CPU device, without a mesh, every
      normal 2-norm is right. (float64 accumulators: as far from the ends of their
      range.)
    * It is the norm of whole leaves however they are sharded. A NaN on one device is
      never lost.
    * It can be differentiated twice. Its gradient at zero is zero.
    * Outside ``jit`` it is one compiled call.

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
      TypeError: for an integer, bool or other leaf without a norm, by its path; for an
        ``ord`` that is an array.
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


class GlobalNorm(NamedTuple):
    """A norm that may be larger than a float can hold.

    Attributes:
      norm: scalar; inf if it is too large for a float. Only this has a derivative.
      value: scalar, ``norm / unit``, so that its reciprocal is normal; non-finite only
        if an entry of the tree is.
      unit: scalar, 1 or a large power of two.
    """

    norm: jax.Array
    value: jax.Array
    unit: jax.Array

    @classmethod
    def of(cls, norm: Numeric, dtype: jnp.dtype) -> "GlobalNorm":
        """A norm that is given as one float."""
        norm, large = jnp.asarray(norm, dtype), 1 / Range.of(dtype).shrink
        (constant,) = hidden(lax.stop_gradient(norm))
        unit = either(constant >= large, large, 1, dtype)
        return cls(norm, constant / unit, unit)

    @classmethod
    def scaled(cls, value: jax.Array, unit: jax.Array) -> "GlobalNorm":
        """The norm ``value * unit``."""
        return cls(value * unit, value, unit)

    def as_divisor(self) -> "GlobalNorm":
        """The norm, as a constant; 1 if it is 0 or not finite."""
        usable = jnp.isfinite(self.value) & (self.value > 0)
        norm = lax.stop_gradient(self)
        return GlobalNorm(*(jnp.where(usable, x, 1) for x in norm))


def over(array: jax.Array, norm: GlobalNorm) -> jax.Array:
    """The array divided by a norm that is a constant and can be divided by."""
    factors = (norm.value, 1 / norm.unit)
    value, shrink = (factor_of(array, x.astype(array.dtype)) for x in factors)
    return array / value * shrink


@jax.custom_jvp
def divide(array: jax.Array, norm: GlobalNorm) -> jax.Array:
    """The array divided by the norm; 0 if the norm is 0 or not finite.

    Its derivative is (array˙ - array/norm · norm˙)/norm. By hand, because the square of
    the norm may overflow or underflow.
    """
    quotient = over(array, norm.as_divisor())
    usable = jnp.isfinite(norm.value) & (norm.value > 0)
    return zero_if(~usable, quotient)


@divide.defjvp
def _divide_jvp(primals, tangents):
    (array, norm), (array_dot, norm_dot) = primals, tangents
    quotient = divide(array, norm)
    slope = factor_of(array, norm_dot.norm.astype(array.dtype))
    return quotient, divide(array_dot - quotient * slope, norm)


@functools.partial(jax.jit, static_argnames="ord")
def measure(leaves: list[Leaf], ord: float, given: Any = None) -> GlobalNorm:
    """The global norm of the leaves, unless one was measured or is given as a float."""
    dtype = accumulator(leaves)
    if given is not None:
        return given if isinstance(given, GlobalNorm) else GlobalNorm.of(given, dtype)
    if not leaves:
        return GlobalNorm.of(0.0, dtype)
    with jax.named_scope("global_norm"):
        leaves = [
            Leaf(reduced(matrix_values(leaf.array, dtype)), leaf.axes)
            for leaf in leaves
        ]
        return _two_norm(leaves) if ord == 2 else _p_norm(ord, leaves)


def accumulator(leaves: Sequence[Leaf]) -> jnp.dtype:
    """float64 if any leaf is float64 or complex128, else float32."""
    double = any(leaf.array.dtype in (jnp.float64, jnp.complex128) for leaf in leaves)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


# --- The 2-norm.


@jax.custom_jvp
def _two_norm(leaves: list[Leaf]) -> GlobalNorm:
    """The root of the sum of squares, and its derivative Σ xᵢ/‖x‖ · ẋᵢ; 0 at 0."""
    sums = functools.partial(two_sums, dtype=accumulator(leaves))
    if not all(map(_cpu.can_sum, leaves)):
        total = _over_devices(leaves, sums, lax.psum, add)
        return GlobalNorm.scaled(*root_of_squares(total))
    value_and_unit = lax.platform_dependent(
        [leaf.array for leaf in leaves],
        cpu=functools.partial(_cpu.root_of_squares, **sums.keywords),
        default=lambda arrays: root_of_squares(sums(arrays)),
    )
    return GlobalNorm.scaled(*value_and_unit)


@_two_norm.defjvp
def _two_norm_jvp(primals, tangents):
    norm = _two_norm(*primals)

    def product(array: jax.Array, dot: jax.Array) -> jax.Array:
        parts, dots = (real_parts(x, norm.value.dtype) for x in (array, dot))
        return add([divide(x, norm) * y for x, y in zip(parts, dots, strict=True)])

    return norm, _tangent(norm, jax.tree.map(product, *primals, *tangents))


# --- Norms of other orders.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _p_norm(ord: float, leaves: list[Leaf]) -> GlobalNorm:
    """``m · (Σ qᵢᵖ)^(1/p)`` with q = abs(x)/m, where m is the largest modulus."""
    largest = _largest(leaves)
    if ord == math.inf:
        return largest
    scale = largest.as_divisor()
    powers = jax.tree.map(lambda x: _power(_share(x, scale), ord), leaves)
    root = _cpu.once(_total(powers)) ** (1 / ord)
    return GlobalNorm.scaled(root * scale.value, scale.unit)


@_p_norm.defjvp
def _p_norm_jvp(ord, primals, tangents):
    """Σ wᵢ · d abs(xᵢ), with wᵢ = qᵢᵖ⁻¹ · (Σ qᵢᵖ)^(1/p - 1) and a constant m.

    For p = inf the weights are equal among ties, and 0 elsewhere.
    """
    norm = _p_norm(ord, *primals)
    # If the norm is not finite, its derivative is 0.
    finite = jnp.isfinite(norm.value)
    leaves = jax.tree.map(lambda x: zero_if(~finite, x), *primals)
    scale = _largest(leaves).as_divisor()
    shares = jax.tree.map(lambda x: _share(x, scale), leaves)
    if ord == math.inf:
        largest = _largest_part(shares)
        weights = jax.tree.map(lambda x: (x == largest).astype(x.dtype), shares)
        divisor = _total(weights)
    else:
        weights = jax.tree.map(lambda x: _power(x, ord - 1), shares)
        powers = jax.tree.map(lambda x: _power(x, ord), shares)
        divisor = _power(_total(powers), 1 - 1 / ord)
    divisor = _cpu.once(jnp.where(divisor > 0, divisor, 1))

    def product(weight: jax.Array, array: jax.Array, dot: jax.Array) -> jax.Array:
        signs = _signs(real_parts(array, weight.dtype))
        dots = real_parts(dot, weight.dtype)
        along = add([x * y for x, y in zip(signs, dots, strict=True)])
        return weight / divisor * along

    return norm, _tangent(norm, jax.tree.map(product, weights, leaves, *tangents))


def _largest(leaves: list[Leaf]) -> GlobalNorm:
    """The largest modulus of any entry; a constant."""
    leaves = lax.stop_gradient(leaves)
    norm = GlobalNorm.of(_largest_part(leaves), accumulator(leaves))
    if not any(jnp.iscomplexobj(leaf.array) for leaf in leaves):
        return norm
    # A modulus may be larger than both of its parts, and overflow where they do not.
    scale = norm.as_divisor()
    larger = _largest_part(jax.tree.map(lambda x: _share(x, scale), leaves))
    larger = jnp.where(norm.value > 0, norm.value * larger, norm.value)
    return GlobalNorm.scaled(larger, norm.unit)


# Traced once for leaves of one type, as the power.
@jax.jit
def _share(array: jax.Array, scale: GlobalNorm) -> jax.Array:
    """The moduli of the entries, divided by the scale, a constant."""
    return _modulus([over(x, scale) for x in real_parts(array, scale.value.dtype)])


def _modulus(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.abs(parts[0] if len(parts) == 1 else lax.complex(*parts))


def _signs(parts: Sequence[jax.Array]) -> list[jax.Array]:
    """The real parts of ``x / abs(x)``; 0 at 0."""
    if len(parts) == 1:
        return [jnp.sign(parts[0])]
    # Divided by the larger part first, because the modulus may overflow or underflow.
    # A constant, as the sign does not depend on it: its square would do so too.
    larger = functools.reduce(jnp.maximum, map(jnp.abs, lax.stop_gradient(parts)))
    parts = [part / jnp.where(larger == 0, 1, larger) for part in parts]
    modulus = _modulus(parts)
    return [part / jnp.where(modulus == 0, 1, modulus) for part in parts]


@functools.partial(jax.jit, static_argnums=1)
def _power(x: jax.Array, exponent: float) -> jax.Array:
    """``x ** exponent`` for x >= 0; 0, inf and NaN stay, and have no slope."""
    if exponent in (0, 1):
        return x if exponent else jnp.ones_like(x)
    regular = jnp.isfinite(x) & (x > 0)
    powers = jnp.where(regular, x, 1) ** exponent
    return jnp.where(regular, powers, lax.stop_gradient(x))


def _largest_part(leaves: list[Leaf]) -> jax.Array:
    """The largest absolute real or imaginary part, or NaN if there is one; a constant.

    By their bits, which for floats without a sign are in the same order, with NaN at
    the end: a maximum of floats loses a NaN on its way over devices.
    """
    dtype = accumulator(leaves)
    integer = jnp.dtype(f"int{jnp.finfo(dtype).bits}")
    largest = functools.partial(functools.reduce, jnp.maximum)

    def of_arrays(arrays: Sequence[jax.Array]) -> jax.Array:
        parts = [jnp.abs(part) for array in arrays for part in real_parts(array, dtype)]
        bits = [lax.bitcast_convert_type(part, integer) for part in parts]
        return largest([jnp.max(x, initial=0) for x in bits])

    bits = _over_devices(lax.stop_gradient(leaves), of_arrays, lax.pmax, largest)
    return _cpu.once(lax.bitcast_convert_type(bits, dtype))


# --- What all of them share.


def _over_devices(leaves, reduce, collective, combine) -> jax.Array:
    """Reduces arrays on this device, then over devices, and combines the results.

    Arrays sharded over the same axes are reduced together, by one collective.
    """
    alike: dict[Axes, list[jax.Array]] = {}
    for leaf in leaves:
        alike.setdefault(leaf.axes, []).append(leaf.array)
    reduced = {own: reduce(group) for own, group in alike.items()}
    return combine([collective(x, own) if own else x for own, x in reduced.items()])


def _total(leaves: Sequence[Leaf]) -> jax.Array:
    """The sum of all entries."""
    return _over_devices(leaves, lambda xs: add([*map(jnp.sum, xs)]), lax.psum, add)


def _tangent(norm: GlobalNorm, products: list[Leaf]) -> GlobalNorm:
    """The tangent of a norm: the sum of products of weights with tangents."""
    return GlobalNorm(_total(products), *map(jnp.zeros_like, norm[1:]))
