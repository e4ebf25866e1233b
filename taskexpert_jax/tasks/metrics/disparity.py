"""Disparity errors, pooled over the valid pixels of the set."""

from typing import Any

import flax.struct
from jax import Array
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.tasks.losses import DEPTH_IGNORE, DISPARITY_MAX, valid_depth, valid_pixels
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, Sum, ratio

FAMILY_MAX = 80.0  # pixels; MTMamba's code scores smaller disparities alone, those farther than about 6 m


@flax.struct.dataclass
class Disparity(PooledMetric):
    """Sums over the pixels with a valid label g, 0 < g < 256; negative predictions p count as 0.

    squares: (p - g)^2
    errors: |p - g|
    relatives: |p - g| / g
    pixels: number of pixels
    family_squares, family_pixels: (p - g)^2 and the number of pixels where g < 80
    """

    squares: Sum
    errors: Sum
    relatives: Sum
    pixels: Count
    family_squares: Sum
    family_pixels: Count

    @classmethod
    def sums(cls, prediction: Array, label: Array, mask: Array | None) -> dict[str, Any]:
        """State of a batch; prediction and label (B, H, W, 1) in pixels, -1 = ignored."""
        truth = label[..., 0].astype(jnp.float32)
        valid = valid_pixels(label, mask, DEPTH_IGNORE) & valid_depth(truth, DISPARITY_MAX)
        family = valid & (truth < FAMILY_MAX)
        truth = jnp.where(valid, truth, 1.0)  # avoids division by 0 at ignored pixels
        error = jnp.maximum(prediction[..., 0].astype(jnp.float32), 0.0) - truth
        return {
            "squares": Sum.of(jnp.square(error), valid),
            "errors": Sum.of(jnp.abs(error), valid),
            "relatives": Sum.of(jnp.abs(error) / truth, valid),
            "pixels": Count.of_pixels(valid),
            "family_squares": Sum.of(jnp.square(error), family),
            "family_pixels": Count.of_pixels(family),
        }

    @classmethod
    def zeros(cls) -> dict[str, Any]:
        sums = {name: Sum.zeros() for name in ("squares", "errors", "relatives", "family_squares")}
        return {**sums, "pixels": Count.zeros(), "family_pixels": Count.zeros()}

    def values(self) -> dict[str, float]:
        """`rmse_80` (g < 80), `rmse` and `abs_err` in pixels; `abs_rel`."""
        pixels, family_pixels = int(self.pixels.value()), int(self.family_pixels.value())
        return {
            "rmse_80": float(np.sqrt(ratio(self.family_squares.value(), family_pixels))),
            "rmse": float(np.sqrt(ratio(self.squares.value(), pixels))),
            "abs_err": ratio(self.errors.value(), pixels),
            "abs_rel": ratio(self.relatives.value(), pixels),
        }
