"""TaskExpert: a ViT whose taps feed a memorial mixture of experts, and a head for each task.

The blocks are scanned with the tokens as the carry, then the taps with the memory as the carry. So the parameters of
blocks are stacked as (depth, ...) and those of taps as (S, ...), and the program's size does not grow with depth.
Nothing flows from the memory back to the tokens: a scan over stages, with their blocks scanned inside, would compute
the same, but move what the blocks keep for the backward pass twice. Dims: docs/conventions.md.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from taskexpert_jax.config import Normalisation, normalisation
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import attention, heads
from taskexpert_jax.models.backbones import vit
from taskexpert_jax.models.backbones.vit import Dtype, logical
from taskexpert_jax.models.decoders import taskexpert
from taskexpert_jax.models.upsampling import resize_bilinear
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task


class TaskExpert(nn.Module):
    """Image (B, H, W, 3) float32, normalised -> {task: (B, H, W, channels) float32}.

    Attributes:
      tasks: the task records; their names and channels.
      backbone: the ViT's shape.
      grid: the token grid (h, w) that the position embeddings are learned on.
      taps: S, the number of stages; divides the backbone's depth.
      width: D, the experts' and the memory's feature width.
      drop_path: stochastic depth of the last block; rises linearly from 0.
      experts, gate, memory: see `mmoe`.
      head_upsample: the factor by which a head upsamples the memory before its 3x3 convolution.
      head_norm: the heads' normalisation.
      remat: recompute each block's activations in the backward pass.
      unroll: write out the scans (same parameters); larger programs, sometimes faster ones.
      dtype: of the computation; parameters, norms' statistics, softmax and outputs are float32.
      normalisation: of the images that it is given; see `inputs.normalise`.
    """

    tasks: tuple[Task, ...]
    backbone: vit.Backbone
    grid: tuple[int, int]
    taps: int
    width: int
    drop_path: float
    experts: taskexpert.ExpertSpec
    gate: taskexpert.GateSpec
    memory: taskexpert.MemorySpec
    head_upsample: int
    head_norm: str
    remat: bool
    unroll: bool
    dtype: Dtype
    normalisation: Normalisation

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool, return_gates: bool = False, full_size: bool = True) -> Any:
        """Predictions; with `return_gates` also the gates, (S, T, B, N, K or K + 1) float32.

        Without `full_size` they are the heads', (B, head_upsample * h, head_upsample * w, channels) of `dtype`.

        Training needs the random streams `drop_path` and, for noisy gates, `gate_noise`; it updates `batch_stats`.
        """
        batch, image_height, image_width, _ = image.shape
        patch = self.backbone.patch_size
        if image_height % patch or image_width % patch:
            raise UserError(
                f"image size {image_height}x{image_width}: sides must be multiples of the patch size {patch}"
            )
        height, width = image_height // patch, image_width // patch
        tokens = vit.PatchEmbed(self.backbone, self.grid, self.dtype, name="patches")(image.astype(self.dtype))
        taps = self._taps(tokens, train)
        memory, gates = self._assemble(taps, self._initial_memory(batch, height, width), train)
        outputs = {}
        for task, features in zip(self.tasks, memory, strict=True):
            head = heads.Head(task.channels, self.head_upsample, self.head_norm, self.dtype, name=f"head_{task.name}")
            maps = head(features, train)
            outputs[task.name] = resize_bilinear(maps, image_height, image_width) if full_size else maps
        return (outputs, gates) if return_gates else outputs

    def _taps(self, tokens: jax.Array, train: bool) -> jax.Array:
        """The patches' tokens after the last block of each stage, (S, B, N, C)."""
        backbone = self.backbone
        block = nn.remat(vit.Block, prevent_cse=False, static_argnums=(3,)) if self.remat else vit.Block

        def step(
            block: vit.Block, carry: tuple[jax.Array, jax.Array], rate: jax.Array, stage: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            tokens, taps = carry
            tokens = block(tokens, rate, train)
            # Every block writes, and the last one of a stage stays: a condition would cost more than the writes.
            taps = jax.lax.dynamic_update_index_in_dim(taps, tokens[:, backbone.extra_tokens :], stage, 0)
            return (tokens, sharding.constrain(taps, None, "batch", None, None)), None

        blocks = nn.scan(
            step,
            length=backbone.depth,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
            unroll=backbone.depth if self.unroll else 1,
        )
        batch, count, width = tokens.shape
        taps = jnp.zeros((self.taps, batch, count - backbone.extra_tokens, width), tokens.dtype)
        rates = jnp.linspace(0.0, self.drop_path, backbone.depth)
        stages = jnp.repeat(jnp.arange(self.taps), backbone.depth // self.taps)
        (_, taps), _ = blocks(block(backbone, self.dtype, name="blocks"), (tokens, taps), rates, stages)
        return taps

    def _assemble(self, taps: jax.Array, memory: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """The memory after the last tap, and the gates of all."""

        def step(mixture: taskexpert.MemorialMixture, memory: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
            return mixture(tap, memory, train)

        mixtures = nn.scan(
            vit.recomputed(step),
            length=self.taps,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "gate_noise": True},
            metadata_params={nn.PARTITION_NAME: "stages"},
            unroll=self.taps if self.unroll else 1,
        )
        names = tuple(task.name for task in self.tasks)
        mixture = taskexpert.MemorialMixture(names, self.experts, self.gate, self.memory, self.dtype, name="mixture")
        return mixtures(mixture, memory, taps)

    def _initial_memory(self, batch: int, height: int, width: int) -> jax.Array:
        """(T, B, h, w, D): each task's learned vector at every place, or zeros."""
        shape = (len(self.tasks), batch, height, width, self.width)
        if self.memory.init == "zeros":
            return jnp.zeros(shape, self.dtype)
        vectors = self.param(
            "initial_memory",
            logical(nn.initializers.truncated_normal(0.02), "tasks", None),
            (len(self.tasks), self.width),
            jnp.float32,
        )
        return jnp.broadcast_to(vectors.astype(self.dtype)[:, None, None, None], shape)


def _backbone(config: ConfigDict, device: Any) -> vit.Backbone:
    """The ViT of `config.model`, for a device."""
    model = config.model
    shape = (model.width, model.depth, model.heads, model.mlp_ratio, model.patch_size)
    kind = attention.choose(model.attention, config.dtype, model.width // model.heads, device)
    return vit.Backbone(*shape, model.layer_scale, model.class_token, model.registers, kind)


def from_config(config: ConfigDict, tasks: tuple[Task, ...], device: Any = None) -> TaskExpert:
    """The model of a config (`config.model`, `config.dataset.image_size`, `config.dtype`) that `check` has accepted.

    device: one of those that it is for, real or described; this process's first if None.

    Raises:
      UserError: `config.model.attention` is not available on the device.
    """
    model = config.model
    height, width = config.dataset.image_size
    device = device or jax.local_devices()[0]
    return TaskExpert(
        tasks=tasks,
        backbone=_backbone(config, device),
        grid=(height // model.patch_size, width // model.patch_size),
        taps=model.taps,
        width=model.feature_width,
        drop_path=model.drop_path,
        experts=taskexpert.ExpertSpec(model.experts, model.expert_kernel, model.norm),
        gate=taskexpert.GateSpec(
            input=model.gate.input,
            granularity=model.gate.granularity,
            width=model.gate.width,
            top_k=model.gate.top_k,
            temperature=model.gate.temperature,
            noise=model.gate.noise,
            init=model.gate.init,
        ),
        memory=taskexpert.MemorySpec(init=model.memory.init, read=model.memory.read, write=model.memory.write),
        head_upsample=model.head_upsample,
        head_norm=model.norm,
        remat=model.remat,
        unroll=device.platform == "cpu" if model.unroll == "auto" else model.unroll == "yes",
        dtype=jnp.dtype(config.dtype),
        normalisation=normalisation(config),
    )
