"""Intervals of 95% around what a study found at a few seeds."""

import numpy as np
import scipy.stats

LEVEL = 0.95


def of_share(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's interval around the share of trials that succeeded."""
    found = scipy.stats.binomtest(successes, trials)
    interval = found.proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def of_mean(values: np.ndarray) -> tuple[float, float]:
    """Student's interval around the mean of values, of which there are two or more."""
    margin = scipy.stats.sem(values) * scipy.stats.t.ppf(
        (1 + LEVEL) / 2, len(values) - 1
    )
    return float(np.mean(values) - margin), float(np.mean(values) + margin)
