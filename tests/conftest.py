"""Eight fake devices, every silent conversion an error, and the tiers of the suite."""

import os
import random
from collections import defaultdict
from collections.abc import Iterator

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

# Every new tree compiles, which has no deadline. What lands is judged on fixed trees.
# HYPOTHESIS_PROFILE=many draws as many as .ci/run does, thorough 20,000 of each.
for _profile, _cases in {"few": 5, "many": 12, "thorough": 20_000}.items():
    hypothesis.settings.register_profile(
        _profile,
        deadline=None,
        derandomize="CI" in os.environ,
        max_examples=_cases,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


# Of a table with more rows than this, the default run takes so many, drawn once for
# all. The others are slow. Of a table marked ``whole`` it takes every row.
SAMPLE = 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what is left out of the samples, and what draws its cases."""
    tables = defaultdict(list)
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.drawn)
        marks = {mark.name for mark in item.iter_markers()}
        if isinstance(item, pytest.Function) and not marks & {"slow", "whole"}:
            tables[item.path, item.originalname].append(item)
    for (_, name), table in tables.items():
        taken = random.Random(name).sample(table, min(SAMPLE, len(table)))
        for item in table:
            if item not in taken:
                item.add_marker(pytest.mark.slow)


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
