"""Errors that JAX raises about an argument, in the caller's words.

JAX names the arguments of the function that it compiled, which the caller never wrote.
Arguments are examined after an error only, so that a call that succeeds costs nothing.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
from jax.core import Tracer

_Function = TypeVar("_Function", bound=Callable[..., Any])
_EXAMINED = ("updates", "state", "max_norm", "use_norm", "ord")


def explained(**captured: Any) -> Callable[[_Function], _Function]:
    """Decorates a function so that errors about its arguments name an array of them.

    Args:
      **captured: what the function uses besides its arguments, by the caller's names.
    """

    def decorate(function: _Function) -> _Function:
        names = inspect.signature(function).parameters

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                entered = error.__traceback__ and error.__traceback__.tb_next
                if not entered:  # The call does not fit the signature.
                    raise
                given = dict(zip(names, args, strict=False)) | kwargs
                examined = {name: given[name] for name in _EXAMINED if name in given}
                _explain(error, captured | examined)
                raise

        return cast(_Function, call)

    return decorate


def _explain(error: Exception, arguments: dict[str, Any]) -> None:
    """Raises another error if an array in the arguments is the cause of this one."""
    placed: list[tuple[str, jax.sharding.Sharding]] = []
    for name, array in _arrays(error, arguments):
        if isinstance(array, Tracer):
            if _has_left(array):
                raise TypeError(
                    f"{name} is a tracer of {type_of(array)} that has left the "
                    "function it belongs to, such as one in jax.jit. Return it from "
                    "that function, and pass what the function returns."
                ) from error
        elif array.is_deleted():
            raise RuntimeError(
                f"{name} is {type_of(array)}, but it has been deleted, as donated "
                "arrays are. Pass the arrays that the step returned, or call jax.jit "
                "without donate_argnums."
            ) from error
        elif array.committed:
            placed.append((name, array.sharding))
    for name, sharding in placed[1:]:
        first, other = placed[0]
        for place in (_devices, _mesh):
            if place(other) != place(sharding):
                raise ValueError(
                    f"{first} lies on {place(other)}, but {name} on {place(sharding)}. "
                    "A global norm is one computation over all of them: bring them to "
                    "one mesh with jax.device_put."
                ) from error


def _arrays(
    error: Exception, arguments: dict[str, Any]
) -> Iterator[tuple[str, jax.Array]]:
    """Every array in the arguments, with its name."""
    for name, tree in arguments.items():
        try:
            leaves = jax.tree.leaves_with_path(tree)
        except ValueError:
            raise ValueError(
                f"{name} cannot be flattened: a dictionary in it has keys that cannot "
                "be compared, such as 1 and 'a'. Pass keys of one type."
            ) from error
        for path, leaf in leaves:
            if isinstance(leaf, jax.Array):
                yield name + jax.tree_util.keystr(path), leaf


def _has_left(tracer: Any) -> bool:
    """Whether the function that the tracer belongs to has returned."""
    try:
        _ = tracer + 0
    except Exception as error:
        return isinstance(error, jax.errors.UnexpectedTracerError)
    return False


def _devices(sharding: jax.sharding.Sharding) -> str:
    return f"devices {sorted(device.id for device in sharding.device_set)}"


def _mesh(sharding: jax.sharding.Sharding) -> str:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return "no mesh"
    axes = zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True)
    named = ", ".join(f"{name}: {type_.name}" for name, type_ in axes)
    return f"a mesh ({named})"


def type_of(array: Any) -> str:
    """The dtype and the shape, as in ``float32[3,4]``."""
    shape = ",".join(map(str, getattr(array, "shape", ())))
    return f"{array.dtype}[{shape}]"
