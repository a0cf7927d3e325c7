"""Norms of other orders: one read finds the largest entry, a second divides by it."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ._l2 import ScaledNorm
from ._leaves import accumulator_dtype
from ._mesh import Axes, all_reduce, by_axes
from ._sum import add, sum_across, sum_entries

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
    sums = _power_sums(moduli, [unit] * len(moduli), ord)
    return ScaledNorm(_power(sum_across(sums, axes, add), 1 / ord), unit)


def lp_norms(
    leaves: Sequence[jax.Array], ord: Ord, axes: tuple[Axes, ...]
) -> list[jax.Array]:
    """The norm of each leaf, of any order of at least 1, which may be traced."""
    moduli = _moduli(leaves)
    if _is_inf(ord):
        return all_reduce(_largest(moduli), axes, jax.lax.pmax)
    largest = _largest(jax.lax.stop_gradient(moduli))
    units = list(map(_as_unit, all_reduce(largest, axes, jax.lax.pmax)))
    sums = all_reduce(_power_sums(moduli, units, ord), axes, jax.lax.psum)
    return [
        _power(total, 1 / ord) * unit for total, unit in zip(sums, units, strict=True)
    ]


def _is_inf(ord: Ord) -> bool:
    return isinstance(ord, float) and ord == math.inf


def _moduli(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    dtype = accumulator_dtype(leaves)
    return [jnp.abs(leaf).astype(dtype) for leaf in leaves]


def _largest(moduli: list[jax.Array]) -> list[jax.Array]:
    """Each leaf's largest entry, 0 if it has none."""
    return [jnp.max(modulus, initial=0) for modulus in moduli]


def _as_unit(largest: jax.Array) -> jax.Array:
    """What entries are divided by. The norm does not depend on it: it is a constant."""
    return jnp.where(jnp.isfinite(largest) & (largest > 0), largest, 1)


def _power_sums(
    moduli: list[jax.Array], units: list[jax.Array], ord: Ord
) -> list[jax.Array]:
    """Each leaf's sum of powers of its entries in its unit."""
    return [
        sum_entries(_power(modulus / unit, ord))
        for modulus, unit in zip(moduli, units, strict=True)
    ]


def _power(x: jax.Array, exponent: Ord) -> jax.Array:
    """``x ** exponent`` for x >= 0, with 0, inf and NaN kept, and no slope at them."""
    regular = jnp.isfinite(x) & (x > 0)
    exponent = jax.lax.stop_gradient(jnp.asarray(exponent, x.dtype))
    powers = jnp.where(regular, x, 1) ** exponent
    return jnp.where(regular, powers, jax.lax.stop_gradient(x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_norm(moduli: list[jax.Array], axes: tuple[Axes, ...]) -> jax.Array:
    largest = functools.partial(functools.reduce, jnp.maximum)
    groups = by_axes(_largest(moduli), axes)
    return largest(
        all_reduce(list(map(largest, groups.values())), list(groups), jax.lax.pmax)
    )


@_max_norm.defjvp
def _max_norm_jvp(axes, primals, tangents):
    """The slope of the largest entry; where several tie, their mean."""
    (moduli,), (tangents,) = primals, tangents
    largest = _max_norm(moduli, axes)
    ties = [(modulus == largest).astype(largest.dtype) for modulus in moduli]
    slopes = [jnp.sum(tie * t) for tie, t in zip(ties, tangents, strict=True)]
    count = sum_across(list(map(jnp.sum, ties)), axes, add)
    slope = sum_across(slopes, axes, add)
    return largest, jnp.where(largest > 0, slope / jnp.maximum(count, 1), 0)
