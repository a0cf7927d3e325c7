"""Sparse leaves: the norm of the matrix, and its values scaled."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import sparse
from jax.sharding import PartitionSpec as P

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    skip_by_global_norm,
)


def rows_of(num_rows, width, indices, dtype="float32", seed=0, **flags):
    """Some rows of a matrix, as TensorFlow's IndexedSlices, perhaps one twice."""
    data = oracle.normals((len(indices), width), dtype, seed)
    indices = jnp.asarray(indices, jnp.int32)[:, None]
    return sparse.BCOO((data, indices), shape=(num_rows, width), **flags)


def batched():
    indices = jnp.array([[[0], [3], [0]], [[2], [2], [2]]])
    return sparse.BCOO((oracle.normals((2, 3, 4)), indices), shape=(2, 5, 4))


def compressed():
    indices, starts = jnp.array([0, 0, 2, 1]), jnp.array([0, 3, 3, 4])
    return sparse.BCSR((oracle.normals((4,)), indices, starts), shape=(3, 3))


MATRICES = {
    "rows": lambda: rows_of(10, 4, [1, 7, 1, 3, 1]),
    "no row twice": lambda: rows_of(10, 4, [1, 7, 3]),
    "unique": lambda: rows_of(10, 4, [1, 3, 7], unique_indices=True),
    "entries": lambda: sparse.BCOO.fromdense(jnp.triu(oracle.normals((5, 5)))),
    "padded": lambda: sparse.BCOO.fromdense(jnp.triu(oracle.normals((5, 5))), nse=20),
    "batched": batched,
    "compressed": compressed,
    "compressed, batched": lambda: sparse.BCSR.fromdense(
        oracle.normals((2, 3, 4)), n_batch=1
    ),
    "bfloat16": lambda: rows_of(10, 4, [1, 7, 1], "bfloat16"),
    "complex64": lambda: rows_of(10, 4, [1, 7, 1], "complex64"),
    "nothing": lambda: rows_of(10, 4, []),
}
each_matrix = pytest.mark.parametrize("matrix", MATRICES)
each_compiled = pytest.mark.parametrize(
    "compile",
    [pytest.param(lambda f: f, id="eager", marks=pytest.mark.slow), jax.jit],
)


def dense(matrix):
    """In float64, so that its sums of what is there twice are exact."""
    (data, *indices), treedef = jax.tree.flatten(matrix)
    wide = np.complex128 if jnp.iscomplexobj(data) else np.float64
    with jax.enable_x64(True):
        data = jnp.asarray(np.asarray(data).astype(wide))
        return np.asarray(treedef.unflatten([data, *indices]).todense())


@each_matrix
@each_compiled
def test_norm_is_that_of_the_matrix(matrix, compile):
    matrix = MATRICES[matrix]()
    tree = {"sparse": matrix, "dense": jnp.array([3.0, 4.0]), "none": None}
    expected = oracle.norm([dense(matrix), [3.0, 4.0]])
    tolerance = max(1e-6, oracle.eps(matrix))
    np.testing.assert_allclose(compile(global_norm)(tree), expected, tolerance)
    norms = compile(leaf_norms)(tree)
    assert norms["none"] is None
    np.testing.assert_allclose(norms["sparse"], oracle.norm(dense(matrix)), tolerance)


@each_matrix
@each_compiled
def test_values_are_scaled_and_all_else_stays(matrix, compile):
    matrix = MATRICES[matrix]()
    tree = {"sparse": matrix, "dense": jnp.array([3.0, 4.0])}
    clipped, norm = compile(lambda tree: clip_updates(tree, 0.5))(tree)
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
    found, expected = jax.tree.leaves(clipped["sparse"]), jax.tree.leaves(matrix)
    for indices, same in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(indices, same)
    assert found[0].dtype == expected[0].dtype
    scaled = np.asarray(expected[0]).astype(np.complex128) * (0.5 / float(norm))
    tolerance = max(1e-6, oracle.eps(matrix))
    np.testing.assert_allclose(np.asarray(found[0]).astype(complex), scaled, tolerance)
    np.testing.assert_allclose(
        oracle.norm([dense(clipped["sparse"]), clipped["dense"]]), 0.5, tolerance
    )


def test_unique_indices_are_trusted():
    twice = rows_of(10, 1, [2, 2])
    trusted = rows_of(10, 1, [2, 2], unique_indices=True)
    np.testing.assert_allclose(global_norm(trusted), oracle.norm(twice.data), 1e-6)
    np.testing.assert_allclose(global_norm(twice), abs(dense(twice)).max(), 1e-6)


def test_values_that_cancel_have_no_norm():
    data = jnp.array([[3.0], [-3.0]])
    leaf = sparse.BCOO((data, jnp.array([[1], [1]])), shape=(4, 1))
    clipped, norm = clip_updates(leaf, 0.0)
    assert norm == 0
    np.testing.assert_array_equal(clipped.data, data)


@pytest.mark.parametrize("nonfinite", ["nan", "zero"])
def test_non_finite_values(nonfinite):
    leaf = rows_of(10, 2, [1, 2, 1])
    leaf = sparse.BCOO((leaf.data.at[0].set(np.inf), leaf.indices), shape=leaf.shape)
    clipped, _ = clip_updates([leaf, jnp.ones(2)], 1.0, nonfinite=nonfinite)
    expected = np.nan if nonfinite == "nan" else 0
    np.testing.assert_array_equal(clipped[0].data, np.full((3, 2), expected))
    np.testing.assert_array_equal(clipped[0].indices, leaf.indices)
    np.testing.assert_array_equal(clipped[1], np.full(2, expected))


def test_skip_keeps_the_indices():
    leaf = rows_of(10, 2, [1, 2, 1])
    tx = skip_by_global_norm(clip_by_global_norm(1.0), 1e-3)
    updates, state = tx.update({"e": leaf}, tx.init(None))
    np.testing.assert_array_equal(updates["e"].indices, leaf.indices)
    assert not updates["e"].data.any()
    assert state.num_skipped == 1


def test_gradient_through_the_clip():
    leaf = rows_of(10, 2, [1, 2, 1])
    weights = oracle.normals((3, 2), seed=1)

    def weighted(data, clip):
        matrix = sparse.BCOO((data, leaf.indices), shape=leaf.shape)
        return jnp.sum(weights * clip(matrix))

    def by_hand(matrix):
        return matrix.data / jnp.sqrt(jnp.sum(jnp.square(matrix.todense())))

    found = jax.grad(weighted)(leaf.data, lambda m: clip_updates(m, 1.0)[0].data)
    np.testing.assert_allclose(
        found, jax.grad(weighted)(leaf.data, by_hand), 1e-4, 1e-6
    )


def test_cotangent_without_indices():
    leaf = rows_of(10, 2, [1, 2, 3])
    grads = jax.grad(lambda m: jnp.sum(m.todense() ** 2), allow_int=True)(leaf)
    np.testing.assert_allclose(global_norm(grads), 2 * oracle.norm(leaf.data), 1e-6)
    clipped, _ = clip_updates(grads, 1.0)
    assert clipped.indices.dtype == jax.dtypes.float0
    np.testing.assert_allclose(oracle.norm(clipped.data), 1, 1e-6)


def test_vmap():
    leaf = batched()
    norms = jax.vmap(global_norm)(leaf)
    np.testing.assert_allclose(norms, [oracle.norm(each) for each in dense(leaf)], 1e-6)


@pytest.mark.parametrize("names", [None, {"rows": "x", "bias": ()}])
def test_shards_of_rows(names):
    """Each device holds other rows of the matrix, and perhaps one of them twice."""
    num_rows = np.arange(8).repeat(3)
    whole = rows_of(8, 4, num_rows)
    specs = {"rows": P("x"), "bias": P()}

    def clip(data):
        rows = sparse.BCOO(
            (data["rows"], jnp.repeat(jnp.arange(2), 3)[:, None]), shape=(2, 4)
        )
        updates, norm = clip_updates(data | {"rows": rows}, 1.0, axis_name=names)
        return updates | {"rows": updates["rows"].data}, norm

    mapped = jax.shard_map(
        clip,
        mesh=oracle.mesh(),
        in_specs=(specs,),
        out_specs=(specs, P()),
        check_vma=names is None,
    )
    data = {"rows": whole.data, "bias": jnp.array([3.0, 4.0])}
    clipped, norm = jax.jit(mapped)(data)
    expected = oracle.norm([dense(whole), data["bias"]])
    np.testing.assert_allclose(norm, expected, 1e-6)
    np.testing.assert_allclose(clipped["rows"], data["rows"] / expected, 1e-5)


def test_other_formats_are_named():
    leaf = sparse.CSR.fromdense(jnp.eye(3))
    with pytest.raises(TypeError, match=r"updates\['e'\] is a CSR.*BCOO.fromdense"):
        global_norm({"e": leaf})
    integers = sparse.BCOO.fromdense(jnp.eye(3, dtype=jnp.int32))
    with pytest.raises(TypeError, match=r"updates\['e'\] is int32\[3,3\]"):
        global_norm({"e": integers})


@pytest.mark.slow
def test_embedding_trained_with_sparse_gradients():
    """Equal to its dense twin, step by step."""
    tx = clip_by_global_norm(0.5)
    rng = np.random.default_rng(0)
    targets = jnp.asarray(rng.standard_normal((20, 4)), jnp.float32)

    def loss_of(rows, batch):
        return jnp.mean(jnp.sum((rows - targets[batch]) ** 2, axis=1))

    @jax.jit
    def sparse_step(table, state, batch):
        grads = jax.grad(loss_of)(table[batch], batch)
        grads = sparse.BCOO((grads, batch[:, None]), shape=table.shape)
        updates, state = tx.update({"table": grads}, state)
        update = updates["table"]
        return table.at[update.indices[:, 0]].add(-update.data), state

    @jax.jit
    def dense_step(table, state, batch):
        grads = jax.grad(lambda table: loss_of(table[batch], batch))(table)
        updates, state = tx.update({"table": grads}, state)
        return table - updates["table"], state

    tables = [jnp.zeros((20, 4))] * 2
    states = [tx.init(None)] * 2
    losses = []
    for _ in range(60):
        batch = jnp.asarray(rng.integers(20, size=16))
        for i, step in enumerate((sparse_step, dense_step)):
            tables[i], states[i] = step(tables[i], states[i], batch)
        np.testing.assert_allclose(states[0].global_norm, states[1].global_norm, 1e-5)
        losses.append(loss_of(tables[0], jnp.arange(20)))
    np.testing.assert_allclose(tables[0], tables[1], 1e-4, 1e-6)
    assert losses[-1] < 0.5 * losses[0]
    assert 0 < states[0].num_clipped


@pytest.mark.slow
def test_row_sparse_gradients_of_jax():
    """What ``jax.experimental.sparse.grad`` returns, beside a dense leaf."""
    matrix = sparse.BCOO.fromdense(jnp.triu(oracle.normals((5, 5))))
    vector = oracle.normals((5,), seed=1)

    def loss_of(params):
        return jnp.sum((params["matrix"] @ params["vector"]) ** 2)

    params = {"matrix": matrix, "vector": vector}
    grads = jax.jit(sparse.grad(loss_of))(params)
    clipped, norm = clip_updates(grads, 1.0)
    expected = jax.grad(loss_of)(params | {"matrix": matrix.todense()})
    expected["matrix"] = jnp.triu(expected["matrix"])
    np.testing.assert_allclose(norm, oracle.norm(expected), 1e-5)
    np.testing.assert_allclose(
        clipped["matrix"].todense(), expected["matrix"] / norm, 1e-4, 1e-6
    )
