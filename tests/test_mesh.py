"""Mesh axes: named where leaves have no types, and sums that were put off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import clip_by_global_norm, clip_updates, global_norm, leaf_norms


@pytest.mark.parametrize(
    "names", ["x", ("x",), {"a": "x", "b": {"c": ("x",), "d": ()}}]
)
def test_names_in_pmap(names):
    shards = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    tangent = np.zeros(2, jax.dtypes.float0)  # Holds no number, and needs no name.

    def norm(shard):
        tree = {"a": shard[:2], "b": {"c": [tangent, shard[2:]], "d": None}}
        return global_norm(tree, axis_name=names)

    norms = jax.pmap(norm, axis_name="x")(shards)
    np.testing.assert_allclose(norms, [oracle.norm(shards)] * 8, 1e-6)


def test_no_names_is_local():
    shards = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    local = functools.partial(global_norm, axis_name=())
    norms = jax.pmap(local, axis_name="x")(shards)
    np.testing.assert_allclose(norms, [oracle.norm(shard) for shard in shards], 1e-6)


def test_names_do_not_count_repeatedly_what_has_a_type():
    tree = {"split": np.arange(1.0, 9), "whole": np.array([3.0, -4.0])}
    tree = jax.tree.map(np.float32, tree)
    norm = jax.shard_map(
        functools.partial(global_norm, axis_name=("x", "y")),
        mesh=oracle.mesh(),
        in_specs=({"split": P("x"), "whole": P()},),
        out_specs=P(),
    )(tree)
    np.testing.assert_allclose(norm, oracle.norm(tree), 1e-6)


def test_name_of_a_vmapped_axis():
    rows = oracle.normals((5, 7))
    norm = functools.partial(global_norm, axis_name="rows")
    norms = jax.vmap(norm, axis_name="rows")(rows)
    np.testing.assert_allclose(norms, [oracle.norm(rows)] * 5, 1e-6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"a": "x"}, r"no names for updates\['b'\]\['c'\]"),
        ({"a": "x", "b": {"d": "x"}}, r"no names for updates\['b'\]\['c'\]"),
        ([("x",)], r"no names for updates\['a'\]"),
        ({"a": "x", "b": P("x")}, r"axis_name\['b'\] is P"),
        (3, "axis_name is 3"),
    ],
)
@pytest.mark.parametrize("function", [global_norm, leaf_norms, "update"])
def test_names_that_do_not_fit_the_tree(names, message, function):
    if function == "update":
        update = clip_by_global_norm(1.0, axis_name=names).update
        function = functools.partial(update, state=None)
    else:
        function = functools.partial(function, axis_name=names)
    with pytest.raises(ValueError, match=message) as error:
        jax.pmap(
            lambda x: function({"a": x, "b": {"c": x}}), axis_name="x", out_axes=None
        )(jnp.ones((8, 2)))
    assert "Pass a name, a tuple of names, or a tree prefix" in str(error.value)


def test_name_that_is_not_bound():
    clip = clip_by_global_norm(1.0, axis_name="data")
    with pytest.raises(NameError, match=r"'data' is not bound here.*\['x', 'y'\]"):
        jax.shard_map(
            lambda tree: clip.update(tree, None),
            mesh=oracle.mesh(),
            in_specs=P("x"),
            out_specs=P("x"),
            check_vma=False,
        )(jnp.ones(8))
    with pytest.raises(NameError, match="under plain jit the norm is global already"):
        jax.jit(clip.update)(jnp.ones(8), None)


unreduced_leaves = pytest.mark.skipif(
    not oracle.RECENT_JAX, reason="JAX could not select among unreduced arrays"
)


@unreduced_leaves
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("ord", [2, 3])
def test_unreduced_leaf_in_shard_map(dtype, ord):
    parts = oracle.normals((4, 300), dtype)
    whole = oracle.normals((7,), seed=1)

    def clip(parts, whole):
        put_off = jax.lax.pcast(parts[0], "x", to="unreduced")
        tree = {"put off": put_off, "whole": whole}
        clipped, norm = clip_updates(tree, 1.0, ord=ord)
        assert jax.typeof(clipped["put off"]) == jax.typeof(put_off)
        return {**clipped, "put off": jax.lax.psum(clipped["put off"], "x")}, norm

    mapped = jax.shard_map(
        clip,
        mesh=oracle.mesh(),
        in_specs=(P("x"), P()),
        out_specs=P(),
    )
    clipped, norm = jax.jit(mapped)(parts, whole)
    total = np.sum(np.asarray(parts, np.complex128), axis=0)
    tree = {"put off": total, "whole": np.asarray(whole)}
    rounding = 4 * oracle.eps(parts)  # Of four parts, each clipped and rounded.
    np.testing.assert_allclose(norm, oracle.norm(tree, ord), rounding)
    expected = oracle.clipped(tree, 1.0, ord)["put off"]
    actual = np.asarray(clipped["put off"]).astype(np.complex128)
    np.testing.assert_allclose(actual, expected, rounding, rounding / 10)


@unreduced_leaves
@pytest.mark.parametrize("ord", [2, 3])
def test_unreduced_and_reduced_leaves_under_explicit_jit(ord):
    mesh = oracle.mesh(AxisType.Explicit)
    x, y = map(np.array, oracle.normals([(8, 6), (8, 5)]))

    def clip(x, y):
        product = jnp.einsum("ni,nj->ij", x, y, out_sharding=P(unreduced={"x"}))
        marked = jax.sharding.reshard(jnp.ones(3), P(reduced={"x"}))
        tree = {"product": product, "x": x, "marked": marked}
        clipped, norm = clip_updates(tree, 1.0, ord=ord)
        assert jax.tree.map(jax.typeof, clipped) == jax.tree.map(jax.typeof, tree)
        return jax.sharding.reshard(clipped["product"], P()), norm

    with jax.set_mesh(mesh):
        clipped, norm = jax.jit(clip)(
            *jax.device_put((x, y), NamedSharding(mesh, P("x")))
        )
    tree = {"product": x.T.astype(np.float64) @ y, "x": x, "marked": np.ones(3)}
    np.testing.assert_allclose(norm, oracle.norm(tree, ord), 1e-6)
    expected = oracle.clipped(tree, 1.0, ord)["product"]
    np.testing.assert_allclose(clipped, expected, 1e-4, 1e-6)
