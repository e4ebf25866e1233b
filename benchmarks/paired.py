"""Paired comparison of two models over seeds: the mean difference and its confidence interval."""

from collections.abc import Sequence
import math

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean of paired differences, one a seed, and the half-width of its confidence interval (Student's t).

    One difference has no spread, so its half-width is NaN. A NaN among the differences makes both NaN.

    Raises:
      ValueError: no differences.
    """
    if not differences:
        raise ValueError("no differences: a paired comparison needs at least one seed that both sides have")
    count, mean = len(differences), float(np.mean(differences))
    if count == 1:
        return mean, math.nan
    quantile = stats.t.ppf((1 + confidence) / 2, count - 1)
    return mean, float(quantile * np.std(differences, ddof=1) / math.sqrt(count))


def differs(differences: Sequence[float]) -> bool:
    """Answers whether the interval excludes zero; False where it is not known: one seed, a NaN."""
    mean, half = interval(differences)
    return abs(mean) > half
