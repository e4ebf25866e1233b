"""Gate statistics over a data set: mean weight of each expert slot and mean entropy, by task and tap."""

import math
import operator
from typing import NamedTuple, Self

import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.models import inputs
from taskexpert_jax.tasks.metrics.sums import Count, Sum


class GateSummary(NamedTuple):
    """Means over the pixels of the images.

    slots: names of the k expert slots: the experts, and the memory if it is read.
    weights: (T, S, k) float64.
    entropy: (T, S) float64, mean entropy of a pixel's weights divided by its maximum, log(k): 0 if one expert slot has
      all the weight, 1 if all have the same. NaN for a single slot, and without pixels.
    """

    slots: tuple[str, ...]
    weights: np.ndarray
    entropy: np.ndarray


@flax.struct.dataclass
class GateStatistics:
    """Sums over the pixels of the images, each pixel with the gate weights of its token; padding is excluded.

    weights: (S, T, k), with k expert slots.
    entropies: (S, T), entropy of the weights in nats.
    pixels: number of pixels.
    """

    weights: Sum
    entropies: Sum
    pixels: Count

    @classmethod
    def from_gates(cls, gates: Array, window: Array, mask: Array, image_size: tuple[int, int], stride: int) -> Self:
        """State of a batch.

        Args:
          gates: (S, T, B, N, k) float32 gate weights, as returned by the model.
          window: (B, 4) int32, top, left, height and width of the image inside its padding.
          mask: (B,), 0 for padding examples.
          image_size: H, W; multiples of `stride`.
          stride: side of a token in pixels.
        """
        share = inputs.token_pixels(window, mask, image_size, stride)  # (B, N)
        exact = jax.lax.Precision.HIGHEST
        weights = jnp.einsum("stbnk,bn->stk", gates, share, precision=exact)
        entropy = jax.scipy.special.entr(gates).sum(axis=-1)  # (S, T, B, N)
        entropies = jnp.einsum("stbn,bn->st", entropy, share, precision=exact)
        return cls(
            weights=Sum(total=weights, error=jnp.zeros_like(weights)),
            entropies=Sum(total=entropies, error=jnp.zeros_like(entropies)),
            pixels=Count.of_pixels(inputs.inside(window, *image_size) & (mask > 0)[:, None, None]),
        )

    @classmethod
    def zeros(cls, taps: int, tasks: int, slots: int) -> Self:
        """State of no data."""

        def zeros(*shape: int) -> Sum:
            return Sum(total=jnp.zeros(shape, jnp.float32), error=jnp.zeros(shape, jnp.float32))

        return cls(weights=zeros(taps, tasks, slots), entropies=zeros(taps, tasks), pixels=Count.zeros())

    def of_tasks(self, places: np.ndarray) -> Self:
        """State of some of the tasks, given by their positions; runs on the device."""
        weights, entropies = jax.tree.map(lambda leaf: leaf[:, places], (self.weights, self.entropies))
        return type(self)(weights=weights, entropies=entropies, pixels=self.pixels)

    def merge(self, other: Self) -> Self:
        """Sum of both states; runs on the device."""
        return jax.tree.map(operator.add, self, other, is_leaf=lambda node: isinstance(node, Count | Sum))

    def summary(self, slots: tuple[str, ...]) -> GateSummary:
        """Means, on the host; `slots` are the names of the expert slots."""
        pixels = float(self.pixels.value()) or math.nan

        def mean(sums: Sum) -> np.ndarray:
            total = np.asarray(sums.total, np.float64) + np.asarray(sums.error, np.float64)
            return np.swapaxes(total, 0, 1) / pixels

        return GateSummary(slots, mean(self.weights), mean(self.entropies) / (math.log(len(slots)) or math.nan))


def at_pixels(of_tokens: np.ndarray, window: np.ndarray, patch: int) -> np.ndarray:
    """Upsamples token values (h, w, ...) by nearest neighbour to the image's pixels (rows, columns, ...), no padding.

    window: (4,), top, left, rows and columns of the image inside its padding. patch: side of a token in pixels.
    """
    top, left, rows, columns = window.tolist()
    row = np.arange(top, top + rows) // patch
    column = np.arange(left, left + columns) // patch
    return of_tokens[row[:, None], column]
