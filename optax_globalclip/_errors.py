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
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if hasattr(error, "_explained"):
                    raise
                given = _arguments(signature, args, kwargs)
                cause = _cause({**captured, **given})
                if cause is None:
                    raise
                vars(cause)["_explained"] = True
                raise cause from error

        return cast(_Function, call)

    return decorate


def _arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # An argument is missing, which is what the error says.
        return {}
    return {name: given[name] for name in _EXAMINED if name in given}


def _cause(arguments: dict[str, Any]) -> Exception | None:
    for name, tree in arguments.items():
        try:
            jax.tree.leaves(tree)
        except ValueError:
            return ValueError(
                f"{name} cannot be flattened: a dictionary in it has keys that cannot "
                "be compared, such as 1 and 'a'. Pass keys of one type."
            )
    arrays = list(_arrays(arguments))
    return _leaked(arrays) or _deleted(arrays) or _apart(arrays)


def _arrays(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every array in the arguments, with its name."""
    for name, tree in arguments.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            if isinstance(leaf, jax.Array):
                yield name + jax.tree_util.keystr(path), leaf


def _leaked(arrays: list[tuple[str, Any]]) -> Exception | None:
    for name, array in arrays:
        if isinstance(array, Tracer) and not _is_valid(array):
            return TypeError(
                f"{name} is a tracer of {type_of(array)} that has left the function "
                "it belongs to, such as one in jax.jit. Return it from that function, "
                "and pass what the function returns."
            )
    return None


def _is_valid(tracer: Any) -> bool:
    try:
        _ = tracer + 0
    except jax.errors.UnexpectedTracerError:
        return False
    except Exception:
        return True
    return True


def _deleted(arrays: list[tuple[str, Any]]) -> Exception | None:
    for name, array in arrays:
        if not isinstance(array, Tracer) and array.is_deleted():
            return RuntimeError(
                f"{name} is {type_of(array)}, but it has been deleted, as donated "
                "arrays are. Pass the arrays that the step returned, or call jax.jit "
                "without donate_argnums."
            )
    return None


def _apart(arrays: list[tuple[str, Any]]) -> Exception | None:
    """The error for arrays that no computation can take together."""
    placed = [
        (name, array.sharding)
        for name, array in arrays
        if not isinstance(array, Tracer) and array.committed
    ]
    for name, sharding in placed[1:]:
        first, other = placed[0]
        places = _devices(other), _devices(sharding)
        if places[0] != places[1]:
            what = f"{first} lies on {places[0]}, but {name} on {places[1]}."
        elif (meshes := (_mesh(other), _mesh(sharding)))[0] != meshes[1]:
            what = f"{first} lies on {meshes[0]}, but {name} on {meshes[1]}."
        else:
            continue
        return ValueError(
            f"{what} A global norm is one computation over all of them: bring them "
            "to one mesh with jax.device_put."
        )
    return None


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
