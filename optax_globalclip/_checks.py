"""Arguments: what is wrong with them, and what to pass instead."""

import math
import numbers
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

NonFinite: TypeAlias = Literal["nan", "zero", "error"]
# What may be passed for a scalar.
Numeric: TypeAlias = jax.typing.ArrayLike
Scalar: TypeAlias = float | jax.Array


_State = TypeVar("_State", bound=type)


def exported(state: _State) -> _State:
    """Lets ``jax.export`` serialize programs with states of this class."""
    name = f"optax_globalclip.{state.__name__}"
    jax.export.register_namedtuple_serialization(state, serialized_name=name)
    return state


def unwrapped(value: Any) -> Any:
    """The array that an object converts to by ``__jax_array__``, or the object."""
    if isinstance(value, jax.Array) or not hasattr(value, "__jax_array__"):
        return value
    return value.__jax_array__()


def as_scalar(
    name, value, least=0.0, most=math.inf, *, static=False, nan_allowed=False
) -> Any:
    """Converts a number to a float; returns an array on a device as it is.

    The value of an array is never looked at: it may be traced, or not be ready.

    Raises:
      TypeError: for anything but a real number or a real array; for an array if the
        argument is ``static``.
      ValueError: for an array that is not a scalar, or for a Python or NumPy number
        that is out of range or NaN (unless ``nan_allowed``).
    """
    value, remedy = unwrapped(value), f"Pass a real number of at least {least:g}"
    remedy += ", math.inf included." if math.isinf(most) else f", at most {most:g}."
    if static and isinstance(value, jax.Array):
        raise TypeError(
            f"{name} is an array, but it is static: it decides about what is compiled. "
            f"Pass a Python number; in optax.inject_hyperparams, name {name!r} in "
            "static_args."
        )
    if not _is_real(value):
        raise TypeError(f"{name} is {described(value)}. {remedy}")
    if np.shape(value) != ():
        raise ValueError(f"{name} has shape {np.shape(value)}: it is one. {remedy}")
    if isinstance(value, jax.Array):
        return value
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not (least <= number <= most or (nan_allowed and math.isnan(number))):
        raise ValueError(f"{name}={number} is out of range. {remedy}")
    # Without x64 it becomes float32, and NumPy would warn of what is inf there.
    largest = float(jnp.finfo(jax.dtypes.canonicalize_dtype(float)).max)
    return math.inf if number > largest else number


def as_norm(use_norm: Numeric | None) -> Numeric | None:
    """The norm that the user has given, if any."""
    if use_norm is None:
        return None
    return as_scalar("use_norm", use_norm, nan_allowed=True)


def as_ord(ord: Any) -> float:
    """The order of a norm as a float, at least 1; 2 for None."""
    return 2.0 if ord is None else as_scalar("ord", ord, least=1, static=True)


def check_nonfinite(nonfinite: NonFinite, max_norm: object) -> None:
    """Raises for an unknown policy, and for any but "nan" if ``max_norm`` is None."""
    if not isinstance(nonfinite, str) or nonfinite not in get_args(NonFinite):
        raise ValueError(
            f"nonfinite={nonfinite!r}: it is one of {', '.join(get_args(NonFinite))}."
        )
    if max_norm is None and nonfinite != "nan":
        raise ValueError(
            f"max_norm=None passes every update through, so nonfinite={nonfinite!r} "
            "would do nothing. Pass max_norm=math.inf: it never clips finite updates."
        )


def as_count(name: str, value: Any, least: int) -> int:
    """The count as an int; raises as ``as_scalar``, and unless it is an integer."""
    as_scalar(name, value, least, 2**31 - 1, static=True)
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={value!r} is no integer. Pass one.")
    return int(value)


def check_same(who: str, new: Any, old: Any, *, dtypes: bool = False) -> None:
    """Raises if a state has another structure, other shapes or dtypes than before.

    Args:
      who: what the new state is.
      new: the new state.
      old: the state before.
      dtypes: whether dtypes count. A weakly typed number takes that of before.
    """
    remedy = "Its structure, shapes and dtypes must stay those that init returned."
    leaves, structure = jax.tree.flatten_with_path(new)
    old_leaves, old_structure = jax.tree.flatten(old)
    if structure != old_structure:
        raise ValueError(f"{who} is {structure}, but was {old_structure}. {remedy}")
    for (path, leaf), before in zip(leaves, old_leaves, strict=True):
        retyped = dtypes and is_array(leaf) and _retypes(leaf, before)
        if retyped or not is_array(leaf) or np.shape(leaf) != np.shape(before):
            raise (ValueError if is_array(leaf) and not retyped else TypeError)(
                f"{who}{jax.tree_util.keystr(path)} is {described(leaf)}, but was "
                f"{described(before)}. {remedy}"
            )


def _retypes(leaf: Any, before: Any) -> bool:
    weak = not hasattr(leaf, "dtype") or getattr(leaf, "weak_type", False)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(leaf, *[before] * weak) != jnp.result_type(before)


def is_array(leaf: Any) -> bool:
    """Whether JAX has an array of it: not for objects, strings and dates."""
    leaf = unwrapped(leaf)
    if isinstance(leaf, jax.Array | int | float | complex):
        return True
    return hasattr(leaf, "dtype") and getattr(leaf.dtype, "kind", "O") not in "OSUmM"


def described(value: Any) -> str:
    """``float32[3,4]`` of an array, else the value and its type."""
    if isinstance(value, type) or not hasattr(value, "dtype"):
        return f"{value!r}, a {type(value).__name__}"
    return f"{value.dtype}[{','.join(map(str, getattr(value, 'shape', ())))}]"


def _is_real(value: Any) -> bool:
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    # A timedelta64 is an integer to NumPy, and a key's dtype has no kind.
    is_integer = jnp.issubdtype(value.dtype, jnp.integer) and value.dtype.kind != "m"
    return is_integer or jnp.issubdtype(value.dtype, jnp.floating)
