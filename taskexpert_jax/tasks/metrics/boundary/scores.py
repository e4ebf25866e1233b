"""Step 5 of the boundary benchmark: from counts of boundary pixels to precision, recall and F."""

from collections.abc import Iterable
import dataclasses
from typing import NamedTuple, Self

import numpy as np

THRESHOLDS = np.array([0.001, *(k / 100 for k in range(1, 100)), 0.999])  # (101,)


@dataclasses.dataclass(frozen=True, eq=False)
class BoundaryCounts:
    """Boundary pixels of each image at each threshold; (images, thresholds) int64 each, under the field's names.

    cntR, sumR: the true ones with a partner, and all of them.
    cntP, sumP: the predicted ones with a partner, and all of them.
    """

    cntR: np.ndarray
    sumR: np.ndarray
    cntP: np.ndarray
    sumP: np.ndarray

    @classmethod
    def empty(cls, thresholds: int = THRESHOLDS.size) -> Self:
        """No image."""
        return cls(*np.zeros((4, 0, thresholds), np.int64))

    @classmethod
    def join(cls, parts: Iterable["BoundaryCounts"]) -> Self:
        """The images of all parts in their order; at least one part."""
        return cls(*np.concatenate([part.table() for part in parts], axis=1))

    def merge(self, other: "BoundaryCounts") -> Self:
        """The images of both."""
        return self.join([self, other])

    def pooled(self) -> "BoundaryCounts":
        """The sums over the images, as those of one image."""
        return BoundaryCounts(*self.table().sum(axis=1, keepdims=True))

    def table(self) -> np.ndarray:
        """cntR, sumR, cntP, sumP in one array, (4, images, thresholds)."""
        return np.stack([self.cntR, self.sumR, self.cntP, self.sumP])


class Curve(NamedTuple):
    """Precision, recall and F in [0, 1], each (..., thresholds) float64."""

    precision: np.ndarray
    recall: np.ndarray
    f: np.ndarray


def f_measure(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """The harmonic mean; 0 where both are 0."""
    total = precision + recall
    return 2 * precision * recall / np.where(total > 0, total, 1)


def image_curves(counts: BoundaryCounts) -> Curve:
    """The curve of every image, (images, thresholds) each.

    Without a true pixel recall is 1 and precision 0; without a predicted pixel recall is 0 and precision 1: F is 0.
    """
    no_truth, no_prediction = counts.sumR == 0, counts.sumP == 0
    recall = np.where(no_truth, 1.0, counts.cntR / np.where(no_truth, 1, counts.sumR))
    precision = np.where(no_truth, 0.0, counts.cntP / np.where(no_prediction, 1, counts.sumP))
    recall, precision = np.where(no_prediction, 0.0, recall), np.where(no_prediction, 1.0, precision)
    return Curve(precision, recall, f_measure(precision, recall))


def curve(counts: BoundaryCounts) -> Curve:
    """The curve of the set, its pixels pooled; (thresholds,) each."""
    return Curve(*(values[0] for values in image_curves(counts.pooled())))


def odsf(counts: BoundaryCounts) -> float:
    """Best F over one threshold for the whole set (ODS), in [0, 1]; 0 where either map has no boundary at all."""
    return float(curve(counts).f.max())


def oisf(counts: BoundaryCounts) -> float:
    """F of the pooled set where every image has the threshold that is best for it (OIS), in [0, 1].

    Of equally good thresholds an image takes the lowest.
    """
    best = image_curves(counts).f.argmax(axis=1)[:, None]
    return odsf(BoundaryCounts(*(np.take_along_axis(field, best, axis=1) for field in counts.table())))


def average_precision(counts: BoundaryCounts) -> float:
    """Mean precision over the recalls 0, 0.01 .. 1, in [0, 1]; 0 for recalls that the set's curve does not reach.

    Between two points of the curve the precision is interpolated. As in the original, the sum of the 101 values is
    divided by 100.
    """
    precision, recall, _ = curve(counts)
    reached, first = np.unique(recall, return_index=True)
    if reached.size < 2:
        return 0.0
    return float(np.interp(np.arange(101) / 100, reached, precision[first], left=0, right=0).sum() / 100)


def scores(counts: BoundaryCounts, thresholds: np.ndarray = THRESHOLDS) -> dict[str, float]:
    """`odsF`, `oisF`, `AP` in percent; `odsF_precision`, `odsF_recall` in percent at `odsF_threshold`, in [0, 1].

    Of equally good thresholds the lowest.
    """
    precision, recall, f = curve(counts)
    best = int(f.argmax())
    return {
        "odsF": 100 * float(f[best]),
        "oisF": 100 * oisf(counts),
        "AP": 100 * average_precision(counts),
        "odsF_precision": 100 * float(precision[best]),
        "odsF_recall": 100 * float(recall[best]),
        "odsF_threshold": float(thresholds[best]),
    }
