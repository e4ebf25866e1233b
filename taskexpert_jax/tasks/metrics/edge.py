"""Boundary loss over a data set; odsF, which needs whole boundary maps, is in `metrics/boundary`."""

import functools
from typing import Any, ClassVar

import flax.struct
import jax
from jax import Array
import jax.numpy as jnp

from taskexpert_jax.tasks.losses import edge_cross_entropy_map, valid_pixels
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, Sum, ratio


@flax.struct.dataclass
class EdgeLoss(PooledMetric):
    """Sums over the valid pixels; `edge_loss` gives the metric for a weight of the positives.

    losses: losses.edge_cross_entropy_map of the logit.
    squashed_losses: losses.edge_cross_entropy_map of sigmoid(logit). The family's evaluation passes the probability to
        the loss, which applies a second sigmoid.
    pixels: number of valid pixels.
    """

    pos_weight: ClassVar[float]
    losses: Sum
    squashed_losses: Sum
    pixels: Count

    @classmethod
    def sums(cls, prediction: Array, label: Array, mask: Array | None) -> dict[str, Any]:
        """State of a batch; prediction (B, H, W, 1) logit, label (B, H, W, 1) 0 or 1, 255 = ignored."""
        valid = valid_pixels(label, mask)
        probability = jax.nn.sigmoid(prediction.astype(jnp.float32))
        return {
            "losses": Sum.of(edge_cross_entropy_map(prediction, label, cls.pos_weight), valid),
            "squashed_losses": Sum.of(edge_cross_entropy_map(probability, label, cls.pos_weight), valid),
            "pixels": Count.of_pixels(valid),
        }

    @classmethod
    def zeros(cls) -> dict[str, Any]:
        return {"losses": Sum.zeros(), "squashed_losses": Sum.zeros(), "pixels": Count.zeros()}

    def values(self) -> dict[str, float]:
        """`loss`, as the family's evaluation computes it, and `loss_plain`, the training loss, over the whole set.

        `loss` is computed from sigmoid(logit), `loss_plain` from the logit; they are not comparable.
        """
        pixels = int(self.pixels.value())
        return {
            "loss": ratio(self.squashed_losses.value(), pixels),
            "loss_plain": ratio(self.losses.value(), pixels),
        }


@functools.cache
def edge_loss(pos_weight: float) -> type[EdgeLoss]:
    """Metric for a weight of the positives (0.95 in the family); cached: equal weights give the same class."""
    members = {"__module__": __name__, "__doc__": EdgeLoss.__doc__, "pos_weight": pos_weight}
    return flax.struct.dataclass(type("EdgeLoss", (EdgeLoss,), members))
