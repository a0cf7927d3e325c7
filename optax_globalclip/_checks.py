"""Arguments: what is wrong with them, and what to pass instead."""

import decimal
import math
import numbers
import sys
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

NonFinite = Literal["nan", "zero", "error"]
Scalar = float | jax.Array
# What may be passed for a scalar: all that ``chex.Numeric`` is.
Numeric = jax.Array | np.ndarray[Any, Any] | np.number[Any] | np.bool_ | int | float
_REAL = numbers.Real | decimal.Decimal


def unwrapped(value: Any) -> Any:
    """The array that an object converts to by ``__jax_array__``, or the object."""
    if isinstance(value, jax.Array) or not hasattr(value, "__jax_array__"):
        return value
    return value.__jax_array__()


def as_scalar(name: str, value: Any, *, nan_allowed: bool = False) -> Scalar:
    """Converts a number to a float; returns an array on a device as it is.

    The value of an array is never looked at: it may be traced, or not be ready.

    Raises:
      TypeError: for anything but a real number or a real array.
      ValueError: for an array that is not a scalar, or for a Python or NumPy number
        that is negative, NaN (unless ``nan_allowed``) or too large for a float.
    """
    value = unwrapped(value)
    if isinstance(value, np.timedelta64):  # An integer to NumPy.
        raise TypeError(f"{name}={value!r} is a timedelta64. Pass a real number.")
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        _check_array(name, value)
    elif isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}. Pass a real number or a "
            "scalar array."
        )
    if isinstance(value, jax.Array):
        return value
    number = _as_float(name, value)
    if number < 0 or (math.isnan(number) and not nan_allowed):
        raise ValueError(
            f"{name}={number}: a norm is at least 0. Pass a number of at least 0, or "
            "math.inf never to clip."
        )
    return number


def as_ord(ord: Any) -> Scalar:
    """Converts the order of a norm to a float; returns an array as it is.

    Raises:
      ValueError: for anything but a real scalar; for a Python or NumPy number less than
        1 or NaN.
    """
    rule = (
        "the order of a norm is a real number of at least 1, or math.inf for the "
        "largest entry."
    )
    return _within("ord", ord, 1, math.inf, rule)


def check_nonfinite(nonfinite: NonFinite, max_norm: object) -> None:
    """Raises if there is no such policy, or nothing that could carry it out."""
    if not isinstance(nonfinite, str) or nonfinite not in get_args(NonFinite):
        raise ValueError(
            f"nonfinite={nonfinite!r}: it is one of {', '.join(get_args(NonFinite))}."
        )
    if max_norm is None and nonfinite != "nan":
        raise ValueError(
            f"max_norm=None passes every update through, so nonfinite={nonfinite!r} "
            "would do nothing. Pass max_norm=math.inf: it never clips finite updates."
        )


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raises if ``value`` is no finite real scalar from ``least`` to ``most``."""
    above = math.isinf(most)
    what = f"of at least {least:g}" if above else f"from {least:g} to {most:g}"
    most = min(most, sys.float_info.max)
    _within(name, value, least, most, f"pass a finite number {what}.")


def check_static(name: str, value: Any) -> None:
    """Raises if ``value`` is an array on a device."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} is an array, but it is static: it decides about shapes and what "
            f"is compiled. Pass a Python number; in optax.inject_hyperparams, name "
            f"{name!r} in static_args."
        )


def check_count(name: str, value: Any, at_least: int, otherwise: str = "") -> None:
    """Raises if ``value`` is no Python or NumPy integer that an int32 can count to."""
    check_static(name, value)
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or not at_least <= int(value) < 2**31:
        raise ValueError(
            f"{name}={value!r}: pass an integer from {at_least} to 2**31 - 1"
            f"{otherwise}."
        )


def check_pair(who: str, returned: Any, remedy: str) -> None:
    """Raises if a function of the user's did not return a pair."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise TypeError(
            f"{who} returned {type(returned).__name__}, but not a pair. {remedy}"
        )


def check_like(who: str, name: str, new_state: Any, state: Any, remedy: str) -> None:
    """Raises if a new state has another structure or other shapes than before."""
    leaves, before = jax.tree.flatten(state)
    new_leaves, after = jax.tree.flatten_with_path(new_state)
    if before != after:
        raise ValueError(
            f"{who} returned a state of the structure {after} for one of {before}. "
            f"{remedy}"
        )
    for (path, new), old in zip(new_leaves, leaves, strict=True):
        if jnp.shape(new) != jnp.shape(old):
            raise ValueError(
                f"{who} returned {name}{jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(new)} for one of {jnp.shape(old)}. {remedy}"
            )


def _within(name: str, value: Any, least: float, most: float, rule: str) -> Scalar:
    """``as_scalar`` of a number in a range, where every error says the rule."""
    shown = "array" if isinstance(value, jax.Array) else repr(value)
    wrong = f"{name}={shown}: {rule}"
    try:
        number = as_scalar(name, value)
    except (TypeError, ValueError) as error:
        raise ValueError(wrong) from error
    if isinstance(number, float) and not least <= number <= most:
        raise ValueError(wrong)
    return number


def _check_array(name: str, value: jax.Array | np.ndarray | np.generic) -> None:
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    if not floating and not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{name}={value.dtype}{list(value.shape)}: an array, but not of floats or "
            "integers. Pass a real number or a scalar array of real numbers."
        )
    if value.shape != ():
        raise ValueError(
            f"{name} has shape {value.shape}, but it is one number for the whole "
            "tree. Pass a scalar, of shape ()."
        )


def _as_float(name: str, value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(
            f"{name} is too large for a float. Pass math.inf never to clip."
        ) from None
    # Without x64 it becomes float32, and NumPy would warn of what is inf there.
    largest = float(jnp.finfo(jax.dtypes.canonicalize_dtype(float)).max)
    return math.inf if number > largest else number
