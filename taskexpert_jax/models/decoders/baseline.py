"""The multi-task baseline of the field: shared features, and for each task a 3x3 convolution and a head.

The taps are normalised, concatenated and reduced to the features; nothing is exchanged between tasks. Its source is the
baseline rows of the benchmark's papers (InvPT, TaskPrompter: a shared encoder with task-specific convolutions).
Dims: docs/conventions.md.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from taskexpert_jax.models import heads
from taskexpert_jax.models.backbones.backbone import Tap
from taskexpert_jax.models.decoders.decoder import Aux, Decoder
from taskexpert_jax.models.layers import Dtype, LayerNorm, Norm, dense, spatial_conv
from taskexpert_jax.tasks import Task


class Baseline(Decoder):
    """Multi-task baseline.

    Attributes:
      tasks: the task records; their names and channels are used.
      taps: shapes of the backbone's taps, all of one stride.
      width: D, the feature width.
      head_upsample: upsampling factor of the features before a head's 3x3 convolution.
      norm: normalisation of features and heads.
      dtype: compute dtype; parameters and statistics of norms are float32.
    """

    tasks: tuple[Task, ...]
    taps: tuple[Tap, ...]
    width: int
    head_upsample: int
    norm: str
    dtype: Dtype

    @nn.compact
    def __call__(
        self, taps: tuple[Float[Array, "B h w C"], ...], train: bool
    ) -> tuple[dict[str, Float[Array, "B H W c"]], Aux]:
        normed = [LayerNorm(self.dtype, name=f"tap_norm_{s}")(tap) for s, tap in enumerate(taps)]
        shared = dense(self.width, self.dtype, "fuse", use_bias=False)(jnp.concatenate(normed, axis=-1))
        shared = nn.relu(Norm(self.norm, self.dtype, name="fuse_norm")(shared, train))  # (B, h, w, D)
        outputs = {}
        for task in self.tasks:
            own = spatial_conv(self.width, 3, self.dtype, f"own_{task.name}", use_bias=False)(shared)
            own = nn.relu(Norm(self.norm, self.dtype, name=f"own_norm_{task.name}")(own, train))
            head = heads.Head(task.channels, self.head_upsample, self.norm, self.dtype, name=f"head_{task.name}")
            outputs[task.name] = head(own, train)
        return outputs, {}

    @property
    def parts(self) -> tuple[str, ...]:
        return ("shared", "tasks", "heads")

    def part(self, name: str) -> str:
        return {"head": "heads", "own": "tasks"}.get(name.partition("_")[0], "shared")

    def multiply_adds(self, height: int, width: int) -> dict[str, int]:
        tokens, depth = height * width // self.taps[0].stride ** 2, self.width
        return {
            "shared": tokens * sum(tap.channels for tap in self.taps) * depth,
            "tasks": len(self.tasks) * tokens * 9 * depth**2,
            "heads": heads.multiply_adds(self.tasks, tokens, depth, self.head_upsample),
        }

    def computed(self, height: int, width: int) -> dict[str, int]:
        tokens = height * width // self.taps[0].stride ** 2
        of_heads = heads.computed(self.tasks, tokens, self.width, self.head_upsample)
        return {**self.multiply_adds(height, width), "heads": of_heads}


def from_config(config: ConfigDict, tasks: tuple[Task, ...], taps: tuple[Tap, ...], device: Any) -> Baseline:
    """The decoder of `config.model` for a backbone's taps."""
    del device
    model = config.model
    return Baseline(tasks, taps, model.feature_width, model.head_upsample, model.norm, jnp.dtype(config.dtype))
