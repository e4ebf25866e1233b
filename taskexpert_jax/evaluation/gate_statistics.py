"""How the gates weigh experts and memory over a data set: mean weights and entropy, by task and tap."""

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
    """Means over the pixels of the pictures.

    choices: what is weighed: the experts, and the memory where it is read.
    weights: (T, S, choices) float64.
    entropy: (T, S) float64, the mean entropy of a pixel's weights as a share of log(choices), its largest value: 0
      where one choice has all the weight, 1 where all have the same. nan for a single choice, and without pixels.
    """

    choices: tuple[str, ...]
    weights: np.ndarray
    entropy: np.ndarray


@flax.struct.dataclass
class GateStatistics:
    """Sums over the pixels of the pictures, each with the gates of its token; padding is left out.

    weights: (S, T, choices)
    entropies: (S, T), of the weights, in nats
    pixels: all of them
    """

    weights: Sum
    entropies: Sum
    pixels: Count

    @classmethod
    def from_gates(cls, gates: Array, window: Array, mask: Array, image_size: tuple[int, int], patch: int) -> Self:
        """The state of a batch.

        Args:
          gates: (S, T, B, N, choices) float32, what the model returns.
          window: (B, 4) int32, top, left, height and width of the picture inside its padding.
          mask: (B,), 0 for padding examples.
          image_size: H, W; multiples of `patch`, the side of a token's square in pixels.
        """
        share = inputs.token_pixels(window, mask, image_size, patch)  # (B, N)
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
    def zeros(cls, taps: int, tasks: int, choices: int) -> Self:
        """The state of no data."""

        def zeros(*shape: int) -> Sum:
            return Sum(total=jnp.zeros(shape, jnp.float32), error=jnp.zeros(shape, jnp.float32))

        return cls(weights=zeros(taps, tasks, choices), entropies=zeros(taps, tasks), pixels=Count.zeros())

    def merge(self, other: Self) -> Self:
        """The state of both; runs on the device."""
        return jax.tree.map(operator.add, self, other, is_leaf=lambda node: isinstance(node, Count | Sum))

    def summary(self, choices: tuple[str, ...]) -> GateSummary:
        """The means, on the host; `choices` are the names of what is weighed."""
        pixels = float(self.pixels.value()) or math.nan

        def mean(sums: Sum) -> np.ndarray:
            total = np.asarray(sums.total, np.float64) + np.asarray(sums.error, np.float64)
            return np.swapaxes(total, 0, 1) / pixels

        return GateSummary(choices, mean(self.weights), mean(self.entropies) / (math.log(len(choices)) or math.nan))
