"""The float64 NumPy oracle, and the trees and meshes that tests are run on."""

import contextlib
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
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

# The largest relative error of a norm.
SUMMED = 5e-7 if RECENT_JAX else 5e-6

FLOATS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def entries(tree) -> np.ndarray:
    """The moduli of all entries, in one float64 vector."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    leaves = [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]
    wide = [
        leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)
        for leaf in leaves
    ]
    return np.concatenate([np.abs(leaf).ravel() for leaf in wide] or [np.zeros(0)])


def norm(tree, ord: float = 2) -> float:
    """The norm in float64, of entries scaled so that no power leaves its range."""
    values = entries(tree)
    largest = values.max(initial=0.0)
    if largest == 0 or not np.isfinite(largest) or ord == math.inf:
        return float(largest)
    powers = (values / largest) ** ord
    return float(largest * math.fsum(powers) ** (1 / ord))


def clipped(tree, max_norm: float, ord: float = 2):
    """Every leaf times ``min(1, max_norm / norm)``, in float64."""
    measured = norm(tree, ord)
    scale = 1.0 if measured <= max_norm else max_norm / measured

    def clip(leaf):
        leaf = np.asarray(leaf)
        wide = np.complex128 if np.iscomplexobj(leaf) else np.float64
        return leaf.astype(wide) * scale

    return jax.tree.map(clip, tree)


def exact_norm(tree, ord: float = 2) -> np.longdouble:
    """The norm in long doubles, for trees whose norm may leave float64's range."""
    moduli = [np.abs(_long(leaf)).ravel() for leaf in jax.tree.leaves(tree)]
    values = np.concatenate(moduli or [np.zeros(0, np.longdouble)])
    largest = np.longdouble(values.max(initial=np.longdouble(0)))
    if largest == 0 or not np.isfinite(largest) or ord == math.inf:
        return largest
    powers = (values / largest) ** np.longdouble(ord)
    return np.longdouble(largest * np.sum(powers) ** (1 / np.longdouble(ord)))


def exact_clipped(tree, max_norm, ord: float = 2):
    """Every leaf times ``min(1, max_norm / norm)``, in long doubles."""
    measured = exact_norm(tree, ord)
    scale = 1 if measured <= max_norm else np.longdouble(max_norm) / measured
    return jax.tree.map(lambda leaf: _long(leaf) * scale, tree)


def _long(leaf) -> np.ndarray:
    leaf = np.asarray(leaf)
    if np.iscomplexobj(leaf):
        return leaf.astype(np.clongdouble)
    return leaf.astype(np.float64).astype(np.longdouble)


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
        error = np.abs(_long(new) - right)
        allowed = (eps(old) / 2 + tolerance) * np.abs(right) + flushed
        assert (error <= allowed).all(), (new, right)


def eps(leaf) -> float:
    """Twice the largest relative error of one rounding to the leaf's dtype."""
    return float(jnp.finfo(leaf.dtype).eps)


def normals(shapes, dtype="float32", seed=0, scale=1.0):
    """A tree of normal entries, of the shapes in ``shapes``."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(
            (scale * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype))
        )

    return jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))


def trees(
    dtypes: tuple[str, ...] = tuple(FLOATS), *, min_leaves: int = 0
) -> st.SearchStrategy:
    """Nested trees with None in them, of every shape and magnitude of the dtypes."""
    leaves = st.sampled_from(dtypes).flatmap(_arrays)
    nests = st.recursive(
        st.none() | leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4)
        ),
        max_leaves=8,
    )
    return nests.filter(lambda tree: len(jax.tree.leaves(tree)) >= min_leaves)


def _arrays(name: str) -> st.SearchStrategy:
    dtype = FLOATS[name]
    info = ml_dtypes.finfo(dtype)

    def at_magnitude(exponent: int) -> st.SearchStrategy:
        limit = min(float(info.max), 2.0**exponent)
        # Subnormal entries have tests of their own: XLA on CPU computes none.
        tiny = float(info.tiny)
        magnitudes = st.floats(min(tiny, limit), limit, allow_subnormal=False)
        elements = (st.just(0.0) | magnitudes | magnitudes.map(lambda x: -x)).map(
            lambda x: float(np.asarray(x, dtype))
        )
        shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
        wide = shapes.flatmap(
            lambda shape: hnp.arrays(np.float64, shape, elements=elements)
        )
        return wide.map(lambda array: jnp.asarray(array.astype(dtype)))

    return st.integers(int(info.minexp) + 1, int(info.maxexp)).flatmap(at_magnitude)


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
