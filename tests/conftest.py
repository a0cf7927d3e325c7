"""Eight fake devices, and every silent conversion an error, for the whole suite."""

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Every new tree compiles, which has no deadline. What lands is judged on fixed trees.
hypothesis.settings.register_profile(
    "compiling", deadline=None, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("compiling")


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """No dtype and no rank changes but where the code says so."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def optax_promotes() -> Iterator[None]:
    """For tests that run arithmetic of Optax's own, which mixes floats and integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield
