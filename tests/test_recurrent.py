"""The recurrence of the studies has the gradient of a plain scan."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.recurrent import last_hidden


def plain(recur, read):
    def step(hidden, read):
        return jnp.tanh(hidden @ recur + read), None

    return jax.lax.scan(step, jnp.zeros_like(read[0]), read)[0]


def test_values_and_gradients_are_those_of_a_scan():
    rng = np.random.default_rng(0)
    recur = rng.standard_normal((5, 5)).astype(np.float32) / 2
    read = rng.standard_normal((7, 3, 5)).astype(np.float32)
    weights = rng.standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_allclose(last_hidden(recur, read), plain(recur, read), 1e-6)
    found, expected = (
        jax.grad(lambda *a, f=f: jnp.vdot(weights, f(*a)), argnums=(0, 1))(recur, read)
        for f in (last_hidden, plain)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, 1e-5, 1e-6)
