"""odsF, the boundary benchmark of the field, without MATLAB.

A predicted map is suppressed to thin candidates and cut at 101 thresholds; what is left is thinned and paired with the
pixels of the true boundary, one to one and within a distance. Pixels with a partner are correct: precision is their
share of the predicted ones, recall of the true ones, over all images of the set. odsF is the best F of any threshold.

The original is the MATLAB evaluation of J. Pont-Tuset (SEISM) with P. Dollar's edge code and the matching of the
Berkeley benchmark. The numbers of pixels are its own, and so are those of pairs, but that the original leaves up to
0.5 % of them out at random: its odsF is up to 0.0008 lower. `most_pairs_outlier_graph` does as the original does.

SciPy and Numba, and this module, are needed for nothing else in this package.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks.metrics.boundary.candidates import candidates, region_boundaries
from taskexpert_jax.tasks.metrics.boundary.matching import Matcher, most_pairs, most_pairs_outlier_graph
from taskexpert_jax.tasks.metrics.boundary.scores import (
    THRESHOLDS,
    BoundaryCounts,
    Curve,
    average_precision,
    curve,
    odsf,
    oisf,
    scores,
)
from taskexpert_jax.tasks.metrics.boundary.thinning import thin, thin_levels

__all__ = [
    "THRESHOLDS",
    "BoundaryCounts",
    "Curve",
    "average_precision",
    "curve",
    "image_counts",
    "level_counts",
    "most_pairs",
    "most_pairs_outlier_graph",
    "odsf",
    "oisf",
    "quantise",
    "scores",
    "true_boundary",
]

# regions: boundaries are where the label changes. So the field reads label maps, and NYUD's pictures of edges too: a
#   line of one pixel becomes one that lies a pixel further up and left, a thicker one becomes its two sides.
# lines: whatever is not 0 is a boundary, thinned to one pixel.
LabelKind = Literal["regions", "lines"]


def quantise(probability: np.ndarray) -> np.ndarray:
    """The uint8 prediction of a boundary probability in [0, 1]: 255 times it, rounded to the nearest integer."""
    return np.rint(255 * np.asarray(probability)).astype(np.uint8)


def true_boundary(label: np.ndarray, kind: LabelKind = "regions") -> np.ndarray:
    """The thin boundary of a label, (H, W) integers to (H, W) bool; `LabelKind` says how it is read."""
    return thin(region_boundaries(label) if kind == "regions" else label != 0)


def image_counts(
    prediction: np.ndarray,
    label: np.ndarray,
    max_dist: float,
    *,
    kind: LabelKind = "regions",
    matcher: Matcher = most_pairs,
) -> BoundaryCounts:
    """The counts of one image at all THRESHOLDS, (1, 101).

    Args:
      prediction: (H, W) uint8, see `quantise`.
      label: (H, W) integers.
      max_dist: the largest distance of a pair as a share of the diagonal: 0.011 on NYUD, 0.0075 on PASCAL-Context.
      kind: how the label is read.
      matcher: how pixels are paired.

    Raises:
      UserError: the sizes differ (the original rotates the prediction then, and goes on), or it is not uint8.
    """
    if prediction.ndim != 2 or prediction.dtype != np.uint8:
        raise UserError(f"a boundary prediction is one channel of uint8, not {prediction.dtype} {prediction.shape}")
    if prediction.shape != label.shape:
        raise UserError(f"a prediction of {prediction.shape} for a label of {label.shape} pixels: give it that size")
    if min(label.shape) < 2:
        raise UserError(f"a label of {label.shape} pixels: boundaries need at least 2x2")
    # A strength that equals a threshold, both in float32, is not above it.
    levels = np.searchsorted(THRESHOLDS.astype(np.float32), candidates(prediction), side="left")
    distance = max_dist * float(np.hypot(*label.shape))
    return level_counts(levels, THRESHOLDS.size, [true_boundary(label, kind)], distance, matcher)


def level_counts(
    levels: np.ndarray, thresholds: int, truths: Sequence[np.ndarray], distance: float, matcher: Matcher = most_pairs
) -> BoundaryCounts:
    """The counts of one image whose predicted maps are yet to be thinned, (1, thresholds).

    Args:
      levels: (H, W) integers, how many of the ascending thresholds a pixel passes.
      thresholds: how many there are.
      truths: a thin (H, W) bool boundary by each annotator. A predicted pixel is correct if it has a partner in any of
        them; the true ones are added up.
      distance: the largest distance of a pair in pixels, inclusive.
      matcher: how pixels are paired.
    """
    occurs = np.bincount(levels.ravel(), minlength=thresholds + 1) > 0
    minima = np.flatnonzero(occurs[1:])[::-1] + 1  # of maps that differ: they need not be thinned and matched twice
    maps = thin_levels(levels, minima)
    matched = [matcher(maps, truth, distance) for truth in truths]
    correct = np.any(matched, axis=0)
    # Threshold k has the last map whose minimum is k + 1 or more. Before the first one comes the empty map.
    map_of = np.searchsorted(-minima, -np.arange(1, thresholds + 1), side="right")

    def by_threshold(flags: np.ndarray) -> np.ndarray:
        below = np.concatenate([[0], np.cumsum(flags)])
        return np.concatenate([[0], np.diff(below[maps.starts])])[map_of][None]

    found, predicted = by_threshold(correct), by_threshold(np.ones_like(correct))
    recalled = np.sum([by_threshold(flags) for flags in matched], axis=0)
    return BoundaryCounts(recalled, np.full_like(found, np.sum(truths)), found, predicted)
