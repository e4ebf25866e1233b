"""Angles between predicted and true surface normals, pooled over the valid pixels of the set."""

import math
from typing import Any

import flax.struct
from jax import Array
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.tasks.losses import unit_length, valid_pixels
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, Sum, histogram, ratio

BINS_PER_DEGREE = 20  # bins of 0.05 degrees
BINS = 180 * BINS_PER_DEGREE
LIMITS = (11.25, 22.5, 30.0)  # degrees; edges of bins


@flax.struct.dataclass
class Normals(PooledMetric):
    """Sums over the valid pixels.

    angles: angle between prediction and label in degrees.
    squares: its square.
    bins: (3600,) histogram of the angles, in bins of 0.05 degrees.
    """

    angles: Sum
    squares: Sum
    bins: Count

    @classmethod
    def sums(cls, prediction: Array, label: Array, mask: Array | None) -> dict[str, Any]:
        """State of a batch; prediction and label (B, H, W, 3) of any length, labels with a component 255 are ignored.

        A prediction of length 0 counts as an error of 90 degrees. The family maps predictions to (n + 1) * 255 / 2 and
        back without rounding, which changes only the last digits.
        """
        valid = valid_pixels(label, mask)
        truth = unit_length(label.astype(jnp.float32))
        predicted = unit_length(prediction.astype(jnp.float32))
        # Unlike the arc cosine of the dot product, accurate near 0 and 180 degrees too.
        apart = jnp.linalg.norm(predicted - truth, axis=-1)
        angle = jnp.rad2deg(2.0 * jnp.arctan2(apart, jnp.linalg.norm(predicted + truth, axis=-1)))
        index = jnp.minimum((angle * BINS_PER_DEGREE).astype(jnp.int32), BINS - 1)
        return {
            "angles": Sum.of(angle, valid),
            "squares": Sum.of(jnp.square(angle), valid),
            "bins": Count.of(histogram(jnp.where(valid, index, BINS), BINS)),
        }

    @classmethod
    def zeros(cls) -> dict[str, Any]:
        return {"angles": Sum.zeros(), "squares": Sum.zeros(), "bins": Count.zeros((BINS,))}

    def values(self) -> dict[str, float]:
        """`mean`, `rmse`, `median` in degrees; `within_11.25`, `within_22.5`, `within_30`: percent of smaller angles.

        The median is interpolated within its histogram bin, so its error is below 0.05 degrees.
        """
        bins = self.bins.value()
        pixels = int(bins.sum())
        within = {f"within_{limit:g}": bins[: round(limit * BINS_PER_DEGREE)].sum() for limit in LIMITS}
        return {
            "mean": ratio(self.angles.value(), pixels),
            "rmse": float(np.sqrt(ratio(self.squares.value(), pixels))),
            "median": _median(bins),
            **{name: 100 * ratio(count, pixels) for name, count in within.items()},
        }


def _median(bins: np.ndarray) -> float:
    """Median of a histogram of angles, in degrees; NaN without pixels."""
    below = np.cumsum(bins, dtype=np.float64)
    half = below[-1] / 2
    if half == 0:
        return math.nan
    index = int(np.searchsorted(below, half))  # first bin whose cumulative count reaches half
    count = float(bins[index])
    return (index + 1 - (float(below[index]) - float(half)) / count) / BINS_PER_DEGREE
