"""Intervals hold against what the formulas give."""

import math

import numpy as np
import pytest

from benchmarks import intervals


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (20, 20)])
def test_of_a_share_is_wilsons(successes, trials):
    z, p = 1.959964, successes / trials
    middle = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    margin = math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    margin *= z / (1 + z**2 / trials)
    expected = (middle - margin, middle + margin)
    found = intervals.of_share(successes, trials)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6)


def test_of_a_mean_is_students():
    found = intervals.of_mean(np.array([1.0, 2.0, 3.0, 4.0]))
    margin = 3.182446 * math.sqrt(5 / 3) / 2  # t of 3 degrees of freedom.
    np.testing.assert_allclose(found, (2.5 - margin, 2.5 + margin), 1e-5)
