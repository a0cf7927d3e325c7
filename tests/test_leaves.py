"""What counts as a leaf, and the errors that name one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    leaf_norms,
    skip_by_global_norm,
)

FUNCTIONS = {
    "global_norm": global_norm,
    "leaf_norms": leaf_norms,
    "clip_updates": lambda updates: clip_updates(updates, 1.0),
    "update": lambda updates: clip_by_global_norm(1.0).update(updates, None),
    "jit": lambda updates: jax.jit(global_norm)(updates),
}

BAD = {
    "int array": (jnp.arange(3), r"int32\[3\]"),
    "bool array": (jnp.ones((2, 3), bool), r"bool\[2,3\]"),
    "NumPy int array": (np.arange(2), r"int64\[2\]"),
    "Python int": (7, "7, of type int"),
    "Python bool": (True, "True, of type bool"),
    "key": (jax.random.key(0), r"key<fry>\[\]"),
    "str": ("adam", "'adam', of type str"),
    "NumPy str": (np.array(["adam"]), r"<U4\[1\]"),
    "object": (object(), "of type object"),
    "NumPy object": (np.array([None]), r"object\[1\]"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", BAD)
def test_bad_leaves_are_named(function, case):
    leaf, description = BAD[case]
    if function == "jit" and not isinstance(leaf, jax.Array):
        pytest.skip("jax.jit has its own error for what it cannot trace")
    tree = {"layer": [jnp.ones(3), {"step": leaf}], "none": None}
    where = r"updates\['layer'\]\[1\]\['step'\] is "
    with pytest.raises(TypeError, match=f"{where}.*{description}.*optax.masked"):
        FUNCTIONS[function](tree)


def test_a_bad_leaf_may_be_the_whole_tree():
    with pytest.raises(TypeError, match=r"^updates is int32\[3\], but a global norm"):
        global_norm(jnp.arange(3))


class Wrapped:
    """An object that JAX takes for an array, as Flax NNX has them."""

    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return self.array


def test_leaves_that_wrap_an_array():
    clipped, norm = clip_updates([Wrapped(jnp.array([3.0, 4.0]))], 1.0)
    assert norm == 5
    np.testing.assert_allclose(clipped[0], [0.6, 0.8], 1e-6)


def test_wrapped_array_keeps_its_dtype():
    weak = jnp.asarray(1.5)
    with jax.enable_x64(True):
        clipped, norm = clip_updates([Wrapped(weak)], 1.0)
    assert (clipped[0].dtype, norm.dtype) == (jnp.float32, jnp.float32)


def test_wrapped_float0_array_is_passed_through():
    float0 = np.zeros(2, jax.dtypes.float0)
    tree = [Wrapped(float0), jnp.array([3.0, 4.0])]
    assert leaf_norms(tree) == [0, 5]
    tx = skip_by_global_norm(optax.identity(), 10.0)
    updates, _ = tx.update(tree, None)
    assert (updates[0].dtype, updates[0].shape) == (float0.dtype, (2,))


def test_eight_bit_floats():
    leaf = jnp.array([3.0, 4.0], jnp.float8_e4m3fn)
    clipped, norm = clip_updates([leaf], 2.5)
    assert (norm, norm.dtype) == (5, jnp.float32)
    assert clipped[0].dtype == leaf.dtype
    np.testing.assert_array_equal(clipped[0].astype(jnp.float32), [1.5, 2])


def test_structure_is_kept():
    tree = {"t": (jnp.ones(1), None), "m": optax.MaskedNode(), "l": [[], jnp.ones(2)]}
    clipped, _ = clip_updates(tree, 1.0)
    assert jax.tree.structure(clipped) == jax.tree.structure(tree)
