"""Boundary benchmark (odsF) without MATLAB: the counts of an image, from its prediction and label.

Non-maximum suppression reduces a predicted map to candidates, which are thresholded at 101 values and thinned. The
remaining pixels are matched one to one with pixels of the true boundary within a maximum distance. Matched pixels are
correct: precision is their share of the predicted pixels, recall their share of the true pixels, over all images of the
set. odsF is the best F over the thresholds.

Source: the MATLAB evaluation of J. Pont-Tuset (SEISM) with P. Dollar's edge code and the matching of the Berkeley
benchmark. Numbers of pixels are identical. The original's matching misses up to 0.5 % of the pairs at random, so its
odsF is up to 0.0008 lower; `most_pairs_outlier_graph` reproduces that.

Only the boundary benchmark needs SciPy and Numba, so other modules import this one lazily.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks.metrics.boundary.candidates import candidates, region_boundaries
from taskexpert_jax.tasks.metrics.boundary.matching import Matcher, most_pairs, most_pairs_outlier_graph
from taskexpert_jax.tasks.metrics.boundary.quantisation import quantise
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

# regions: boundaries are where the label changes. The standard protocol for label maps and for NYUD's edge images too:
#   a one-pixel line moves one pixel up and left, and a thicker line becomes its two sides.
# lines: all pixels that are not 0 are boundary, thinned to one pixel.
LabelKind = Literal["regions", "lines"]


def true_boundary(label: np.ndarray, kind: LabelKind = "regions") -> np.ndarray:
    """Thin boundary of a label, (H, W) integers to (H, W) bool; for `kind` see `LabelKind`."""
    return thin(region_boundaries(label) if kind == "regions" else label != 0)


def image_counts(
    prediction: np.ndarray,
    label: np.ndarray,
    max_dist: float,
    *,
    kind: LabelKind = "regions",
    matcher: Matcher = most_pairs,
) -> BoundaryCounts:
    """Counts of one image at all THRESHOLDS, (1, 101).

    Args:
      prediction: (H, W) uint8, see `quantise`.
      label: (H, W) integers.
      max_dist: maximum matching distance as a fraction of the diagonal: 0.011 on NYUD, 0.0075 on PASCAL-Context.
      kind: interpretation of the label, see `LabelKind`.
      matcher: matching algorithm, see `matching`.

    Raises:
      UserError: the prediction is not (H, W) uint8, its size differs from the label's (the original rotates it
        instead), or the image is smaller than 2x2.
    """
    if prediction.ndim != 2 or prediction.dtype != np.uint8:
        raise UserError(f"a boundary prediction must be uint8 (H, W), not {prediction.dtype} {prediction.shape}")
    if prediction.shape != label.shape:
        raise UserError(f"boundary prediction of shape {prediction.shape}, but label of {label.shape}: resize it")
    if min(label.shape) < 2:
        raise UserError(f"label of shape {label.shape}: the boundary benchmark needs at least 2x2 pixels")
    # A strength equal to a threshold, both in float32, is not above it.
    levels = np.searchsorted(THRESHOLDS.astype(np.float32), candidates(prediction), side="left")
    distance = max_dist * float(np.hypot(*label.shape))
    return level_counts(levels, THRESHOLDS.size, [true_boundary(label, kind)], distance, matcher)


def level_counts(
    levels: np.ndarray, thresholds: int, truths: Sequence[np.ndarray], distance: float, matcher: Matcher = most_pairs
) -> BoundaryCounts:
    """Counts of one image from its thresholded, not yet thinned prediction, (1, thresholds).

    Args:
      levels: (H, W) integers, the number of the ascending thresholds that each pixel passes.
      thresholds: number of thresholds.
      truths: thin (H, W) bool boundary of each annotator. A predicted pixel is correct if it is matched in any of them;
        counts of true pixels are summed over them.
      distance: maximum matching distance in pixels, inclusive.
      matcher: matching algorithm, see `matching`.
    """
    occurs = np.bincount(levels.ravel(), minlength=thresholds + 1) > 0
    minima = np.flatnonzero(occurs[1:])[::-1] + 1  # of distinct maps only, so that none is thinned and matched twice
    maps = thin_levels(levels, minima)
    matched = [matcher(maps, truth, distance) for truth in truths]
    correct = np.any(matched, axis=0)
    # Threshold k uses the last map whose minimum is at least k + 1; index 0 stands for the empty map.
    map_of = np.searchsorted(-minima, -np.arange(1, thresholds + 1), side="right")

    def by_threshold(flags: np.ndarray) -> np.ndarray:
        below = np.concatenate([[0], np.cumsum(flags)])
        return np.concatenate([[0], np.diff(below[maps.starts])])[map_of][None]

    found, predicted = by_threshold(correct), by_threshold(np.ones_like(correct))
    recalled = np.sum([by_threshold(flags) for flags in matched], axis=0)
    return BoundaryCounts(recalled, np.full_like(found, np.sum(truths)), found, predicted)
