"""Symbolic shapes, every float dtype, donation, and maps around maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

from optax_globalclip import (
    Threshold,
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

# --- Symbolic shapes.

PLATFORMS = ("cpu", "cuda", "tpu")


def fields_of(update):
    """The update with its state as a tuple, which needs no serialization."""

    def function(updates):
        updates, state = update(updates, None)
        return updates, tuple(leaf for leaf in state[:-1] if leaf is not None)

    return function


EXPORTED = {
    "global_norm": global_norm,
    "global_norm, ord 3": functools.partial(global_norm, ord=3),
    "global_norm, ord inf": functools.partial(global_norm, ord=np.inf),
    "leaf_norms": leaf_norms,
    "clip_updates": lambda updates: clip_updates(updates, 1.0),
    "clip_updates, zero": lambda updates: clip_updates(updates, 1.0, nonfinite="zero"),
    "clip_by_global_norm": fields_of(clip_by_global_norm(1.0).update),
}
EXTENTS = {"b, 3": (5000, 3), "b, n": (70, 80), "b": (9,), "2*b, 3": (4, 3)}


def exported(function, dtype, extents, platforms=PLATFORMS):
    shape = export.symbolic_shape(extents)
    updates = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        jax.ShapeDtypeStruct((4,), jnp.float32),
    ]
    return export.export(jax.jit(function), platforms=platforms)(updates)


def entries(shape, dtype):
    rng = np.random.default_rng(0)
    first = rng.standard_normal(shape).astype(jnp.dtype(dtype))
    return [first, rng.standard_normal(4).astype(np.float32)]


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_symbolic_shapes_may_be_exported_for_every_platform(name, dtype):
    program = exported(EXPORTED[name], dtype, "b, 3")
    assert program.platforms == PLATFORMS
    updates = entries((7, 3), dtype)
    found, expected = program.call(updates), EXPORTED[name](updates)
    for leaf, same in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert leaf.dtype == same.dtype
        rounding = oracle.eps(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        np.testing.assert_allclose(np.float64(leaf), np.float64(same), rounding)


@pytest.mark.parametrize("extents", EXTENTS)
def test_exported_norm_and_clip_are_right_at_any_extent(extents):
    program = exported(EXPORTED["clip_updates"], "float32", extents, ("cpu",))
    for scale in (1.0, 1e-30, 1e30):
        updates = [leaf * np.float32(scale) for leaf in entries(EXTENTS[extents], "f4")]
        clipped, norm = program.call(updates)
        np.testing.assert_allclose(norm, oracle.norm(updates), 1e-5)
        oracle.assert_clipped(clipped, updates, 1.0, tolerance=1e-5)


@pytest.mark.parametrize("make", [clip_by_global_norm, None], ids=["clip", "skip"])
def test_states_may_be_in_the_signature_of_an_exported_step(make):
    clip = clip_by_global_norm(1.0)
    # Not around a state of Optax's own, which Optax does not register.
    tx = make(1.0) if make else skip_by_global_norm(clip, zscore_threshold())
    (rows,) = export.symbolic_shape("b")
    updates = [jax.ShapeDtypeStruct((rows, 3), jnp.float32)]
    state = jax.eval_shape(tx.init, [jnp.ones((2, 3))])
    program = export.export(jax.jit(tx.update), platforms=PLATFORMS)(updates, state)
    program = export.deserialize(program.serialize())
    gradients = [np.float32([[3, 4, 12]])]
    found, new_state = program.call(gradients, tx.init(gradients))
    expected, same_state = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(found[0], expected[0], 1e-6)
    assert type(new_state) is type(same_state)
    np.testing.assert_allclose(new_state.global_norm, 13, 1e-6)


# --- Every float dtype that JAX has.

FLOAT_NAMES = [
    "float4_e2m1fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]
DTYPES = [name for name in FLOAT_NAMES if hasattr(jnp, name)]


def leaf_of(dtype, size):
    """Powers of two that every dtype can hold: e8m0 has no sign and no zero."""
    exponents = np.random.default_rng(size).integers(0, 3, size)
    return (2.0**exponents).astype(jnp.dtype(dtype))


def nearest(values, dtype):
    """Values rounded to the dtype by way of float32, as a cast of ml_dtypes does."""
    return np.float64(np.asarray(values, np.float32).astype(jnp.dtype(dtype)))


def test_table_of_dtypes_is_complete():
    known = {
        name
        for name in dir(jnp)
        if name.startswith(("float", "bfloat", "complex"))
        and isinstance(getattr(jnp, name), type(jnp.float32))
    }
    # XLA on CPU has no floats of six bits.
    known = {name for name in known if not name.startswith("float6")}
    assert known - {"floating", "complexfloating", "float_", "complex_"} <= set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10, 5000])
def test_norm_of_every_float_dtype(dtype, size):
    wide = dtype in ("float64", "complex128")
    with jax.enable_x64(wide):
        leaf = jnp.asarray(leaf_of(dtype, size))
        values = np.float64(leaf_of("float32", size))
        for norm in (global_norm([leaf]), leaf_norms([leaf])[0]):
            assert norm.dtype == (jnp.float64 if wide else jnp.float32)
            np.testing.assert_allclose(norm, oracle.norm(values), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10, 5000])
def test_every_float_dtype_is_clipped_and_kept(dtype, size):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        leaf = jnp.asarray(leaf_of(dtype, size))
        values = np.float64(leaf_of("float32", size))
        norm = oracle.norm(values)
        clipped, _ = jax.jit(clip_updates)([leaf], np.float32(norm / 2))
        assert (clipped[0].dtype, clipped[0].shape) == (leaf.dtype, leaf.shape)
        found = np.asarray(clipped[0]).astype(np.complex128)
        # A scale within rounding of 1/2: powers of two have exact halves, except
        # where the halves lie below the smallest number of the dtype.
        allowed = (
            np.abs(found - values / 2)
            <= np.abs(
                values / 2 - nearest(values / 2, leaf.real.dtype)
                if "complex" not in dtype
                else 0
            )
            + 1e-5 * values
        )
        assert allowed.all()
        kept, _ = jax.jit(clip_updates)([leaf], np.float32(norm * 2))
        assert np.asarray(kept[0]).tobytes() == np.asarray(leaf).tobytes()


@pytest.mark.parametrize("dtype", [name for name in DTYPES if "float" in name])
def test_every_float_dtype_fits_a_step(dtype):
    with jax.enable_x64(dtype == "float64"):
        updates = {"w": jnp.asarray(leaf_of(dtype, 5000)), "b": jnp.ones(3)}
        tx = skip_by_global_norm(clip_by_global_norm(1e6), 1e6)
        found, state = jax.jit(tx.update)(updates, tx.init(updates))
        assert state.num_skipped == 0
        for key, leaf in updates.items():
            assert np.asarray(found[key]).tobytes() == np.asarray(leaf).tobytes()


# --- Donation.

SHARED = jnp.arange(3.0)
# One array twice in the first state, and an array that the user still holds.
SHARING = Threshold(
    lambda: (SHARED, SHARED, SHARED), lambda norm, state, count: (1.0, state)
)
LAST_NORM = Threshold(
    lambda: (jnp.float32(jnp.inf),) * 2, lambda norm, state, count: (norm, (norm, norm))
)
TRANSFORMATIONS = {
    "own threshold": lambda: clip_by_global_norm(SHARING),
    "last norm": lambda: clip_by_global_norm(LAST_NORM),
    "skip, own threshold": lambda: skip_by_global_norm(optax.sgd(1.0), SHARING),
    "number": lambda: clip_by_global_norm(1.0),
    "schedule": lambda: clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 4)),
    "None": lambda: clip_by_global_norm(None),
    "z-score": lambda: clip_by_global_norm(zscore_threshold(warmup_steps=1)),
    "quantile": lambda: clip_by_global_norm(quantile_threshold(0.5, window=3)),
    "skip": lambda: skip_by_global_norm(optax.adam(0.1), 100.0),
    "skip, z-score": lambda: skip_by_global_norm(optax.adam(0.1), zscore_threshold()),
    "skip, quantile": lambda: skip_by_global_norm(
        clip_by_global_norm(quantile_threshold(0.5, window=3)),
        quantile_threshold(1.0, window=3),
    ),
    "chain": lambda: optax.chain(clip_by_global_norm(1.0), clip_by_global_norm(2.0)),
}
each_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def gradients():
    return {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}


@each_transformation
@pytest.mark.usefixtures("optax_promotes")
def test_no_two_fields_of_a_state_share_a_buffer(name):
    tx = TRANSFORMATIONS[name]()
    state = tx.init(gradients())
    assert len(set(pointers(state))) == len(pointers(state))
    # A second state is no view of the first: donating one leaves the other.
    again = tx.init(gradients())
    assert not set(pointers(state)) & set(pointers(again))
    _, state = tx.update(gradients(), state)
    assert len(set(pointers(state))) == len(pointers(state))


@each_transformation
@pytest.mark.usefixtures("optax_promotes")
def test_state_from_init_may_be_donated(name):
    tx = TRANSFORMATIONS[name]()
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state, expected_state = tx.init(gradients()), tx.init(gradients())
    for _ in range(2):
        first = jax.tree.leaves(state)
        updates, state = step(gradients(), state)
        expected, expected_state = tx.update(gradients(), expected_state)
        assert any(leaf.is_deleted() for leaf in first)
        for found, right in ((updates, expected), (state, expected_state)):
            jax.tree.map(
                lambda f, e: np.testing.assert_allclose(f, e, 1e-5, 1e-7), found, right
            )


@each_transformation
@pytest.mark.usefixtures("optax_promotes")
def test_state_from_init_inside_jit_may_be_donated(name):
    tx = TRANSFORMATIONS[name]()
    state = jax.jit(tx.init)(gradients())
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    for _ in range(2):
        _, state = step(gradients(), state)


# --- Maps around maps.


@pytest.mark.parametrize("name", ["own threshold", "skip, own threshold"])
def test_donation_leaves_what_the_user_holds(name):
    tx = TRANSFORMATIONS[name]()
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    step(gradients(), tx.init(gradients()))
    np.testing.assert_array_equal(SHARED, [0, 1, 2])
    step(gradients(), tx.init(gradients()))


def test_vmap_over_shard_map():
    batch = oracle.normals((8, 4, 16, 3))
    batch = batch * jnp.float32([1, 1e25, 1e-25, 0])[None, :, None, None]

    def clip(leaf):
        return clip_updates([leaf], 1.0)

    mapped = jax.shard_map(
        clip, mesh=oracle.mesh(), in_specs=P("x"), out_specs=([P("x")], P())
    )
    (clipped,), norms = jax.jit(jax.vmap(jax.vmap(mapped)))(batch)
    for i in np.ndindex(8, 4):
        np.testing.assert_allclose(norms[i], oracle.norm(batch[i]), 2e-6)
        oracle.assert_clipped([clipped[i]], [np.asarray(batch[i])], 1.0)


mapped_mesh_axis = pytest.mark.skipif(
    not oracle.RECENT_JAX, reason="JAX could not vmap shard_map over a mesh axis"
)


@mapped_mesh_axis
@pytest.mark.parametrize("ord", [2, 3, np.inf])
def test_vmap_over_shard_map_with_a_mapped_mesh_axis(ord):
    """Examples lie along y and entries along x: a norm for each example."""
    batch = oracle.normals((4, 16, 3)) * jnp.float32([1, 1e25, 1e-25, 2])[:, None, None]

    def clip(leaf):
        return clip_updates([leaf], 1.0, ord=ord)

    mapped = jax.shard_map(
        clip, mesh=oracle.mesh(), in_specs=P("x"), out_specs=([P("x")], P())
    )
    (clipped,), norms = jax.jit(jax.vmap(mapped, spmd_axis_name="y"))(batch)
    for i in range(4):
        np.testing.assert_allclose(norms[i], oracle.norm(batch[i], ord), 5e-6)
        oracle.assert_clipped([clipped[i]], [np.asarray(batch[i])], 1.0, ord, 1e-5)


@mapped_mesh_axis
def test_transformation_under_vmap_over_shard_map_with_a_mapped_mesh_axis():
    batch = oracle.normals((4, 16))
    tx = clip_by_global_norm(zscore_threshold(warmup_steps=1))

    def step(leaf):
        updates, state = tx.update([leaf], tx.init([leaf]))
        return updates[0], state.global_norm

    mapped = jax.shard_map(
        step, mesh=oracle.mesh(), in_specs=P("x"), out_specs=(P("x"), P())
    )
    updates, norms = jax.jit(jax.vmap(mapped, spmd_axis_name="y"))(batch)
    np.testing.assert_array_equal(updates, batch)
    np.testing.assert_allclose(norms, [oracle.norm(row) for row in batch], 1e-6)


def test_jit_in_scan_in_vmap():
    scales = np.float32([1e-25, 1.0, 3.0, 1e25])
    leaf = np.float32([3.0, 4.0])
    tx = clip_by_global_norm(10.0)
    update = jax.jit(tx.update)

    def run(scale):
        def step(state, factor):
            updates, state = update([leaf * scale * factor], state)
            return state, (updates[0], state.global_norm)

        return jax.lax.scan(step, tx.init(None), np.float32([1, 0.5, 2]))

    states, (updates, norms) = jax.jit(jax.vmap(run))(scales)
    expected = 5 * np.outer(scales.astype(np.float64), [1, 0.5, 2])
    np.testing.assert_allclose(norms, expected, 2e-6)
    np.testing.assert_array_equal(states.num_clipped, (expected > 10).sum(1))
    sizes = np.minimum(expected, 10)
    found = [[oracle.norm(entry) for entry in row] for row in np.asarray(updates)]
    np.testing.assert_allclose(found, sizes, 2e-6)


# --- NumPy arrays as they lie in memory.

BASE = np.arange(1.0, 61, dtype=np.float32).reshape(6, 10)
STRIDED = {
    "every other": BASE[:, ::2],
    "backwards": BASE[::-1, ::-3],
    "transposed": BASE.T,
    "Fortran": np.asfortranarray(BASE),
    "broadcast": np.broadcast_to(BASE[0], (3, 10)),
    "diagonal": np.einsum("ii->i", BASE[:, :6]),
    "field": np.zeros(5, [("w", "f4"), ("b", "i4")])["w"] + np.float32(2),
    "unaligned": np.frombuffer(b"\0" + BASE.tobytes(), np.uint8)[1:].view(np.float32),
    "read-only": np.frombuffer(BASE.tobytes(), np.float32),
    "big-endian": BASE.astype(">f4"),
}


@pytest.mark.parametrize("case", STRIDED)
@pytest.mark.parametrize("compile", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_numpy_arrays_count_however_they_lie_in_memory(case, compile):
    leaf = STRIDED[case]
    if case == "big-endian":
        with pytest.raises(TypeError):
            compile(global_norm)([leaf])
        return
    before = leaf.copy()
    clipped, norm = compile(lambda tree: clip_updates(tree, 1.0))([leaf])
    np.testing.assert_allclose(norm, oracle.norm(leaf), 1e-6)
    np.testing.assert_allclose(clipped[0], before / oracle.norm(before), 1e-5)
    np.testing.assert_array_equal(leaf, before)
