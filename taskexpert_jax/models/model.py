"""The whole model: a ViT backbone whose taps feed the memorial mixture of experts, and a head for each task.

The blocks are scanned with the tokens as the carry, then the taps with the memory as the carry: parameters of blocks
are stacked as (depth, ...), those of taps as (S, ...), and the program's size does not grow with depth. A scan over
stages with their blocks scanned inside would compute the same, because nothing flows from the memory back to the
tokens, but would copy the saved activations of the blocks twice. Dims: docs/conventions.md.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import Normalisation, normalisation
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import attention, heads
from taskexpert_jax.models.backbones import vit
from taskexpert_jax.models.decoders import taskexpert
from taskexpert_jax.models.layers import Dtype, logical, recomputed
from taskexpert_jax.models.upsampling import resize_bilinear
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task


class TaskExpert(nn.Module):
    """TaskExpert: normalised image -> {task: (B, H, W, channels) float32}.

    Attributes:
      tasks: the task records; their names and channels are used.
      backbone: the ViT's architecture.
      grid: token grid (h, w) of the position embeddings.
      taps: S, the number of taps; divides the backbone's depth.
      width: D, the feature width of experts and memory.
      drop_path: stochastic depth rate of the last block; rises linearly from 0.
      experts, gate, memory: see `mmoe`.
      head_upsample: upsampling factor of the memory before a head's 3x3 convolution.
      head_norm: normalisation of the heads.
      remat: rematerialise each block in the backward pass.
      unroll: unroll the scans (same parameters): larger programs, faster on CPUs.
      dtype: compute dtype; parameters, statistics of norms, softmax and outputs are float32.
      normalisation: per-channel mean and std of the images; see `inputs.normalise`.
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

    @property
    def expert_slots(self) -> tuple[str, ...]:
        """Names of the expert slots, in the order of the gates' last axis; the memory, if read, is the last."""
        memory = () if self.memory.read == "none" else (taskexpert.MEMORY,)
        return (*(f"expert {k + 1}" for k in range(self.experts.count)), *memory)

    @nn.compact
    def __call__(
        self,
        image: Float[Array | np.ndarray, "B H W 3"],
        *,
        train: bool,
        return_gates: bool = False,
        full_size: bool = True,
    ) -> Any:
        """Predictions; with `return_gates` also the gates, (S, T, B, N, K or K + 1) float32.

        Without `full_size` the predictions have the heads' size, (B, head_upsample * h, head_upsample * w, channels),
        and `dtype`. Training needs the RNG streams `drop_path` and, for noisy gates, `gate_noise`, and updates the
        collection `batch_stats`.
        """
        batch, image_height, image_width, _ = image.shape
        patch = self.backbone.patch_size
        if image_height % patch or image_width % patch:
            raise UserError(
                f"image size {image_height}x{image_width}: sides must be multiples of the patch size {patch}"
            )
        height, width = image_height // patch, image_width // patch
        # Scopes beside Flax's own, which are module names: docs/profile.md lists them.
        with jax.named_scope("backbone"):
            patches = vit.PatchEmbed(self.backbone, self.grid, self.dtype, name="patches")
            taps = self._taps(patches(jnp.asarray(image, self.dtype)), train)
        with jax.named_scope("decoder"):
            memory, gates = self._assemble(taps, self._initial_memory(batch, height, width), train)
        outputs = {}
        for task, features in zip(self.tasks, memory, strict=True):
            head = heads.Head(task.channels, self.head_upsample, self.head_norm, self.dtype, name=f"head_{task.name}")
            maps = head(features, train)
            outputs[task.name] = resize_bilinear(maps, image_height, image_width) if full_size else maps
        return (outputs, gates) if return_gates else outputs

    def _taps(self, tokens: Float[Array, "B M C"], train: bool) -> Float[Array, "S B N C"]:
        """Patch tokens after the last block of each stage."""
        backbone = self.backbone
        block = nn.remat(vit.Block, prevent_cse=False, static_argnums=(3,)) if self.remat else vit.Block

        def step(
            block: vit.Block, carry: tuple[jax.Array, jax.Array], rate: jax.Array, stage: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            tokens, taps = carry
            tokens = block(tokens, rate, train)
            # Every block overwrites its stage's tap, so the last block's remains; a condition would cost more.
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

    def _assemble(
        self, taps: Float[Array, "S B N C"], memory: Float[Array, "T B h w D"], train: bool
    ) -> tuple[Array, Array]:
        """Memory after the last tap (T, B, h, w, D), and the gates of all taps (S, T, B, N, k)."""

        def step(mixture: taskexpert.MemorialMixture, memory: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
            return mixture(tap, memory, train)

        mixtures = nn.scan(
            recomputed(step),
            length=self.taps,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "gate_noise": True},
            metadata_params={nn.PARTITION_NAME: "stages"},
            unroll=self.taps if self.unroll else 1,
        )
        names = tuple(task.name for task in self.tasks)
        mixture = taskexpert.MemorialMixture(names, self.experts, self.gate, self.memory, self.dtype, name="mixture")
        return mixtures(mixture, memory, taps)

    def _initial_memory(self, batch: Any, height: int, width: int) -> Float[Array, "T B h w D"]:
        """A learned vector for each task, broadcast over the image, or zeros; batch: an int or a symbolic dimension."""
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
