"""The boundary benchmark of Berkeley (BSDS500): several annotators, and no suppression of the prediction.

Source: `evaluation_bdry_image` and `collect_eval_bdry` of its MATLAB code. The matching is the same as in the field's
multi-task benchmarks, so its published counts are a check of ours.
"""

from collections.abc import Sequence

import numpy as np

from taskexpert_jax.tasks.metrics.boundary.counts import level_counts
from taskexpert_jax.tasks.metrics.boundary.matching import Matcher, shortest_pairs
from taskexpert_jax.tasks.metrics.boundary.scores import BoundaryCounts, curve, f_measure

MAX_DIST = 0.0075  # of the diagonal


def thresholds(count: int = 99) -> np.ndarray:
    """The benchmark's thresholds, evenly spaced in (0, 1); (count,)."""
    return np.linspace(1 / (count + 1), 1 - 1 / (count + 1), count)


def berkeley_counts(
    prediction: np.ndarray, annotations: Sequence[np.ndarray], cuts: np.ndarray, *, matcher: Matcher = shortest_pairs
) -> BoundaryCounts:
    """The counts of one image, (1, K).

    prediction: (H, W) uint8, thin or not; a pixel passes a threshold that it equals.
    annotations: the boundaries of each annotator, (H, W), not 0 on the boundary; they are not thinned.
    cuts: (K,), the thresholds, ascending.
    """
    levels = np.searchsorted(cuts, prediction / 255, side="right")
    distance = MAX_DIST * float(np.hypot(*prediction.shape))
    return level_counts(levels, cuts.size, [annotation != 0 for annotation in annotations], distance, matcher)


def interpolated_odsf(counts: BoundaryCounts, cuts: np.ndarray) -> tuple[float, float]:
    """The best F of the pooled set, in [0, 1], and its threshold; `cuts`: (K,) the thresholds of the counts.

    Between two thresholds precision and recall are taken linear, and F is tried at 100 points.
    """
    precision, recall, _ = curve(counts)
    count = precision.size
    steps = np.arange(count - 1)[:, None] + np.linspace(0, 1, 100)  # (count - 1, 100)
    at, index = steps.ravel(), np.arange(count)
    f = f_measure(np.interp(at, index, precision), np.interp(at, index, recall))
    best = int(f.argmax())
    return float(f[best]), float(np.interp(at[best], index, cuts))
