"""Depth errors, pooled over the valid pixels of the set."""

import functools
from typing import Any, ClassVar

import flax.struct
from jax import Array
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.tasks.losses import DEPTH_IGNORE, DEPTH_MAX, valid_depth, valid_pixels
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, Sum, ratio

SMALLEST_PREDICTION = 1e-9  # metres; replaces non-positive predictions in logarithms and quotients
DELTA = 1.25


@flax.struct.dataclass
class Depth(PooledMetric):
    """Sums over the pixels with a valid label g (`losses.valid_depth`); negative predictions p count as 0.

    maximum: metres; valid labels are smaller. `depth` gives the metric for another than the family's 80 m.
    squares: (p - g)^2
    errors: |p - g|
    log_squares: (ln p - ln g)^2, with p = 1e-9 where it is not positive
    relatives: |p - g| / g
    relative_squares: (p - g)^2 / g
    within: (3,) number of pixels with max(p / g, g / p) < 1.25^k, k = 1, 2, 3; p as in log_squares
    pixels: number of pixels
    """

    maximum: ClassVar[float] = DEPTH_MAX
    squares: Sum
    errors: Sum
    log_squares: Sum
    relatives: Sum
    relative_squares: Sum
    within: Count
    pixels: Count

    @classmethod
    def sums(cls, prediction: Array, label: Array, mask: Array | None) -> dict[str, Any]:
        """State of a batch; prediction and label (B, H, W, 1) in metres, -1 = ignored."""
        truth = label[..., 0].astype(jnp.float32)
        valid = valid_pixels(label, mask, DEPTH_IGNORE) & valid_depth(truth, cls.maximum)
        truth = jnp.where(valid, truth, 1.0)  # avoids division by 0 at ignored pixels
        depth = prediction[..., 0].astype(jnp.float32)
        error = jnp.maximum(depth, 0.0) - truth
        positive = jnp.where(depth <= 0, SMALLEST_PREDICTION, depth)
        factor = jnp.maximum(positive / truth, truth / positive)
        within = [jnp.sum(valid & (factor < DELTA**k), dtype=jnp.uint32) for k in (1, 2, 3)]
        return {
            "squares": Sum.of(jnp.square(error), valid),
            "errors": Sum.of(jnp.abs(error), valid),
            "log_squares": Sum.of(jnp.square(jnp.log(positive) - jnp.log(truth)), valid),
            "relatives": Sum.of(jnp.abs(error) / truth, valid),
            "relative_squares": Sum.of(jnp.square(error) / truth, valid),
            "within": Count.of(jnp.stack(within)),
            "pixels": Count.of_pixels(valid),
        }

    @classmethod
    def zeros(cls) -> dict[str, Any]:
        return {
            "squares": Sum.zeros(),
            "errors": Sum.zeros(),
            "log_squares": Sum.zeros(),
            "relatives": Sum.zeros(),
            "relative_squares": Sum.zeros(),
            "within": Count.zeros((3,)),
            "pixels": Count.zeros(),
        }

    def values(self) -> dict[str, float]:
        """`rmse`, `abs_err`, `sq_rel` in metres; `log_rmse`, `abs_rel`; `delta1` to `delta3`, shares in [0, 1]."""
        pixels = int(self.pixels.value())
        return {
            "rmse": float(np.sqrt(ratio(self.squares.value(), pixels))),
            "log_rmse": float(np.sqrt(ratio(self.log_squares.value(), pixels))),
            "abs_err": ratio(self.errors.value(), pixels),
            "abs_rel": ratio(self.relatives.value(), pixels),
            "sq_rel": ratio(self.relative_squares.value(), pixels),
            **{f"delta{k}": ratio(count, pixels) for k, count in enumerate(self.within.value(), start=1)},
        }


@functools.cache
def depth(maximum: float) -> type[Depth]:
    """Metric for a largest valid depth in metres; cached: equal ones give the same class."""
    members = {"__module__": __name__, "__doc__": Depth.__doc__, "maximum": maximum}
    return flax.struct.dataclass(type("Depth", (Depth,), members))
