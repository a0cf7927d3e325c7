"""clip_updates: its guarantees and each of its edge cases, against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, strategies as st
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_globalclip import clip_updates, global_norm

dtypes = pytest.mark.parametrize("dtype", sorted(oracle.FLOATS))
policies = pytest.mark.parametrize("nonfinite", ["nan", "zero"])


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def slack(tree) -> float:
    """What the norm of a clipped tree may exceed its bound by, relatively.

    Half a unit for the rounding of each leaf, and as much for the norm's own.
    """
    return max([oracle.eps(leaf) for leaf in jax.tree.leaves(tree)] or [0.0]) + 1e-6


def underflow(tree) -> float:
    """What rounding to subnormal floats may add to a norm, or flushing them take."""
    steps = [leaf.size * float(jnp.finfo(leaf.dtype).tiny) ** 2 for leaf in tree]
    return math.sqrt(sum(steps))


# --- The guarantees.


@given(oracle.trees(), st.floats(-12, 12).map(lambda power: 10.0**power))
def test_guarantees(tree, max_norm):
    max_norm = float(np.float32(max_norm))
    clipped, measured = clip_updates(tree, max_norm)
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
    leaves, old_leaves = jax.tree.leaves(clipped), jax.tree.leaves(tree)
    for new, old in zip(leaves, old_leaves, strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)

    if measured <= max_norm:
        assert bits(clipped) == bits(tree)
    bound = max_norm * (1 + slack(tree)) + underflow(leaves)
    assert oracle.norm(clipped) <= bound

    scale = min(1.0, max_norm / (oracle.norm(tree) or 1.0))
    for new, old in zip(leaves, old_leaves, strict=True):
        np.testing.assert_allclose(
            np.asarray(new, np.float64),
            np.asarray(old, np.float64) * scale,
            oracle.eps(old) / 2 + 1e-6,
            float(jnp.finfo(old.dtype).tiny),
        )


@dtypes
@pytest.mark.parametrize("max_norm", [0.3, 1.0, 37.0])
def test_rounded_once(dtype, max_norm):
    """Half-precision results are the float32 products, rounded to nearest."""
    tree = [oracle.normals((4000,), dtype)]
    (clipped,), measured = clip_updates(tree, max_norm)
    scale = np.float32(max_norm) / np.asarray(measured)
    expected = np.asarray(tree[0], np.float32) * scale
    np.testing.assert_array_equal(
        np.asarray(clipped), expected.astype(oracle.FLOATS[dtype])
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_unclipped_leaves_keep_their_bits(dtype):
    """Subnormal entries too, which a multiply by 1 would turn into zeros on CPU."""
    info = jnp.finfo(dtype)
    odd = [0.0, -0.0, 1.0, float(info.smallest_subnormal), 3 * float(info.tiny) / 4]
    tree = [
        oracle.normals((1000,), dtype),
        jnp.asarray(np.array(odd).astype(info.dtype)),
    ]
    for max_norm in (global_norm(tree), 1e3, math.inf):
        clipped, _ = clip_updates(tree, max_norm)
        assert bits(clipped) == bits(tree)


@pytest.mark.parametrize("entry", [1e20, 1e38, 3e38])
@pytest.mark.parametrize("max_norm", [1e-6, 1.0, 1e6])
def test_finite_updates_are_never_lost(entry, max_norm):
    """Even where the norm is more than a float32 can hold."""
    (clipped,), _ = clip_updates([jnp.full(100, entry)], max_norm)
    np.testing.assert_allclose(clipped, max_norm / 10, 1e-6)


def test_small_entries_beside_large_ones():
    tree = [jnp.array([1e30, 1e20, 1e10, 1.0])]
    (clipped,), _ = clip_updates(tree, 1.0)
    np.testing.assert_allclose(clipped, [1, 1e-10, 1e-20, 1e-30], 1e-6)


def test_float64_and_float32_leaves_together():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        tree = [rng.standard_normal(50), rng.standard_normal(50).astype(np.float32)]
        clipped, measured = clip_updates(tree, 0.3)
        assert measured.dtype == jnp.float64
        assert [leaf.dtype for leaf in clipped] == [jnp.float64, jnp.float32]
        expected = oracle.clipped(tree, 0.3)
        np.testing.assert_allclose(clipped[0], expected[0], 1e-15)
        np.testing.assert_array_equal(clipped[1], expected[1].astype(np.float32))
        (far,), _ = clip_updates([jnp.full(4, 1e300)], 1e-300)
        np.testing.assert_allclose(far, 5e-301, 1e-14)


def test_complex_leaves():
    tree = [jnp.array([3 + 4j, 0]), jnp.array([12.0])]
    clipped, measured = clip_updates(tree, 1.3)
    assert measured == 13
    np.testing.assert_allclose(clipped[0], [0.3 + 0.4j, 0], 1e-6)
    assert clipped[0].dtype == jnp.complex64


@pytest.mark.parametrize("ord", [1, 3, math.inf])
def test_other_orders(ord):
    tree = oracle.normals([(50,), (3, 4)])
    clipped, measured = clip_updates(tree, 0.5, ord=ord)
    np.testing.assert_allclose(float(measured), oracle.norm(tree, ord), 2e-6)
    np.testing.assert_allclose(oracle.norm(clipped, ord), 0.5, 2e-6)


# --- Edge cases, by the rows of the docstring's table.


@pytest.mark.parametrize("max_norm", [0, 0.0, 1.0, math.inf])
def test_zero_norm(max_norm):
    (clipped,), measured = clip_updates([jnp.zeros(3)], max_norm)
    assert measured == 0
    np.testing.assert_array_equal(clipped, [0, 0, 0])


def test_zero_max_norm():
    (clipped,), _ = clip_updates([jnp.array([1.0, -2.0, 1e30])], 0)
    np.testing.assert_array_equal(clipped, [0, 0, 0])


def test_infinite_max_norm():
    tree = [jnp.array([1e30, 3e38, 3e38])]
    assert bits(clip_updates(tree, math.inf)[0]) == bits(tree)


@pytest.mark.parametrize("bad", [-1, -1.0, -math.inf, math.nan, np.float32(-1)])
@pytest.mark.parametrize("name", ["max_norm", "use_norm"])
def test_concrete_scalars_out_of_range(bad, name):
    if name == "use_norm" and math.isnan(bad):
        pytest.skip("NaN is a norm: that of a tree with a NaN in it.")
    for value in (bad, np.asarray(bad, np.float32)):
        arguments = {"max_norm": 1.0, name: value}
        with pytest.raises(ValueError, match=f"{name}=.*at least 0"):
            clip_updates([jnp.ones(3)], **arguments)


def test_traced_negative_max_norm_is_zero():
    clipped = jax.jit(lambda c: clip_updates(jnp.ones(3), c)[0])(-1.0)
    np.testing.assert_array_equal(clipped, [0, 0, 0])


def test_traced_nan_max_norm_is_nan():
    clipped = jax.jit(lambda c: clip_updates(jnp.ones(3), c)[0])(math.nan)
    assert np.isnan(clipped).all()


@pytest.mark.parametrize("value", ["1", [1.0], 1j, jnp.array(1j), object()])
@pytest.mark.parametrize("name", ["max_norm", "use_norm"])
def test_scalars_of_the_wrong_type(name, value):
    with pytest.raises(TypeError, match=f"{name}=.*real number"):
        clip_updates(jnp.ones(3), **{"max_norm": 1.0, name: value})


@pytest.mark.parametrize("name", ["max_norm", "use_norm"])
def test_scalars_of_the_wrong_shape(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\).*scalar"):
        clip_updates(jnp.ones(3), **{"max_norm": 1.0, name: jnp.ones(1)})


def test_max_norm_none_passes_everything_through():
    tree = [jnp.array([1.0, math.inf]), None, jnp.array([math.nan])]
    clipped, measured = clip_updates(tree, None)
    assert math.isnan(measured)
    assert bits(clipped) == bits(tree)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_array_max_norm_of_any_dtype(dtype):
    for leaf in (jnp.full(4, 2, jnp.bfloat16), jnp.full(4, 2.0)):
        clipped, _ = clip_updates(leaf, jnp.asarray(1, dtype))
        assert clipped.dtype == leaf.dtype
        np.testing.assert_array_equal(clipped.astype(jnp.float32), [0.5] * 4)


def test_what_is_passed_through():
    tangent = np.zeros(3, jax.dtypes.float0)
    tree = {"a": None, "b": optax.MaskedNode(), "c": tangent, "w": jnp.array([2.0])}
    clipped, measured = clip_updates(tree, 1.0)
    assert measured == 2
    assert clipped["a"] is None
    assert clipped["b"] == optax.MaskedNode()
    assert clipped["c"] is tangent
    assert clipped["w"] == 1


def test_python_and_numpy_leaves():
    clipped, measured = clip_updates([3.0, np.array([4.0], np.float16)], 1.0)
    assert measured == 5
    assert [leaf.dtype for leaf in clipped] == [jnp.float32, jnp.float16]
    assert not any(leaf.weak_type for leaf in clipped)
    np.testing.assert_allclose(float(clipped[0]), 0.6, 1e-6)


# --- Non-finite updates.


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf])
@dtypes
def test_non_finite_entries(bad, max_norm, dtype):
    tree = [jnp.array([1, bad], dtype), None, jnp.ones((2, 2), dtype)]
    clipped, _ = clip_updates(tree, max_norm)
    assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(clipped))
    clipped, _ = clip_updates(tree, max_norm, nonfinite="zero")
    assert not any(leaf.any() for leaf in jax.tree.leaves(clipped))
    assert [leaf.dtype for leaf in jax.tree.leaves(clipped)] == [dtype, dtype]


@pytest.mark.parametrize("use_norm", [math.inf, math.nan])
def test_non_finite_use_norm(use_norm):
    clipped, measured = clip_updates(jnp.ones(3), 1.0, use_norm=use_norm)
    np.testing.assert_equal(float(measured), use_norm)
    assert jnp.isnan(clipped).all()
    clipped, _ = clip_updates(jnp.ones(3), 1.0, use_norm=use_norm, nonfinite="zero")
    assert not clipped.any()


@policies
def test_finite_updates_do_not_see_the_policy(nonfinite):
    tree = oracle.normals([(50,), (3, 4)])
    expected = oracle.clipped(tree, 0.5)
    clipped, _ = clip_updates(tree, 0.5, nonfinite=nonfinite)
    jax.tree.map(lambda c, e: np.testing.assert_allclose(c, e, 1e-6), clipped, expected)


def test_error_policy():
    def clip(updates):
        return clip_updates(updates, 1.0, nonfinite="error")[0]

    bad = jnp.array([1.0, math.nan])
    error, _ = checkify.checkify(jax.jit(clip))(bad)
    with pytest.raises(checkify.JaxRuntimeError, match="global norm nan.*leaf_norms"):
        error.throw()
    with pytest.raises(checkify.JaxRuntimeError, match="global norm nan"):
        clip(bad)
    error, clipped = checkify.checkify(jax.jit(clip))(jnp.array([3.0, 4.0]))
    error.throw()
    np.testing.assert_allclose(clipped, [0.6, 0.8], 1e-6)


@pytest.mark.parametrize("after", [1e-6, 0.25, 8.0])
@pytest.mark.parametrize("before", [1e-6, 0.25, 8.0])
def test_products_with_constants_around_a_clip(before, after):
    # XLA may merge constants of one product, as of a mean over steps, with ours.
    leaf = np.float32([3e6, -4e6, 0.5, 1e-10])

    @jax.jit
    def update(leaf):
        clipped, _ = clip_updates(leaf * before, 1.0)
        return clipped * after

    scaled = leaf * np.float64(before)
    expected = scaled * min(1, 1 / np.linalg.norm(scaled)) * after
    np.testing.assert_allclose(update(leaf), expected, 1e-6)


def test_unknown_policy():
    with pytest.raises(ValueError, match="nonfinite='skip'.*nan, zero, error"):
        clip_updates(jnp.ones(3), 1.0, nonfinite="skip")  # pyright: ignore


# --- use_norm.


def on_a_mesh(array):
    """On a mesh, where nothing is done as suits a CPU."""
    mesh = oracle.mesh(AxisType.Explicit)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))


@pytest.mark.parametrize("place", [jnp.asarray, on_a_mesh])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("nonfinite", ["nan", "zero"])
def test_entries_of_any_kind_stay_bit_for_bit_within_a_given_norm(
    place, dtype, nonfinite
):
    real = np.float32([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, 3e-5, 1.0])
    values = real.astype(jnp.dtype(dtype))
    if dtype == "complex64":
        values = np.array([complex(a, b) for a in real for b in real], np.complex64)
    clipped, _ = clip_updates(place(values), 1.0, use_norm=0.5, nonfinite=nonfinite)
    assert np.asarray(clipped).tobytes() == values.tobytes()


@pytest.mark.parametrize("place", [jnp.asarray, on_a_mesh])
def test_signalling_nan_stays_bit_for_bit_within_a_given_norm(place):
    bits = np.uint32([0x7F800001, 0xFFC12345, 0x3F800000])
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    clipped, _ = clip_updates(place(values), 1.0, use_norm=0.5)
    kept = jax.lax.bitcast_convert_type(clipped, jnp.uint32)
    np.testing.assert_array_equal(kept, bits)


def test_use_norm_is_trusted_and_returned():
    clipped, returned = clip_updates([jnp.array([6.0, 8.0])], 1.0, use_norm=2)
    assert (returned, returned.dtype) == (2, jnp.float32)
    np.testing.assert_array_equal(clipped[0], [3, 4])
    unclipped, _ = clip_updates([jnp.array([6.0, 8.0])], 1.0, use_norm=0.5)
    np.testing.assert_array_equal(unclipped[0], [6, 8])


@pytest.mark.parametrize("dtype", oracle.FLOATS)
def test_entries_that_are_not_finite_stay_so_if_the_norm_is_said_to_be(dtype):
    leaf = jnp.array([math.inf, -math.inf, math.nan, 0.5], dtype)
    clipped, _ = clip_updates(leaf, 1.0, use_norm=2.0)
    expected = [math.inf, -math.inf, math.nan, 0.25]
    np.testing.assert_array_equal(clipped.astype(jnp.float32), expected)


def test_use_norm_measures_nothing():
    def clip(updates, norm):
        return clip_updates(updates, 1.0, use_norm=norm)[0]

    text = jax.jit(clip).lower(jnp.ones(1000), 2.0).as_text()
    assert "stablehlo.reduce" not in text


# --- Derivatives and transformations.


@pytest.mark.parametrize("max_norm", [1e-20, 1e-10, 1.0, 1e10, 1e20])
@pytest.mark.parametrize("leaf", [[3e20, -4e20, 1e19], [3e38, -3e38, 1e38]])
def test_clip_and_its_derivatives_by_any_quotient(leaf, max_norm):
    # The tangents are so large that the derivatives are no smaller than 1e-30.
    x, dot = np.float32(leaf), np.float32([1, 2, -1.5]) * np.float32(1e25)
    clipped, jvp = jax.jvp(lambda x: clip_updates(x, max_norm)[0], (x,), (dot,))
    _, pull = jax.vjp(lambda x: clip_updates(x, max_norm)[0], x)
    wide, wide_dot = np.float64(x), np.float64(dot)
    norm = np.linalg.norm(wide)
    scale = np.float64(np.float32(max_norm)) / norm
    slope = scale * (wide_dot - wide / norm * np.dot(wide / norm, wide_dot))
    np.testing.assert_allclose(clipped, scale * wide, 1e-6)
    np.testing.assert_allclose(jvp, slope, 2e-5)
    np.testing.assert_allclose(pull(dot)[0], slope, 2e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e30, 1.5e38])
def test_gradient_through_the_clip(scale):
    leaf = np.array([1, -2, 2, 0.5, -1, 1], np.float32) * np.float32(scale)
    weights = np.arange(6, dtype=np.float32)
    size = oracle.norm(leaf)
    max_norm = size / 3
    gradient = jax.grad(lambda x: (clip_updates(x, max_norm)[0] * weights).sum())(leaf)
    unit = leaf.astype(np.float64) / size
    expected = max_norm / size * (np.eye(6) - np.outer(unit, unit)) @ weights
    np.testing.assert_allclose(gradient, expected, 1e-5)


@dtypes
def test_gradient_through_the_clip_in_each_dtype(dtype):
    leaf, weights = oracle.normals((6,), dtype), oracle.normals((6,), seed=1)

    def total(x):
        return (clip_updates(x, 0.5)[0].astype(jnp.float32) * weights).sum()

    size = oracle.norm(leaf)
    unit = np.asarray(leaf, np.float64) / size
    expected = 0.5 / size * (np.eye(6) - np.outer(unit, unit)) @ np.asarray(weights)
    gradient = np.asarray(jax.grad(total)(leaf), np.float64)
    np.testing.assert_allclose(gradient, expected, atol=2 * oracle.eps(leaf))


@pytest.mark.parametrize("max_norm", [0.0, 1.0, math.inf, None])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1e30])
@policies
def test_gradients_through_the_clip_are_finite(max_norm, scale, nonfinite):
    if max_norm is None:
        nonfinite = "nan"

    def total(x):
        clipped, measured = clip_updates(x, max_norm, nonfinite=nonfinite)
        return clipped.sum() + measured

    leaf = scale * jnp.array([1.0, -2.0, 0.5])
    assert jnp.isfinite(jax.grad(total)(leaf)).all()
    assert jnp.isfinite(jax.hessian(total)(leaf)).all()


def test_gradient_at_zero_is_that_of_the_identity():
    gradient = jax.jacobian(lambda x: clip_updates(x, 1.0)[0])(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, np.eye(3))


def test_vmap_clips_each_example_by_its_own_norm():
    leaf = jnp.array([[3.0, 4.0], [0.3, 0.4], [3e25, 4e25], [0.0, 0.0]])
    clipped, norms = jax.vmap(lambda x: clip_updates(x, 1.0))(leaf)
    np.testing.assert_allclose(norms, [5, 0.5, 5e25, 0], 1e-6)
    expected = [[0.6, 0.8], [0.3, 0.4], [0.6, 0.8], [0, 0]]
    np.testing.assert_allclose(clipped, expected, 1e-6)
    per_example = jax.vmap(lambda x, c: clip_updates(x, c)[0], in_axes=(0, 0))
    thresholds = jnp.array([5.0, 0.1, 1.0, 1.0])
    np.testing.assert_allclose(per_example(leaf, thresholds)[1], [0.06, 0.08], 1e-6)


def test_donated_buffers_are_reused():
    leaf = jnp.ones(2**20)
    clip = jax.jit(lambda x: clip_updates(x, 1.0), donate_argnums=0)
    memory = clip.lower(leaf).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= leaf.nbytes


def test_one_program_outside_jit_and_none_on_later_calls():
    tree = oracle.normals([(7,), (3, 5), (2,)])
    with oracle.compilations() as first:
        clip_updates(tree, 1.0)
    assert len(first) == 1
    with oracle.compilations() as later:
        clip_updates(tree, 2.5)
        clip_updates(jax.tree.map(lambda leaf: 2 * leaf, tree), 1.0, ord=2.0)
    assert len([entry for entry in later if "multiply" not in entry]) == 0
