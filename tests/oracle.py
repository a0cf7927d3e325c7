"""The oracles in NumPy's long doubles, and the trees and meshes that tests share."""

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, strategies as st
from jax.sharding import AxisType

# For tests that run code of Optax's own: it mixes dtypes, and uses deprecated names.
RUNS_OPTAX = [
    pytest.mark.usefixtures("optax_promotes"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# Before, XLA on CPU sums less precisely and materializes what it sums, and JAX can
# neither select among unreduced arrays nor vmap shard_map over a mesh axis. Tests of
# these need this release.
RECENT_JAX = jax.__version_info__ >= (0, 10, 2)

# The largest relative error of a 2-norm in float32.
SUMMED = 5e-7 if RECENT_JAX else 5e-6

# Off a single CPU device, entries below may count as 0, by the accumulator's dtype.
FLOOR = {np.dtype(np.float32): 5e-23, np.dtype(np.float64): 1e-287}

FLOATS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def wide(leaf) -> np.ndarray:
    """The leaf in long doubles, or complex ones."""
    leaf = np.asarray(leaf)
    if np.iscomplexobj(leaf):
        return leaf.astype(np.clongdouble)
    return leaf.astype(np.float64).astype(np.longdouble)


def moduli(tree) -> np.ndarray:
    """The moduli of all entries, in one vector."""
    leaves = map(np.asarray, jax.tree.leaves(tree))
    leaves = [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]
    return np.concatenate([np.zeros(0), *(np.abs(wide(x)).ravel() for x in leaves)])


def exact_norm(tree, ord: float = 2, floor: float = 0.0) -> np.longdouble:
    """The norm, of entries scaled so that no power leaves the range of long doubles.

    Entries less than the floor count as 0.
    """
    values = moduli(tree)
    values = np.where(values < floor, 0, values)
    largest = np.longdouble(values.max(initial=0))
    if largest == 0 or not np.isfinite(largest) or ord == math.inf:
        return largest
    total = np.sum((values / largest) ** ord)
    return np.longdouble(largest * total ** (1 / np.longdouble(ord)))


def norm(tree, ord: float = 2) -> float:
    """The norm in float64."""
    return float(exact_norm(tree, ord))


def exact_clipped(tree, max_norm, ord: float = 2):
    """Every leaf times ``min(1, max_norm / norm)``, in long doubles."""
    measured = exact_norm(tree, ord)
    scale = 1 if measured <= max_norm else np.longdouble(max_norm) / measured
    return jax.tree.map(lambda leaf: wide(leaf) * scale, tree)


def clipped(tree, max_norm, ord: float = 2):
    """The same in float64."""

    def narrow(leaf):
        return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)

    return jax.tree.map(narrow, exact_clipped(tree, max_norm, ord))


def assert_norm(found, tree, ord: float = 2, tolerance=None, *, on_one_cpu=True):
    """The norm is right, or inf if it is above the largest float of its dtype."""
    found = np.asarray(found)
    info = np.finfo(found.dtype)
    tolerance = tolerance or (5e-15 if info.bits == 64 else 2e-6)
    most = exact_norm(tree, ord)
    least = most if on_one_cpu else exact_norm(tree, ord, FLOOR[found.dtype])
    if np.isnan(most):
        assert np.isnan(found)
    elif found == math.inf:
        # At the very edge, the last rounding decides between the largest and inf.
        assert most > float(info.max) * (1 - tolerance)
    else:
        below = float(info.tiny) if most < float(info.tiny) else 0
        low, high = least * (1 - tolerance) - below, most * (1 + tolerance) + below
        assert low <= np.longdouble(found) <= high, (found, least, most)


def assert_clipped(found, tree, max_norm, ord: float = 2, tolerance: float = 2e-6):
    """Each entry is ``entry * max_norm / norm``, rounded once to the leaf's dtype.

    XLA on CPU flushes subnormal float32 numbers, so results below the smallest normal
    number may be zeros.
    """
    expected = exact_clipped(tree, max_norm, ord)
    for new, old, right in zip(
        *map(jax.tree.leaves, (found, tree, expected)), strict=True
    ):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        info = jnp.finfo(new.dtype)
        half = info.dtype == np.float16
        flushed = float(info.smallest_subnormal if half else info.tiny)
        error = np.abs(wide(new) - right)
        allowed = (eps(old) / 2 + tolerance) * np.abs(right) + flushed
        assert (error <= allowed).all(), (new, right)


def eps(leaf) -> float:
    """Twice the largest relative error of one rounding to the leaf's dtype."""
    return float(jnp.finfo(leaf.dtype).eps)


# --- Derivatives, at entries of every magnitude.

TINY = float(np.finfo(np.float32).tiny)
VALUES = np.array([1.0, -2.0, 0.5, 1.5, -0.25, 3.0])
WEIGHTS = np.array([0.5, 1.0, -1.0, 2.0, 0.25, -0.75])
EXTREMES = (-35, -15, -12, 0, 19, 20, 35, 38)


def every_magnitude(test):
    """Runs a test over magnitudes from 1e-35 to 1e38, the extreme ones always."""
    for power in EXTREMES:
        test = example(power)(test)
    return given(st.integers(-35, 38))(test)


def at(power, dtype=np.float32):
    return (VALUES * 10.0**power).astype(dtype)


def assert_close(found, expected, tolerance=1e-5, terms=1):
    """Close relative to the largest entry; each term may be flushed below TINY."""
    atol = tolerance * float(np.abs(expected).max()) + terms * TINY
    error = np.abs(np.asarray(found).astype(np.longdouble) - expected)
    assert (error <= atol).all(), (found, expected)


def slope(x, ord):
    """The gradient of the p-norm."""
    x = wide(x)
    size = exact_norm(x, ord)
    if ord == math.inf:
        largest = np.abs(x) == size
        return np.sign(x) * largest / largest.sum()
    return np.sign(x) * (np.abs(x) / size) ** (ord - 1)


def curvature(x, ord):
    """The Hessian of the p-norm."""
    x = wide(x)
    size, unit = exact_norm(x, ord), slope(x, ord)
    if ord == math.inf:
        return np.zeros((x.size, x.size), np.longdouble)
    diagonal = np.diag((np.abs(x) / size) ** (ord - 2))
    return (ord - 1) / size * (diagonal - np.outer(unit, unit))


# --- Trees, meshes and programs.


def normals(shapes, dtype="float32", seed=0, scale=1.0):
    """A tree of normal entries, of the shapes in ``shapes``."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(
            (scale * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype))
        )

    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def mesh(*axis_types: AxisType) -> jax.sharding.Mesh:
    """Eight devices, as axes x of 4 and y of 2, of the types given: auto if none."""
    types = axis_types or (AxisType.Auto,)
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=types * (2 // len(types)))


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for each program that XLA compiles meanwhile."""
    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(f"{duration_secs:.3f} s {kwargs}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def equations(jaxpr) -> Iterator:
    """Every equation of a jaxpr, and of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda node: hasattr(node, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
