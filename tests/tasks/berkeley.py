"""Berkeley's boundary benchmark (BSDS500): several annotators, no non-maximum suppression of the prediction.

Source: `evaluation_bdry_image` and `collect_eval_bdry` of its MATLAB code. The matching is that of the multi-task
benchmarks, so its published counts are an independent check of `taskexpert_jax`'s matching.
"""

from collections.abc import Sequence

import numpy as np

from taskexpert_jax.tasks.metrics.boundary.counts import level_counts
from taskexpert_jax.tasks.metrics.boundary.matching import Matcher, shortest_pairs
from taskexpert_jax.tasks.metrics.boundary.scores import BoundaryCounts, curve, f_measure

MAX_DIST = 0.0075  # fraction of the diagonal


def thresholds(count: int = 99) -> np.ndarray:
    """Evenly spaced thresholds in (0, 1), (count,)."""
    return np.linspace(1 / (count + 1), 1 - 1 / (count + 1), count)


def berkeley_counts(
    prediction: np.ndarray, annotations: Sequence[np.ndarray], cuts: np.ndarray, *, matcher: Matcher = shortest_pairs
) -> BoundaryCounts:
    """Counts of one image, (1, K).

    prediction: (H, W) uint8, thin or not; a pixel equal to a threshold passes it.
    annotations: boundary map of each annotator, (H, W), non-zero on the boundary; they are not thinned.
    cuts: (K,) thresholds, ascending.
    """
    levels = np.searchsorted(cuts, prediction / 255, side="right")
    distance = MAX_DIST * float(np.hypot(*prediction.shape))
    return level_counts(levels, cuts.size, [annotation != 0 for annotation in annotations], distance, matcher)


def interpolated_odsf(counts: BoundaryCounts, cuts: np.ndarray) -> tuple[float, float]:
    """Best F of the pooled set, in [0, 1], and its threshold; `cuts`: (K,) thresholds of the counts.

    Precision and recall are interpolated linearly between thresholds, and F is evaluated at 100 points per interval.
    """
    precision, recall, _ = curve(counts)
    count = precision.size
    steps = np.arange(count - 1)[:, None] + np.linspace(0, 1, 100)  # (count - 1, 100)
    at, index = steps.ravel(), np.arange(count)
    f = f_measure(np.interp(at, index, precision), np.interp(at, index, recall))
    best = int(f.argmax())
    return float(f[best]), float(np.interp(at[best], index, cuts))
