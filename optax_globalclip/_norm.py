"""The norms: of a whole tree, and of each of its leaves.

The 2-norm is one formula on every backend. In one read of the entries, and without a
branch, it accumulates three sums of squares,

    Σ (xᵢ · shrink)²,  Σ xᵢ²  and  Σ (xᵢ · grow)²,

of which at least one neither overflows nor underflows. The sums are added over leaves,
then over devices, and the root of one that can be trusted is the norm.
"""

import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from . import _cpu
from ._checks import Numeric, Scalar, as_ord
from ._errors import explained
from ._mesh import Axes, all_reduce, factor_of, is_local, on_shards, reduced
from ._range import Range, add, fits, real_parts
from ._tree import (
    AxisName,
    Leaf,
    accumulator_dtype,
    is_float0,
    matrix_values,
    split_updates,
)

# How many arrays of one type are added entry by entry before they are summed: those of
# at most so many entries, and others. Each sum is a kernel; each addend, an operand.
_SMALL, _MANY, _FEW = 4096, 64, 16
# How many columns a TPU keeps side by side. Shorter rows are not summed one by one, nor
# are more of them than so many.
_LANES, _ROWS = 128, 8192
# From how many entries on an array is split: those that VMEM may hold are not read.
_LARGE = 2**22


@explained()
def global_norm(
    updates: optax.Updates, *, ord: Numeric = 2, axis_name: AxisName = None
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
    leaves, _ = split_updates(updates, axis_name)
    return measure(leaves, formula_of(as_ord(ord))).norm


@explained()
def leaf_norms(
    updates: optax.Updates, *, ord: Numeric = 2, axis_name: AxisName = None
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
    leaves, join = split_updates(updates, axis_name)
    norms = _norms([[leaf] for leaf in leaves], formula_of(as_ord(ord)))
    tree = join(
        [
            norm.norm.astype(accumulator_dtype([leaf.array]))
            for norm, leaf in zip(norms, leaves, strict=True)
        ]
    )
    return jax.tree.map(lambda x: jnp.float32(0) if is_float0(x) else x, tree)


class GlobalNorm(NamedTuple):
    """A norm that may be larger than a float can hold.

    Attributes:
      norm: scalar; inf if it is too large for a float. It alone has a derivative.
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


Formula = Callable[..., list[GlobalNorm]]


def measure(leaves: Sequence[Leaf], formula: Formula) -> GlobalNorm:
    """The global norm of the leaves."""
    return _norms([list(leaves)], formula)[0]


def found(leaves: Sequence[Leaf], ord: Scalar) -> GlobalNorm | None:
    """The norm of these very arrays, if a transformation around has measured it."""
    known = _KNOWN.get()
    return known.norm if known and known.is_that_of(leaves, ord) else None


class _Known(NamedTuple):
    leaves: Sequence[Leaf]
    ord: Scalar
    norm: GlobalNorm

    def is_that_of(self, leaves: Sequence[Leaf], ord: Scalar) -> bool:
        """Whether these are the very same arrays."""
        return (
            len(leaves) == len(self.leaves)
            and (ord is self.ord or (isinstance(ord, float) and ord == self.ord))
            and all(
                a.array is b.array and a.axes == b.axes
                for a, b in zip(leaves, self.leaves, strict=True)
            )
        )


# Of the transformation whose inner one is being run. No argument could carry it there:
# other transformations between would be handed it, and some refuse.
_KNOWN: contextvars.ContextVar[_Known | None] = contextvars.ContextVar(
    "known", default=None
)


@contextlib.contextmanager
def known_norm(
    leaves: Sequence[Leaf], ord: Scalar, norm: GlobalNorm
) -> Generator[None, None, None]:
    """Lets ``found`` return this norm when it is asked for that of these arrays."""
    token = _KNOWN.set(_Known(leaves, ord, norm))
    try:
        yield
    finally:
        _KNOWN.reset(token)


@jax.jit
def _norms(groups: list[list[Leaf]], formula: Formula) -> list[GlobalNorm]:
    """The norm of each group of leaves."""
    leaves = [leaf for group in groups for leaf in group]
    dtype = accumulator_dtype([leaf.array for leaf in leaves])
    if not leaves:
        return [GlobalNorm.given(0.0, dtype) for _ in groups]

    def measure_arrays(arrays, axes, formula):
        members = iter(map(Leaf, map(reduced, arrays), axes))
        return formula([[next(members) for _ in group] for group in groups])

    with jax.named_scope("global_norm"):
        arrays = [matrix_values(leaf.array, dtype) for leaf in leaves]
        norms = on_shards(measure_arrays, arrays, formula)
        if norms is None:
            axes = [leaf.axes for leaf in leaves]
            norms = measure_arrays(arrays, axes, formula)
    return norms


def formula_of(ord: Scalar) -> Formula:
    """From groups of leaves to norms; an order that is not 2 or inf is an operand."""
    if isinstance(ord, float) and ord == 2:
        return Partial(_l2_norms)
    if isinstance(ord, float) and ord == math.inf:
        return Partial(_max_norms)
    return Partial(_lp_norms, ord)


# --- The 2-norm.


@jax.custom_jvp
def _l2_norms(groups: list[list[Leaf]]) -> list[GlobalNorm]:
    """The 2-norm of each group, and its derivative Σ xᵢ/‖x‖ · ẋᵢ; 0 at 0."""
    dtype = _dtype(groups)
    sums = _over_devices(
        _each(groups, lambda array: array),
        functools.partial(_sums_on_device, dtype=dtype),
    )
    return [_trusted_root(three, Range.of(dtype)) for three in sums]


@_l2_norms.defjvp
def _l2_norms_jvp(primals, tangents):
    (groups,) = primals
    norms = _l2_norms(groups)

    def direction(array: jax.Array, norm: GlobalNorm) -> list[jax.Array]:
        return [divide(part, norm) for part in real_parts(array, norm.value.dtype)]

    return norms, _tangents(groups, tangents[0], norms, [direction] * len(groups))


def _sums_on_device(
    groups: list[list[jax.Array]], dtype: jnp.dtype
) -> Sequence[jax.Array]:
    """The three sums of each group of arrays, shape [3]."""
    plain = functools.partial(_three_sums_of_groups, dtype=dtype)
    if not all(map(_cpu.can_sum, (array for group in groups for array in group))):
        return plain(groups)
    on_cpu = functools.partial(_cpu.three_sums, dtype=dtype)
    return jax.lax.platform_dependent(groups, cpu=on_cpu, default=plain)


def _three_sums_of_groups(groups, *, dtype):
    return [_three_sums(group, dtype) for group in groups]


def _three_sums(arrays: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """The sums of squares of entries shrunk, as they are, and grown; shape [3]."""
    limits, sums = Range.of(dtype), []
    fitting, others = [], []
    for alike in _alike(arrays):
        (fitting if fits(alike[0].dtype, dtype) else others).append(alike)
    if fitting:
        (plain,) = _sums_of_squares(fitting, dtype, (None,))
        # If this sum is not the whole norm, it is nothing beside the others.
        sums.append(jnp.stack([_nonfinite(plain), plain, _nonfinite(plain)]))
    if others:
        factors = limits.shrink, None, limits.grow
        sums.append(_sums_of_squares(others, dtype, factors))
    return add(sums)


def _sums_of_squares(
    groups: list[list[jax.Array]], dtype: jnp.dtype, factors: Sequence[float | None]
) -> jax.Array:
    """The sums of squares of all entries times each factor, in one read of them.

    First of the rows of each group, then of those together, padded to one length: one
    kernel for each group, and a few for all, where each sum by itself would be two.
    """
    local = [group for group in groups if is_local(group[0])]
    sums = []
    if local:
        rows = [
            _added([_sums_of_rows(group, dtype, factor) for group in local])
            for factor in factors
        ]
        sums.append(jnp.sum(jnp.stack(rows), axis=1))
    if len(local) < len(groups):
        each = [
            add([jnp.sum(_squares(g, dtype, f)) for g in groups if not is_local(g[0])])
            for f in factors
        ]
        # Stacked last: XLA adds scalars before it reduces them over devices.
        sums.append(jnp.stack(each))
    return add(sums)


def _added(vectors: list[jax.Array]) -> jax.Array:
    """Vectors added entry by entry; shorter ones count as if zeros followed."""
    length = max(vector.size for vector in vectors)
    return add([jnp.pad(vector, (0, length - vector.size)) for vector in vectors])


def _sums_of_rows(
    arrays: list[jax.Array], dtype: jnp.dtype, factor: float | None
) -> jax.Array:
    """The sums of squares of the rows of arrays of one type; a vector."""
    squares = _squares(_split(arrays), dtype, factor)
    axis = None
    if _is_static(squares):
        if squares.size <= _SMALL:
            return jnp.ravel(squares)
        *rows, columns = squares.shape
        if columns >= _LANES and math.prod(rows) <= _ROWS:
            axis = -1
    return jnp.ravel(jnp.sum(squares, axis))


def _split(arrays: list[jax.Array]) -> list[jax.Array]:
    """A few large arrays as more blocks of columns, which a TPU reads side by side."""
    first = arrays[0]
    if not _is_static(first) or first.ndim < 2 or first.size < _LARGE:
        return arrays
    blocks, rest = divmod(first.shape[-1], _LANES)
    if rest or not blocks:
        return arrays
    most = _FEW // len(arrays)
    count = max((n for n in range(1, most + 1) if blocks % n == 0), default=1)
    return [part for array in arrays for part in jnp.split(array, count, -1)]


def _squares(
    arrays: list[jax.Array], dtype: jnp.dtype, factor: float | None
) -> jax.Array:
    """The squares of the entries of arrays of one type, added up entry by entry."""
    parts = [part for array in arrays for part in real_parts(array, dtype)]
    if factor is not None:
        hidden = _hidden(factor, arrays[0], dtype)
        parts = [part * hidden for part in parts]
    return add(list(map(jnp.square, parts)))


def _nonfinite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), 0, x)


def _hidden(factor: float, array: jax.Array, dtype: jnp.dtype) -> Any:
    """The factor, hidden from XLA if an array may have one entry on a device.

    XLA takes ``(x * c) * (x * c)`` of scalars for ``(x * x) * (c * c)``, whatever
    overflows: https://github.com/openxla/xla, AlgebraicSimplifier.
    """
    constant = dtype.type(factor)
    if is_local(array) and not (_is_static(array) and array.size == 1):
        return constant
    return jax.lax.optimization_barrier(jnp.asarray(constant))


def _alike(arrays: Sequence[jax.Array]) -> Iterator[list[jax.Array]]:
    """The arrays in groups that can be added entry by entry on each device.

    Arrays that XLA has yet to shard are groups of their own: adding two might move one.
    """
    groups: dict[object, list[jax.Array]] = {}
    for i, array in enumerate(arrays):
        groups.setdefault(jax.typeof(array) if is_local(array) else i, []).append(array)
    for group in groups.values():
        small = _is_static(group[0]) and group[0].size <= _SMALL
        length = _MANY if small else _FEW
        for i in range(0, len(group), length):
            yield group[i : i + length]


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


class _Polar(NamedTuple):
    """An array as moduli and signs: the real parts of ``x / abs(x)``."""

    modulus: jax.Array
    signs: list[jax.Array]

    @classmethod
    def of(cls, parts: Sequence[jax.Array]) -> "_Polar":
        if len(parts) == 1:
            return cls(jnp.abs(parts[0]), [jnp.sign(parts[0])])
        modulus = jnp.abs(jax.lax.complex(*parts))
        signs = [part / jnp.where(modulus == 0, 1, modulus) for part in parts]
        return cls(modulus, signs)

    @classmethod
    def over_norm(cls, array: jax.Array, norm: GlobalNorm) -> "_Polar":
        parts = real_parts(array, norm.value.dtype)
        return cls.of([divide(part, norm) for part in parts])


def _modulus(array: jax.Array, unit: jax.Array) -> jax.Array:
    """The moduli of the entries, divided by the unit."""
    return _Polar.of([part / unit for part in real_parts(array, unit.dtype)]).modulus


def _largest_parts(groups: list[list[Leaf]]) -> list[jax.Array]:
    """The largest real or imaginary part of each group; a constant."""

    def largest(arrays: list[jax.Array]) -> jax.Array:
        parts = [part for array in arrays for part in real_parts(array, dtype)]
        return _largest([jnp.abs(part) for part in parts])

    dtype = _dtype(groups)
    return _over_devices(
        _each(groups, jax.lax.stop_gradient),
        lambda groups: list(map(largest, groups)),
        jax.lax.pmax,
        _largest,
    )


def _units(groups: list[list[Leaf]]) -> list[tuple[jax.Array, jax.Array]]:
    """The largest part of each group, as a power of two and the rest: 1 to 4."""
    found = _largest_parts(groups)
    found = [jnp.where(jnp.isfinite(x) & (x > 0), x, 1) for x in found]
    units = list(map(_power_of_two, found))
    return [(unit, x / unit) for x, unit in zip(found, units, strict=True)]


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two up to x, if its reciprocal is a normal float too."""
    info = jnp.finfo(x.dtype)
    exponent = (2 ** (info.bits - 1) - 1) - (2**info.nmant - 1)
    bits = jax.lax.bitcast_convert_type(x, f"uint{info.bits}")
    mask = jnp.asarray(exponent, bits.dtype)
    power = jax.lax.bitcast_convert_type(bits & mask, x.dtype)
    return jnp.clip(power, float(info.tiny), 1 / float(info.tiny))


def _largest(arrays: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(x, initial=0) for x in arrays])


def _lp_norms(ord: jax.Array, groups: list[list[Leaf]]) -> list[GlobalNorm]:
    return _lp(jnp.asarray(ord, _dtype(groups)), groups)


@jax.custom_jvp
def _lp(ord: jax.Array, groups: list[list[Leaf]]) -> list[GlobalNorm]:
    """The p-norm of each group.

    With q = abs(x)/‖x‖, its derivative is

    Σ qᵢᵖ⁻¹ sign(xᵢ) ẋᵢ + ‖x‖/p · Σ qᵢᵖ log(qᵢ) ṗ; 0 at 0.
    """
    units, largest = zip(*_units(groups), strict=True)

    def powers(array: jax.Array, unit: jax.Array, largest: jax.Array) -> jax.Array:
        return _power(_modulus(array, unit) / largest, ord)

    totals = _over_devices(_each(groups, powers, units, largest), _sums)
    values = (_power(total, 1 / ord) for total in totals)
    return list(map(GlobalNorm.scaled, map(operator.mul, values, largest), units))


@_lp.defjvp
def _lp_jvp(primals, tangents):
    ord, groups = primals
    ord_tangent, group_tangents = tangents
    norms = _lp(ord, groups)

    def direction(array: jax.Array, norm: GlobalNorm) -> list[jax.Array]:
        share, signs = _Polar.over_norm(array, norm)
        weight = _power(share, ord - 1)
        return [weight * sign for sign in signs]

    def entropy(array: jax.Array, norm: GlobalNorm) -> jax.Array:
        share = _Polar.over_norm(array, norm).modulus
        logarithm = jnp.log(jnp.where(share > 0, share, 1))
        return jnp.sum(_power(share, ord) * logarithm)

    entropies = _over_devices(_each(groups, entropy, norms), _sums)
    by_ord = [
        norm.norm / ord * total * ord_tangent
        for norm, total in zip(norms, entropies, strict=True)
    ]
    directions = [direction] * len(groups)
    return norms, _tangents(groups, group_tangents, norms, directions, by_ord)


@jax.custom_jvp
def _max_norms(groups: list[list[Leaf]]) -> list[GlobalNorm]:
    """The largest modulus of each group; its derivative is the mean over all ties."""
    if not any(jnp.iscomplexobj(leaf.array) for group in groups for leaf in group):
        largest = _largest_parts(groups)
        return [GlobalNorm.given(norm, _dtype(groups)) for norm in largest]
    units = [unit for unit, _ in _units(groups)]
    values = _over_devices(
        _each(groups, _modulus, units),
        lambda groups: list(map(_largest, groups)),
        jax.lax.pmax,
        _largest,
    )
    return list(map(GlobalNorm.scaled, values, units))


@_max_norms.defjvp
def _max_norms_jvp(primals, tangents):
    (groups,) = primals
    norms = _max_norms(groups)

    def ties(array: jax.Array, norm: GlobalNorm) -> jax.Array:
        modulus = _modulus(array, norm.unit)
        return ((modulus == norm.value) & (norm.value > 0)).astype(norm.value.dtype)

    counts = _over_devices(_each(groups, ties, norms), _sums)

    def direction(array: jax.Array, norm: GlobalNorm, count: jax.Array):
        weight = ties(array, norm) / jnp.maximum(count, 1)
        return [weight * sign for sign in _Polar.over_norm(array, norm).signs]

    directions = [functools.partial(direction, count=count) for count in counts]
    return norms, _tangents(groups, tangents[0], norms, directions)


def _power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """``x ** exponent`` for x >= 0, with 0, inf and NaN kept, and no slope at them."""
    regular = jnp.isfinite(x) & (x > 0)
    powers = jnp.where(regular, x, 1) ** exponent
    return jnp.where(regular, powers, jax.lax.stop_gradient(x))


# --- What all of them share.


def _dtype(groups: list[list[Leaf]]) -> jnp.dtype:
    return accumulator_dtype([leaf.array for group in groups for leaf in group])


def _sums(groups: list[list[jax.Array]]) -> list[jax.Array]:
    return [add(list(map(jnp.sum, group))) for group in groups]


def _each(
    groups: list[list[Leaf]], function: Callable[..., Any], *values: Sequence[Any]
) -> list[list[tuple[Axes, Any]]]:
    """The function of each array and of its group's values, beside the array's axes."""
    return [
        [(leaf.axes, function(leaf.array, *of_group)) for leaf in group]
        for group, *of_group in zip(groups, *values, strict=True)
    ]


def _over_devices(
    groups: Sequence[Sequence[tuple[Axes, Any]]],
    reduce: Callable[[list[list[Any]]], Sequence[jax.Array]],
    collective: Callable[[jax.Array, Axes], jax.Array] = jax.lax.psum,
    combine: Callable[[Sequence[jax.Array]], jax.Array] = add,
) -> list[jax.Array]:
    """Reduces each group on this device, then over devices, then over sets of axes.

    Args:
      groups: of items, each with the mesh axes over which it is sharded.
      reduce: from lists of items sharded alike to small arrays of one shape.
      collective: over devices.
      combine: over the results for the items sharded over this and over that.
    """
    alike: dict[tuple[int, Axes], list[Any]] = {}
    for i, group in enumerate(groups):
        for axes, item in group:
            alike.setdefault((i, axes), []).append(item)
    reduced = all_reduce(
        list(reduce(list(alike.values()))), [axes for _, axes in alike], collective
    )
    of_group: dict[int, list[jax.Array]] = {}
    for (i, _), value in zip(alike, reduced, strict=True):
        of_group.setdefault(i, []).append(value)
    return [combine(of_group[i]) for i in range(len(groups))]


def _tangents(
    groups: list[list[Leaf]],
    tangents: list[list[Leaf]],
    norms: list[GlobalNorm],
    directions: Sequence[Callable[..., Any]],
    more: Sequence[jax.Array] | None = None,
) -> list[GlobalNorm]:
    """The tangents of norms: the sums of products of directions with tangents.

    Args:
      groups: of leaves.
      tangents: of the leaves.
      norms: of the groups.
      directions: of each group, from an array and the norm to the real parts of what
        multiplies those of the array's tangent.
      more: what else to add to each.
    """

    def slope(
        norm: GlobalNorm, direction: Callable[..., Any], leaf: Leaf, tangent: Leaf
    ):
        along = direction(leaf.array, norm)
        parts = real_parts(tangent.array, norm.value.dtype)
        return add([jnp.sum(a * b) for a, b in zip(along, parts, strict=True)])

    slopes = _over_devices(
        [
            [
                (leaf.axes, slope(norm, direction, leaf, tangent))
                for leaf, tangent in zip(group, dots, strict=True)
            ]
            for group, dots, norm, direction in zip(
                groups, tangents, norms, directions, strict=True
            )
        ],
        _sums,
    )
    if more is not None:
        slopes = list(map(operator.add, slopes, more))
    return [
        GlobalNorm(slope, *map(jnp.zeros_like, (norm.value, norm.unit)))
        for slope, norm in zip(slopes, norms, strict=True)
    ]
