"""Prediction heads: from a task's memory to logits or values."""

from collections.abc import Sequence
import functools

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from taskexpert_jax.models import upsampling
from taskexpert_jax.models.layers import Dtype, Norm, logical, recomputed, spatial_conv
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task


def multiply_adds(tasks: Sequence[Task], tokens: int, width: int, upsample: int) -> int:
    """Multiply-adds of the heads of all tasks, by definition, for features (tokens, width)."""
    return sum(tokens * upsample**2 * (9 * width**2 + width * task.channels) for task in tasks)


def computed(tasks: Sequence[Task], tokens: int, width: int, upsample: int) -> int:
    """Multiply-adds that the program computes: the 3x3 convolutions run on the features before the upsampling."""
    return sum(tokens * (9 * width**2 + upsample**2 * width * task.channels) for task in tasks)


class Head(nn.Module):
    """Head of one task: bilinear upsampling, 3x3 convolution, norm, ReLU, 1x1 convolution to the task's channels.

    Returns (B, upsample * h, upsample * w, channels) in `dtype`.
    """

    channels: int
    upsample: int
    norm: str
    dtype: Dtype

    def __call__(self, memory: Float[Array, "B h w D"], train: bool) -> Float[Array, "B H W c"]:
        def logits(head: Head, memory: Array) -> Array:
            return head._logits(memory, train)

        # Only the named maps are saved for the backward pass: recomputing the matmuls before them is cheaper.
        return recomputed(logits, keep=("name",), scanned=False)(self, memory)

    @nn.compact
    def _logits(self, memory: Float[Array, "B h w D"], train: bool) -> Float[Array, "B H W c"]:
        conv = functools.partial(upsampling.conv_of_upsampled, factor=self.upsample)
        maps = spatial_conv(memory.shape[-1], 3, self.dtype, "mix", use_bias=False, conv=conv)(memory)
        maps = checkpoint_name(sharding.constrain(maps, None, None, "batch", None, None, None), "head_maps")
        maps = nn.relu(Norm(self.norm, self.dtype, name="norm")(maps, train))
        logits = nn.Dense(
            self.channels,
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.truncated_normal(0.02), "feature_in", None),
            bias_init=logical(nn.initializers.zeros, None),
            name="logits",
        )(maps)
        return upsampling.interleave(logits)
