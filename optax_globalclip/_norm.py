"""The norms: of a whole tree, and of each of its leaves.

The 2-norm is one formula, and ``_cpu`` has what XLA on CPU needs in its place. In one
read of the entries, and without a branch, it accumulates three sums of squares,

    Σ (xᵢ · shrink)²,  Σ xᵢ²  and  Σ (xᵢ · grow)²,

of which at least one neither overflows nor underflows. The sums are added over leaves,
then over devices, and the root of one that can be trusted is the norm.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from . import _cpu
from ._checks import Numeric, Scalar, as_ord
from ._errors import explained
from ._mesh import Axes, factor_of, is_local, on_shards, on_tpu_mesh, reduced
from ._range import Range, add, fits, real_parts
from ._tree import (
    AxisName,
    Leaf,
    accumulator_dtype,
    is_float0,
    matrix_values,
    split_updates,
)

# Up to _ADDENDS arrays of one type are added entry by entry before they are reduced.
# Each reduction is a kernel, and each addend one of its operands.
_ADDENDS = 16
# The most entries of an array that is added to others without being reduced first.
_SMALL = 4096
# The most rows that are reduced to a number each.
_ROWS = 8192


@explained()
def global_norm(
    updates: optax.Updates, *, ord: Numeric = 2, axis_name: AxisName = None
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
    return measure(leaves, formula_of(as_ord(ord))).norm


@explained()
def leaf_norms(
    updates: optax.Updates, *, ord: Numeric = 2, axis_name: AxisName = None
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
    tree = join(_each_norm(leaves, formula_of(as_ord(ord))))
    return jax.tree.map(lambda x: jnp.float32(0) if is_float0(x) else x, tree)


@jax.jit
def _each_norm(leaves: list[Leaf], formula: "Formula") -> list[jax.Array]:
    return [measure([leaf], formula).norm for leaf in leaves]


class GlobalNorm(NamedTuple):
    """A norm that may be larger than a float can hold.

    Attributes:
      norm: scalar; inf if it is too large for a float. Only this has a derivative.
      value: scalar, ``norm / unit``; non-finite only if an entry of the tree is.
      unit: scalar, positive and finite.
    """

    norm: jax.Array
    value: jax.Array
    unit: jax.Array

    @classmethod
    def given(cls, norm: Scalar, dtype: jnp.dtype) -> "GlobalNorm":
        """A norm that is not measured but given, as ``use_norm``."""
        norm = jnp.asarray(norm, dtype)
        return cls(norm, norm, jnp.ones_like(norm))

    @classmethod
    def scaled(cls, value: jax.Array, unit: jax.Array) -> "GlobalNorm":
        """The norm ``value * unit``."""
        return cls(value * unit, value, unit)


@jax.custom_jvp
def divide(array: jax.Array, norm: GlobalNorm) -> jax.Array:
    """The array divided by the norm; 0 if the norm is 0 or not finite.

    Its derivative is (array˙ - array/norm · norm˙)/norm. By hand, because the square of
    the norm may overflow or underflow.
    """
    usable = jnp.isfinite(norm.value) & (norm.value > 0)
    unit, value = 1 / norm.unit, jnp.where(usable, norm.value, 1)
    unit, value = (factor_of(array, x.astype(array.dtype)) for x in (unit, value))
    return jnp.where(usable, array * unit / value, 0)


@divide.defjvp
def _divide_jvp(primals, tangents):
    (array, norm), (array_dot, norm_dot) = primals, tangents
    quotient = divide(array, norm)
    slope = factor_of(array, norm_dot.norm.astype(array.dtype))
    return quotient, divide(array_dot - quotient * slope, norm)


Formula = Callable[[list[Leaf]], GlobalNorm]


def formula_of(ord: Scalar) -> Formula:
    """From leaves to their norm; an order that is not 2 or inf is an operand."""
    if isinstance(ord, float) and ord == 2:
        return Partial(_l2_norm)
    if isinstance(ord, float) and ord == math.inf:
        return Partial(_max_norm)
    return Partial(_any_norm, ord)


@jax.jit
def measure(leaves: list[Leaf], formula: Formula) -> GlobalNorm:
    """The global norm of the leaves."""
    dtype = _dtype(leaves)
    if not leaves:
        return GlobalNorm.given(0.0, dtype)

    def on_device(arrays, axes, formula):
        return formula(list(map(Leaf, map(reduced, arrays), axes)))

    with jax.named_scope("global_norm"):
        arrays = [matrix_values(leaf.array, dtype) for leaf in leaves]
        norm = on_shards(on_device, arrays, formula)
        if norm is None:
            norm = on_device(arrays, [leaf.axes for leaf in leaves], formula)
    return norm


def found(leaves: Sequence[Leaf], ord: Scalar) -> GlobalNorm | None:
    """The norm of these very arrays, if an enclosing transformation measured it."""
    known = _KNOWN.get()
    if known is None:
        return None
    known_leaves, known_ord, norm = known
    # The value of an array is never read: such an order has to be the same object.
    both_numbers = isinstance(ord, float) and isinstance(known_ord, float)
    same_order = ord == known_ord if both_numbers else ord is known_ord
    same_leaves = len(leaves) == len(known_leaves) and all(
        a.array is b.array and a.axes == b.axes
        for a, b in zip(leaves, known_leaves, strict=True)
    )
    return norm if same_order and same_leaves else None


# Set while a skip runs its inner transformation. An extra argument cannot carry the
# norm there: transformations in between would receive it too, and some reject it.
_KNOWN: contextvars.ContextVar[tuple[Sequence[Leaf], Scalar, GlobalNorm] | None] = (
    contextvars.ContextVar("known", default=None)
)


@contextlib.contextmanager
def known_norm(
    leaves: Sequence[Leaf], ord: Scalar, norm: GlobalNorm
) -> Generator[None, None, None]:
    """Lets ``found`` return this norm when it is asked for that of these arrays."""
    token = _KNOWN.set((leaves, ord, norm))
    try:
        yield
    finally:
        _KNOWN.reset(token)


# --- The 2-norm.


@jax.custom_jvp
def _l2_norm(leaves: list[Leaf]) -> GlobalNorm:
    """The 2-norm, and its derivative Σ xᵢ/‖x‖ · ẋᵢ; 0 at 0."""
    dtype = _dtype(leaves)
    sums = _over_devices(leaves, functools.partial(_sums_on_device, dtype=dtype))
    return _trusted_root(sums, Range.of(dtype))


@_l2_norm.defjvp
def _l2_norm_jvp(primals, tangents):
    (leaves,), (dots,) = primals, tangents
    norm = _l2_norm(leaves)

    def direction(array: jax.Array) -> list[jax.Array]:
        return [divide(part, norm) for part in real_parts(array, norm.value.dtype)]

    return norm, _tangent(leaves, dots, norm, direction)


def _sums_on_device(arrays: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The three sums, with large arrays reduced as suits the platform.

    A GPU takes two kernels to reduce an array to a number, and one to reduce it to the
    sums of its rows. A TPU fuses the first with what computes the array, such as a
    matrix product of the backward pass, but not the second.
    """
    rows = functools.partial(_three_sums, dtype=dtype, in_rows=True)
    numbers = functools.partial(_three_sums, dtype=dtype, in_rows=False)
    if not all(map(_cpu.can_sum, arrays)):
        return numbers(arrays) if any(map(on_tpu_mesh, arrays)) else rows(arrays)
    on_cpu = functools.partial(_cpu.three_sums, dtype=dtype)
    return jax.lax.platform_dependent(arrays, cpu=on_cpu, tpu=numbers, default=rows)


def _three_sums(
    arrays: list[jax.Array], *, dtype: jnp.dtype, in_rows: bool
) -> jax.Array:
    """The sums of squares of entries shrunk, as they are, and grown; shape [3].

    Large arrays are reduced to the sums of their rows first if ``in_rows``.
    """
    limits, sums = Range.of(dtype), []
    fitting, others = [], []
    for alike in _alike(arrays):
        (fitting if fits(alike[0].dtype, dtype) else others).append(alike)
    if fitting:
        (plain,) = _sums_of_squares(fitting, (None,), dtype, in_rows)
        # Where another sum is to be trusted, these leaves do not change it: they are
        # negligible beside squares that overflow, and zero beside those that underflow.
        sums.append(jnp.stack([_nonfinite(plain), plain, _nonfinite(plain)]))
    if others:
        factors = limits.shrink, None, limits.grow
        sums.append(_sums_of_squares(others, factors, dtype, in_rows))
    return add(sums)


def _sums_of_squares(
    groups: list[list[jax.Array]],
    factors: tuple[float | None, ...],
    dtype: jnp.dtype,
    in_rows: bool,
) -> jax.Array:
    """The sums of squares of all entries times each factor, in one read of them."""
    zero = jax.lax.optimization_barrier(jnp.zeros((), dtype))  # XLA does not see it.
    merged, others = [], []
    for group in groups:
        squares = _squares(group, zero, factors)
        if is_local(group[0]) and (in_rows or _is_small(group[0])):
            merged.append(map(_sums_of_rows, squares))
        else:
            others.append(map(jnp.sum, squares))
    sums = []
    if merged:
        vectors = list(map(_added, zip(*merged, strict=True)))
        sums.append(jnp.sum(jnp.stack(vectors), axis=1))
    if others:
        # Stacked last: XLA adds scalars before it reduces them over devices.
        sums.append(jnp.stack(list(map(add, zip(*others, strict=True)))))
    return add(sums)


def _added(vectors: Sequence[jax.Array]) -> jax.Array:
    """Vectors added entry by entry; shorter ones count as if zeros followed."""
    length = max(vector.size for vector in vectors)
    return add([jnp.pad(vector, (0, length - vector.size)) for vector in vectors])


def _sums_of_rows(squares: jax.Array) -> jax.Array:
    """A short vector of the same sum: the entries, sums of rows, or one number."""
    if _is_small(squares):
        return jnp.ravel(squares)
    few = _is_static(squares) and math.prod(squares.shape[:-1]) <= _ROWS
    return jnp.ravel(jnp.sum(squares, -1 if few else None))


# Traced once for groups of one type.
@functools.partial(jax.jit, static_argnums=2)
def _squares(
    group: list[jax.Array], zero: jax.Array, factors: tuple[float | None, ...]
) -> list[jax.Array]:
    """For each factor, the squares of all arrays times it, added entry by entry."""
    parts = [part for array in group for part in real_parts(array, zero.dtype)]
    # Of small arrays added in halves, XLA on GPU makes a kernel for each pair. Of large
    # ones added one after the other, it materializes some.
    in_turn = functools.partial(functools.reduce, jnp.add)
    added = in_turn if _is_small(parts[0]) else add

    def squares(factor: float | None) -> jax.Array:
        if factor is None:
            return added([part * part for part in parts])
        # If x is a scalar, also one that is broadcast, XLA makes ``(x * x) * (c * c)``
        # of ``(x * c) * (x * c)``, even if a factor of that overflows. It has no such
        # rule for a sum. It rewrites other squares with overflows too:
        # https://github.com/jax-ml/jax/issues/37919
        constant = zero.dtype.type(factor)
        return added([jnp.square(part * constant + zero) for part in parts])

    return list(map(squares, factors))


def _nonfinite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), 0, x)


def _alike(arrays: Sequence[jax.Array]) -> Iterator[list[jax.Array]]:
    """The arrays in groups that can be added entry by entry on each device.

    Arrays that XLA has yet to shard are groups of their own: adding two might move one.
    """
    groups: dict[object, list[jax.Array]] = {}
    for i, array in enumerate(arrays):
        groups.setdefault(jax.typeof(array) if is_local(array) else i, []).append(array)
    for group in groups.values():
        for i in range(0, len(group), _ADDENDS):
            yield group[i : i + _ADDENDS]


def _is_small(array: jax.Array) -> bool:
    return _is_static(array) and array.size <= _SMALL


def _is_static(array: jax.Array) -> bool:
    """Whether no dimension is symbolic, as in ``jax.export``."""
    return all(isinstance(size, int) for size in array.shape)


def _trusted_root(three_sums: jax.Array, limits: Range) -> GlobalNorm:
    """The root of the sum that neither overflowed nor underflowed."""
    shrunk, plain, grown = three_sums
    small, large = plain < limits.floor, ~(plain < math.inf)
    total = jnp.where(small, grown, jnp.where(large, shrunk, plain))
    # As a product: JAX 0.10 cannot vmap a selection of constants over a shard_map.
    unit = jnp.where(small, 1 / limits.grow, 1) * jnp.where(large, 1 / limits.shrink, 1)
    return GlobalNorm.scaled(jnp.sqrt(total), unit.astype(total.dtype))


# --- Norms of other orders.


def _any_norm(ord: Scalar, leaves: list[Leaf]) -> GlobalNorm:
    return _lp_norm(jnp.asarray(ord, _dtype(leaves)), leaves)


@jax.custom_jvp
def _lp_norm(ord: jax.Array, leaves: list[Leaf]) -> GlobalNorm:
    """The p-norm, and its derivative; 0 at 0.

    With q = abs(x)/‖x‖ that is Σ qᵢᵖ⁻¹ sign(xᵢ) ẋᵢ + ‖x‖/p · Σ qᵢᵖ log(qᵢ) ṗ.
    """
    _, largest, unit = _largest_modulus(leaves)
    largest = jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)

    def powers(array: jax.Array) -> jax.Array:
        return _power(_moduli(array, unit) / largest, ord)

    root = _power(_total(leaves, powers), 1 / ord)
    return GlobalNorm.scaled(root * largest, unit)


@_lp_norm.defjvp
def _lp_norm_jvp(primals, tangents):
    ord, leaves = primals
    ord_dot, dots = tangents
    norm = _lp_norm(ord, leaves)

    def direction(array: jax.Array) -> list[jax.Array]:
        # For p = 1 the weight is 1 even if the share underflows.
        weight = jnp.where(ord == 1, 1, _power(_shares(array, norm), ord - 1))
        return [weight * sign for sign in _signs(array, norm)]

    def entropy(array: jax.Array) -> jax.Array:
        share = _shares(array, norm)
        return _power(share, ord) * jnp.log(jnp.where(share > 0, share, 1))

    by_ord = norm.norm / ord * _total(leaves, entropy) * ord_dot
    return norm, _tangent(leaves, dots, norm, direction, by_ord)


@jax.custom_jvp
def _max_norm(leaves: list[Leaf]) -> GlobalNorm:
    """The largest modulus; its derivative is the mean over all ties."""
    if not _any_complex(leaves):
        return GlobalNorm.given(_largest_part(leaves), _dtype(leaves))
    return _largest_modulus(leaves)


@_max_norm.defjvp
def _max_norm_jvp(primals, tangents):
    (leaves,), (dots,) = primals, tangents
    norm = _max_norm(leaves)

    def ties(array: jax.Array) -> jax.Array:
        modulus = _moduli(array, norm.unit)
        return ((modulus == norm.value) & (norm.value > 0)).astype(modulus.dtype)

    count = jnp.maximum(_total(leaves, ties), 1)

    def direction(array: jax.Array) -> list[jax.Array]:
        weight = ties(array) / count
        return [weight * sign for sign in _signs(array, norm)]

    return norm, _tangent(leaves, dots, norm, direction)


def _modulus(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.abs(parts[0] if len(parts) == 1 else jax.lax.complex(*parts))


def _moduli(array: jax.Array, unit: jax.Array) -> jax.Array:
    """The moduli of the entries, divided by the unit."""
    return _modulus([part / unit for part in real_parts(array, unit.dtype)])


def _shares(array: jax.Array, norm: GlobalNorm) -> jax.Array:
    """The moduli of the entries, divided by the norm."""
    return _modulus([divide(x, norm) for x in real_parts(array, norm.value.dtype)])


def _signs(array: jax.Array, norm: GlobalNorm) -> list[jax.Array]:
    """The real parts of ``x / abs(x)``; 0 at 0, and if the norm is not finite."""
    parts = real_parts(array, norm.value.dtype)
    parts = [jnp.where(jnp.isfinite(norm.value), part, 0) for part in parts]
    if len(parts) == 1:
        return [jnp.sign(parts[0])]
    # Divided by the larger part first, because the modulus may overflow or underflow.
    # A constant, as the sign does not depend on it: its square would do so too.
    larger = functools.reduce(jnp.maximum, map(jnp.abs, jax.lax.stop_gradient(parts)))
    parts = [part / jnp.where(larger == 0, 1, larger) for part in parts]
    modulus = _modulus(parts)
    return [part / jnp.where(modulus == 0, 1, modulus) for part in parts]


def _largest_modulus(leaves: list[Leaf]) -> GlobalNorm:
    """The largest modulus of any entry; a constant."""
    leaves, part = jax.lax.stop_gradient(leaves), _largest_part(leaves)
    # The unit has a normal reciprocal.
    tiny = float(jnp.finfo(part.dtype).tiny)
    unit = jnp.where(jnp.isfinite(part) & (part > 0), part, 1)
    unit = jnp.clip(unit, tiny, 1 / tiny)
    if not _any_complex(leaves):
        return GlobalNorm.scaled(part / unit, unit)
    # A modulus may be larger than both of its parts, and overflow where they do not.
    return GlobalNorm.scaled(_maximum(leaves, lambda x: [_moduli(x, unit)]), unit)


def _largest_part(leaves: list[Leaf]) -> jax.Array:
    """The largest real or imaginary part of any entry; a constant."""
    leaves, dtype = jax.lax.stop_gradient(leaves), _dtype(leaves)
    return _maximum(leaves, lambda x: list(map(jnp.abs, real_parts(x, dtype))))


def _any_complex(leaves: list[Leaf]) -> bool:
    return any(jnp.iscomplexobj(leaf.array) for leaf in leaves)


def _power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """``x ** exponent`` for x >= 0; 0, inf and NaN stay, and have no slope."""
    regular = jnp.isfinite(x) & (x > 0)
    powers = jnp.where(regular, x, 1) ** exponent
    return jnp.where(regular, powers, jax.lax.stop_gradient(x))


# --- What all of them share.


def _dtype(leaves: Sequence[Leaf]) -> jnp.dtype:
    return accumulator_dtype([leaf.array for leaf in leaves])


def _over_devices(
    leaves: Sequence[Leaf],
    reduce: Callable[[list[Any]], jax.Array],
    collective: Callable[[jax.Array, Axes], jax.Array] = jax.lax.psum,
    combine: Callable[[Sequence[jax.Array]], jax.Array] = add,
) -> jax.Array:
    """Reduces arrays on this device, then over devices, and combines the results.

    Arrays sharded over the same axes are reduced together, by one collective.
    """
    alike: dict[Axes, list[Any]] = {}
    for leaf in leaves:
        alike.setdefault(leaf.axes, []).append(leaf.array)
    return combine(
        [
            collective(reduce(arrays), axes) if axes else reduce(arrays)
            for axes, arrays in alike.items()
        ]
    )


def _total(leaves: Sequence[Leaf], terms: Callable[[Any], jax.Array]) -> jax.Array:
    """The sum of the terms that each array gives."""
    return _over_devices(
        leaves, lambda arrays: add([jnp.sum(terms(x)) for x in arrays])
    )


def _maximum(
    leaves: Sequence[Leaf], moduli: Callable[[jax.Array], list[jax.Array]]
) -> jax.Array:
    """The largest of the moduli that each array gives; 0 if there are none."""

    def largest(arrays: Sequence[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.maximum, [jnp.max(x, initial=0) for x in arrays])

    def of_moduli(arrays: list[jax.Array]) -> jax.Array:
        return largest([modulus for array in arrays for modulus in moduli(array)])

    return _over_devices(leaves, of_moduli, jax.lax.pmax, largest)


def _tangent(
    leaves: list[Leaf],
    dots: list[Leaf],
    norm: GlobalNorm,
    direction: Callable[[jax.Array], list[jax.Array]],
    more: jax.Array | float = 0.0,
) -> GlobalNorm:
    """The tangent of a norm: the sum of products of a direction with tangents.

    Args:
      leaves: to differentiate at.
      dots: their tangents.
      norm: of the leaves.
      direction: from an array to what multiplies the real parts of its tangent.
      more: what else to add.
    """

    def products(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        array, dot = pair
        parts = real_parts(dot, norm.value.dtype)
        return add([a * b for a, b in zip(direction(array), parts, strict=True)])

    pairs = [
        Leaf((leaf.array, dot.array), leaf.axes)
        for leaf, dot in zip(leaves, dots, strict=True)
    ]
    zeros = map(jnp.zeros_like, norm[1:])
    return GlobalNorm(_total(pairs, products) + more, *zeros)
