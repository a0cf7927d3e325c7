"""Norms and clips of leaves whose entries XLA knows to be alike.

XLA computes with one entry of a broadcast, as with a scalar, and merges its products
with constants: ``(x * c) * (x * c)`` becomes ``(x * x) * (c * c)``, and a factor of
that may overflow. ``(c * x) * d`` becomes ``x * (c * d)``, which may underflow. The
gradient of a sum is such a leaf, and so is one of zeros.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from optax_globalclip import _clip, _cpu, _norm, clip_updates, global_norm

ENTRIES = [0.0, 1e-37, 1e-30, 1e-25, 1e-19, 1.0, 1e19, 1e25, 1e30, 1e34]


def clip(leaf):
    """Its norm, and its largest entry after a clip that scales every leaf."""
    (clipped, _), _ = clip_updates([leaf, jnp.ones(3)], 0.5)
    return global_norm([leaf]), jnp.max(clipped, initial=0)


def in_jit(function):
    return jax.jit(function)


def in_shard_map(function):
    inside = not jax.sharding.get_abstract_mesh().empty
    mesh = None if inside else oracle.mesh(AxisType.Auto)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P()))


def constants(transform, shape):
    """The leaves are constants of the program."""
    clips = transform(lambda _: [clip(jnp.full(shape, x)) for x in ENTRIES])
    return clips(0.0)


def numpy_constants(transform, shape):
    leaves = [np.full(shape, x, np.float32) for x in ENTRIES]
    clips = transform(lambda _: list(map(clip, leaves)))
    return clips(0.0)


def broadcasts(transform, shape):
    """The leaves are broadcasts of an argument of the program."""
    of = transform(lambda x: clip(jnp.full(shape, x)))
    return [of(np.float32(x)) for x in ENTRIES]


def gradients(transform, shape):
    """The leaves are gradients of a sum times an argument of the program."""

    def loss(leaf, x):
        return jnp.sum(leaf * x)

    of = transform(lambda x: clip(jax.grad(loss)(jnp.ones(shape), x)))
    return [of(np.float32(x)) for x in ENTRIES]


def examples(transform, shape):
    """The leaves are examples of a batch."""
    of = transform(jax.vmap(lambda x: clip(jnp.full(shape, x))))
    return list(zip(*of(np.float32(ENTRIES)), strict=True))


@pytest.fixture(params=["CPU", "GPU", "TPU"])
def formula(request, monkeypatch):
    """That of a platform, on CPU."""
    if request.param == "CPU":
        yield
        return
    on_tpu = request.param == "TPU"
    monkeypatch.setattr(_cpu, "can_sum", lambda array: False)
    monkeypatch.setattr(_clip, "has_mesh", lambda array: True)
    monkeypatch.setattr(_norm, "on_tpu_mesh", lambda array: on_tpu)
    jax.clear_caches()
    yield
    jax.clear_caches()


leaves = pytest.mark.parametrize(
    "leaves", [constants, numpy_constants, broadcasts, gradients, examples]
)
transforms = pytest.mark.parametrize("transform", [in_jit, in_shard_map])
shapes = pytest.mark.parametrize("shape", [(), (1,), (35,), (200, 300)])


def assert_clipped(leaves, transform, shape):
    for x, (norm, entry) in zip(ENTRIES, leaves(transform, shape), strict=True):
        leaf = np.full(shape, x, np.float32)
        expected = float(oracle.exact_norm(leaf))
        np.testing.assert_allclose(norm, expected, 2e-6)
        clipped = x * 0.5 / math.hypot(expected, math.sqrt(3))
        np.testing.assert_allclose(entry, clipped, 2e-6, 1e-38)


@pytest.mark.usefixtures("formula")
@leaves
@transforms
@shapes
def test_leaves_of_equal_entries(leaves, transform, shape):
    assert_clipped(leaves, transform, shape)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@leaves
@transforms
@shapes
def test_leaves_of_equal_entries_on_a_mesh(leaves, transform, shape, kind):
    with jax.set_mesh(oracle.mesh(kind)):
        assert_clipped(leaves, transform, shape)
