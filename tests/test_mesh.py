"""Manual mesh axes: read off the leaves where JAX knows them, else named."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from optax_globalclip import clip_updates, global_norm, leaf_norms

TREE = {"split": jnp.arange(16.0), "whole": jnp.array([3.0, -4.0])}
SPECS = {"split": P("data"), "whole": P()}


def shard_map(function, out_specs, **options):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        function, mesh=mesh, in_specs=(SPECS,), out_specs=out_specs, **options
    )


@pytest.mark.parametrize("ord", [1, 2, 3, np.inf])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_found_from_the_leaves(ord, scale):
    tree = jax.tree.map(lambda leaf: leaf * scale, TREE)

    def measure(tree):
        clipped, norm = clip_updates(tree, scale, ord=ord)
        return clipped, norm, leaf_norms(tree, ord=ord)

    clipped, norm, norms = shard_map(measure, (SPECS, P(), P()))(tree)
    np.testing.assert_allclose(norm, oracle.norm(tree, ord), 1e-6)
    for key, leaf in tree.items():
        np.testing.assert_allclose(norms[key], oracle.norm(leaf, ord), 1e-6)
        expected = oracle.clipped(tree, scale, ord)[key]
        np.testing.assert_allclose(clipped[key], expected, 1e-6)


def test_named_where_leaves_have_no_types():
    def measure(tree):
        names = {"split": "data", "whole": ()}
        return global_norm(tree, axis_name=names)

    norm = shard_map(measure, P(), check_vma=False)(TREE)
    np.testing.assert_allclose(norm, oracle.norm(TREE), 1e-6)


def test_no_names_is_local():
    norms = shard_map(
        lambda tree: global_norm(tree["split"], axis_name=())[None],
        P("data"),
        check_vma=False,
    )(TREE)
    expected = [oracle.norm(shard) for shard in TREE["split"].reshape(8, 2)]
    np.testing.assert_allclose(norms, expected, 1e-6)


@pytest.mark.parametrize("names", ["data", ("data",)])
def test_pmap(names):
    shards = TREE["split"].reshape(8, 2)
    # A leaf that holds no number needs no name.
    tangent = np.zeros(2, jax.dtypes.float0)
    norms = jax.pmap(
        lambda x: global_norm([x, tangent], axis_name=names), axis_name="data"
    )(shards)
    np.testing.assert_allclose(norms, [oracle.norm(shards)] * 8, 1e-6)


def test_gradient_is_that_of_one_device():
    gradient = shard_map(jax.grad(global_norm), SPECS)(TREE)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf) / oracle.norm(TREE), TREE)
    for key, leaf in expected.items():
        np.testing.assert_allclose(gradient[key], leaf, 1e-5)
