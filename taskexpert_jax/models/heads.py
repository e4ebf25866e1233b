"""Per-task prediction heads: from a task's memory to logits or values at image size."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from taskexpert_jax import sharding
from taskexpert_jax.models.mmoe import Norm, NormKind, spatial_conv
from taskexpert_jax.models.vit import Dtype, logical, recomputed


def resize_bilinear(maps: jax.Array, height: int, width: int) -> jax.Array:
    """(B, h, w, c) -> (B, height, width, c), bilinear with half-pixel centres."""
    batch, _, _, channels = maps.shape
    return jax.image.resize(maps, (batch, height, width, channels), method="bilinear", antialias=False)


class Head(nn.Module):
    """One task's head: upsample, 3x3 convolution, norm, ReLU, 1x1 convolution to the task's channels.

    (B, h, w, D) -> (B, upsample * h, upsample * w, channels) float32.
    """

    channels: int
    upsample: int
    norm: NormKind
    dtype: Dtype

    def __call__(self, memory: jax.Array, train: bool) -> jax.Array:
        def logits(head: Head, memory: jax.Array) -> jax.Array:
            return head._logits(memory, train)

        # Not the upsampled memory either: computing it again costs less than keeping 16 times the memory for each task.
        return recomputed(logits, keep=("conv_general_dilated",), scanned=False)(self, memory)

    @nn.compact
    def _logits(self, memory: jax.Array, train: bool) -> jax.Array:
        _, height, width, depth = memory.shape
        maps = resize_bilinear(memory, self.upsample * height, self.upsample * width)
        maps = sharding.constrain(maps, "batch", None, None, None)
        maps = spatial_conv(depth, 3, self.dtype, "mix", use_bias=False)(maps)
        maps = nn.relu(Norm(self.norm, self.dtype, name="norm")(maps, train))
        logits = nn.Dense(
            self.channels,
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.truncated_normal(0.02), "feature_in", None),
            bias_init=logical(nn.initializers.zeros, None),
            name="logits",
        )(maps)
        return logits.astype(jnp.float32)
