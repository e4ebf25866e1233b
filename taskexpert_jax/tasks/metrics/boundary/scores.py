"""Step 5 of the boundary benchmark: precision, recall and F from counts of boundary pixels."""

from collections.abc import Iterable
import dataclasses
import math
from typing import NamedTuple, Self

import numpy as np

THRESHOLDS = np.array([0.001, *(k / 100 for k in range(1, 100)), 0.999])  # (101,)


@dataclasses.dataclass(frozen=True, eq=False)
class BoundaryCounts:
    """Boundary pixels of each image at each threshold; (images, thresholds) int64 each, with the benchmark's names.

    cntR, sumR: matched true pixels, all true pixels.
    cntP, sumP: matched predicted pixels, all predicted pixels.
    """

    cntR: np.ndarray
    sumR: np.ndarray
    cntP: np.ndarray
    sumP: np.ndarray

    @classmethod
    def empty(cls, thresholds: int = THRESHOLDS.size) -> Self:
        """Counts of no image."""
        return cls(*np.zeros((4, 0, thresholds), np.int64))

    @classmethod
    def join(cls, parts: Iterable["BoundaryCounts"]) -> Self:
        """Concatenates the images of all parts, at least one, in order."""
        return cls(*np.concatenate([part.table() for part in parts], axis=1))

    def merge(self, other: "BoundaryCounts") -> Self:
        """Images of both."""
        return self.join([self, other])

    def pooled(self) -> "BoundaryCounts":
        """Sums over the images, as counts of a single image."""
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
    """F-measure, the harmonic mean of precision and recall; 0 where both are 0."""
    total = precision + recall
    return 2 * precision * recall / np.where(total > 0, total, 1)


def image_curves(counts: BoundaryCounts) -> Curve:
    """Curve of every image, (images, thresholds) each.

    Without true pixels recall is 1 and precision 0; without predicted pixels recall is 0 and precision 1; F is then 0.
    """
    no_truth, no_prediction = counts.sumR == 0, counts.sumP == 0
    recall = np.where(no_truth, 1.0, counts.cntR / np.where(no_truth, 1, counts.sumR))
    precision = np.where(no_truth, 0.0, counts.cntP / np.where(no_prediction, 1, counts.sumP))
    recall, precision = np.where(no_prediction, 0.0, recall), np.where(no_prediction, 1.0, precision)
    return Curve(precision, recall, f_measure(precision, recall))


def curve(counts: BoundaryCounts) -> Curve:
    """Curve of the set, with pixels pooled over the images; (thresholds,) each. NaN without any image."""
    if not len(counts.sumR):
        return Curve(*np.full((3, counts.sumR.shape[1]), np.nan))
    return Curve(*(values[0] for values in image_curves(counts.pooled())))


def odsf(counts: BoundaryCounts) -> float:
    """Best F with one threshold for the whole set (ODS), in [0, 1].

    0 without predicted or without true boundaries, NaN without any image.
    """
    return float(curve(counts).f.max())


def oisf(counts: BoundaryCounts) -> float:
    """F of the pooled set with the best threshold for each image (OIS), in [0, 1]; ties go to the lowest threshold."""
    best = image_curves(counts).f.argmax(axis=1)[:, None]
    return odsf(BoundaryCounts(*(np.take_along_axis(field, best, axis=1) for field in counts.table())))


def average_precision(counts: BoundaryCounts) -> float:
    """Mean precision over the recalls 0, 0.01 .. 1, in [0, 1]; 0 at recalls outside of the set's curve.

    NaN without any image. Precision is interpolated linearly in recall. As in the original, the sum of the 101 values
    is divided by 100.
    """
    precision, recall, _ = curve(counts)
    reached, first = np.unique(recall, return_index=True)
    if reached.size < 2:
        return math.nan if np.isnan(reached).all() else 0.0
    return float(np.interp(np.arange(101) / 100, reached, precision[first], left=0, right=0).sum() / 100)


def scores(counts: BoundaryCounts, thresholds: np.ndarray = THRESHOLDS) -> dict[str, float]:
    """`odsF`, `oisF`, `AP` in percent; `odsF_precision`, `odsF_recall` in percent at `odsF_threshold`, in [0, 1].

    Ties go to the lowest threshold. All are NaN without any image.
    """
    precision, recall, f = curve(counts)
    best = int(f.argmax())
    return {
        "odsF": 100 * float(f[best]),
        "oisF": 100 * oisf(counts),
        "AP": 100 * average_precision(counts),
        "odsF_precision": 100 * float(precision[best]),
        "odsF_recall": 100 * float(recall[best]),
        "odsF_threshold": float(thresholds[best]) if len(counts.sumR) else math.nan,
    }
