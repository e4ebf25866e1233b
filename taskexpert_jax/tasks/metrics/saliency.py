"""F-measure and mean absolute error of saliency maps, pooled over the valid pixels of the set."""

import math
from typing import Any

import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.tasks.losses import valid_pixels
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, Sum, histogram, ratio

BETA_SQUARED = 0.3
THRESHOLDS = tuple(k / 20 for k in range(1, 20))  # 0.05 .. 0.95
LEVELS = len(THRESHOLDS) + 1


@flax.struct.dataclass
class Saliency(PooledMetric):
    """Counts of valid pixels, (2, 20), by label (background, foreground) and number of thresholds the score exceeds.

    levels: the score is the foreground probability.
    squashed_levels: the score is sigmoid(probability), as in the family's evaluation. It lies in [0.5, 0.74], so only
        five binary maps differ: all foreground, and probability > 0.20, 0.41, 0.62, 0.85 (thresholds 0.55 .. 0.7).
    errors: sum of |probability - label|.
    """

    levels: Count
    squashed_levels: Count
    errors: Sum

    @classmethod
    def sums(cls, prediction: Array, label: Array, mask: Array | None) -> dict[str, Any]:
        """State of a batch.

        prediction (B, H, W, 2) logits of background and foreground, label (B, H, W, 1) 0 or 1, 255 = ignored.
        """
        valid = valid_pixels(label, mask)
        foreground = label[..., 0] == 1
        probability = jax.nn.sigmoid(prediction[..., 1].astype(jnp.float32) - prediction[..., 0].astype(jnp.float32))

        def by_level(score: Array) -> Count:
            level = jnp.zeros(score.shape, jnp.int32)
            for threshold in THRESHOLDS:
                level += score > threshold
            cell = jnp.where(valid, foreground * LEVELS + level, 2 * LEVELS)
            return Count.of(histogram(cell, 2 * LEVELS).reshape(2, LEVELS))

        return {
            "levels": by_level(probability),
            "squashed_levels": by_level(jax.nn.sigmoid(probability)),
            "errors": Sum.of(jnp.abs(probability - foreground), valid),
        }

    @classmethod
    def zeros(cls) -> dict[str, Any]:
        return {"levels": Count.zeros((2, LEVELS)), "squashed_levels": Count.zeros((2, LEVELS)), "errors": Sum.zeros()}

    def values(self) -> dict[str, float]:
        """`maxF` and `maxF_plain` in percent; `mae`, the mean absolute error of the probability, in [0, 1].

        The two differ only in the thresholded score: sigmoid(probability) for maxF, as in the family's published
        numbers, and the probability for maxF_plain.
        """
        levels = self.levels.value()
        return {
            "maxF": _max_f(self.squashed_levels.value()),
            "maxF_plain": _max_f(levels),
            "mae": ratio(self.errors.value(), levels.sum()),
        }


def _max_f(levels: np.ndarray) -> float:
    """Best F over the thresholds, in percent, from counts by label and level, (2, 20).

    0 without foreground, NaN without any pixel.
    """
    if not levels.any():
        return math.nan
    above = levels.astype(np.float64)[:, ::-1].cumsum(axis=1)[:, :-1]  # (2, 19), from the highest threshold down
    found = above[1]
    precision = found / np.maximum(above.sum(axis=0), 1)
    recall = found / max(float(levels[1].sum()), 1.0)
    weighted = BETA_SQUARED * precision + recall
    return float(100 * np.max((1 + BETA_SQUARED) * precision * recall / np.where(weighted > 0, weighted, 1)))
