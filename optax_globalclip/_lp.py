"""Norms of other orders: one read finds the largest entry, a second divides by it."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ._l2 import ScaledNorm
from ._leaves import accumulator_dtype
from ._mesh import Axes, all_reduce
from ._sum import add, sum_entries

Ord = float | jax.Array


def lp_norm(
    leaves: Sequence[jax.Array], ord: Ord, axes: tuple[Axes, ...]
) -> ScaledNorm:
    """The norm of all entries, of any order of at least 1, which may be traced."""
    moduli = _moduli(leaves)
    if _is_inf(ord):
        largest = _max_norm(moduli, axes)
        return ScaledNorm(largest, jnp.ones_like(largest))
    unit = _as_unit(_max_norm(jax.lax.stop_gradient(moduli), axes))
    sums = _power_sums(moduli, [unit] * len(moduli), ord, axes)
    return ScaledNorm(_power(add(sums), 1 / ord), unit)


def lp_norms(
    leaves: Sequence[jax.Array], ord: Ord, axes: tuple[Axes, ...]
) -> list[jax.Array]:
    """The norm of each leaf, of any order of at least 1, which may be traced."""
    moduli = _moduli(leaves)
    if _is_inf(ord):
        return _largest(moduli, axes)
    units = list(map(_as_unit, _largest(jax.lax.stop_gradient(moduli), axes)))
    sums = _power_sums(moduli, units, ord, axes)
    return [
        _power(total, 1 / ord) * unit for total, unit in zip(sums, units, strict=True)
    ]


def _is_inf(ord: Ord) -> bool:
    return isinstance(ord, float) and ord == math.inf


def _moduli(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    dtype = accumulator_dtype(leaves)
    return [jnp.abs(leaf).astype(dtype) for leaf in leaves]


def _largest(moduli: list[jax.Array], axes: tuple[Axes, ...]) -> list[jax.Array]:
    """Each leaf's largest entry, 0 if it has none."""
    largest = [jnp.max(modulus, initial=0) for modulus in moduli]
    return all_reduce(largest, axes, jax.lax.pmax)


def _as_unit(largest: jax.Array) -> jax.Array:
    """What entries are divided by. The norm does not depend on it: it is a constant."""
    return jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)


def _power_sums(
    moduli: list[jax.Array], units: list[jax.Array], ord: Ord, axes: tuple[Axes, ...]
) -> list[jax.Array]:
    """Each leaf's sum of powers of its entries in its unit."""
    sums = [
        sum_entries(_power(modulus / unit, ord))
        for modulus, unit in zip(moduli, units, strict=True)
    ]
    return all_reduce(sums, axes, jax.lax.psum)


def _power(x: jax.Array, exponent: Ord) -> jax.Array:
    """``x ** exponent`` for x >= 0, with 0, inf and NaN kept, and no slope at them."""
    regular = jnp.isfinite(x) & (x > 0)
    exponent = jax.lax.stop_gradient(jnp.asarray(exponent, x.dtype))
    powers = jnp.where(regular, x, 1) ** exponent
    return jnp.where(regular, powers, jax.lax.stop_gradient(x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_norm(moduli: list[jax.Array], axes: tuple[Axes, ...]) -> jax.Array:
    return functools.reduce(jnp.maximum, _largest(moduli, axes))


@_max_norm.defjvp
def _max_norm_jvp(axes, primals, tangents):
    """The slope of the largest entry; where several tie, their mean."""
    (moduli,), (tangents,) = primals, tangents
    largest = _max_norm(moduli, axes)
    ties = [(modulus == largest).astype(largest.dtype) for modulus in moduli]
    slopes = [jnp.sum(tie * t) for tie, t in zip(ties, tangents, strict=True)]
    count = add(all_reduce([jnp.sum(tie) for tie in ties], axes, jax.lax.psum))
    slope = add(all_reduce(slopes, axes, jax.lax.psum))
    return largest, jnp.where(largest > 0, slope / jnp.maximum(count, 1), 0)
