"""Eight fake devices, and every silent conversion an error, for the whole suite."""

from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every new tree compiles, which has no deadline.
hypothesis.settings.register_profile("compiling", deadline=None)
hypothesis.settings.load_profile("compiling")


@pytest.fixture
def optax_promotes() -> Iterator[None]:
    """For tests that run arithmetic of Optax's own, which mixes floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
