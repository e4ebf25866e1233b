"""ViT backbone: patch and position embedding, and transformer blocks, which are scanned.

As in the benchmark's family (InvPT, TaskPrompter): no class token, any image size whose sides are multiples of the
patch size (position embeddings are resized to the token grid), stochastic depth. The weights of MAE, DINOv2 and DINOv3
need options: a class token, registers, LayerScale, rotary positions, SwiGLU. Dims: docs/conventions.md; `M` is the
number of all tokens, those of the patches and extra ones.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.models import attention
from taskexpert_jax.models.backbones import position_embedding, rotary
from taskexpert_jax.models.backbones.backbone import Backbone, Tap
from taskexpert_jax.models.layers import Dtype, LayerNorm, gelu, logical, recomputed, unrolled
from taskexpert_jax.parallel import sharding

AttentionKind = attention.Kind
POSITIONS = "patches/pos_embedding"  # path of the position embeddings, (h, w, C)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Architecture of a ViT.

    Attributes:
      width: C.
      depth: number of transformer blocks.
      heads: number of attention heads.
      mlp_ratio: MLP width over C.
      patch_size: P, in pixels.
      layer_scale: initial value of LayerScale's factors; 0 for none.
      class_token: whether a learned class token takes part in the attention; it is dropped at the taps.
      registers: number of register tokens (Darcet et al., 2023, arXiv 2309.16588).
      positions: learned (embeddings added to the patches) or rotary (queries and keys are rotated, see `rotary`).
      mlp: gelu, or swiglu (arXiv 2002.05202), whose hidden units are gated by as many others.
      norm_epsilon: epsilon of the layer norms.
      attention: implementation: xla on any device; cudnn, NVIDIA's fused kernel, bfloat16 only; splash, JAX's fused
        kernel for TPUs.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: int
    patch_size: int
    layer_scale: float = 0.0
    class_token: bool = False
    registers: int = 0
    positions: str = "learned"
    mlp: str = "gelu"
    norm_epsilon: float = 1e-6
    attention: AttentionKind = "xla"

    @property
    def extra_tokens(self) -> int:
        """Number of tokens before those of the patches."""
        return self.class_token + self.registers


def patches_matmul(
    image: Float[Array, "B H W 3"], kernel: Float[Array, "P P 3 C"], *_settings: Any, **_more: Any
) -> Float[Array, "B h w C"]:
    """Patch embedding, a convolution with stride P, as one matmul.

    XLA's convolution contracts 3 channels at each of P * P positions, where a matrix unit takes 128 at once.
    """
    batch, height, width, _ = image.shape
    rows, columns, values, _ = kernel.shape
    patches = image.reshape(batch, height // rows, rows, width // columns, columns, values)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // rows, width // columns, -1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])


class PatchEmbed(nn.Module):
    """Patch embedding, with position embeddings if they are learned; extra tokens come first and have no position."""

    architecture: Architecture
    grid: tuple[int, int]  # token grid of the position embeddings
    dtype: Dtype

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B M C"]:
        size, width = self.architecture.patch_size, self.architecture.width
        tokens = nn.Conv(
            width,
            (size, size),
            strides=(size, size),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.lecun_normal(), None, None, None, "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
            conv_general_dilated=patches_matmul,
            name="embedding",
        )(image)  # (B, h, w, C)
        batch, *grid, _ = tokens.shape
        if self.architecture.positions == "learned":
            init = logical(nn.initializers.truncated_normal(0.02), None, None, "embed")
            positions = self.param("pos_embedding", init, (*self.grid, width), jnp.float32)
            positions = position_embedding.resize(positions, (grid[0], grid[1]))
            tokens = tokens + positions.astype(self.dtype)
        tokens = tokens.reshape(batch, grid[0] * grid[1], width)
        extra = [self._extra(name, shape) for name, shape in self._extra_shapes().items()]
        before = [jnp.broadcast_to(of.astype(self.dtype), (batch, *of.shape)) for of in extra]
        return jnp.concatenate([*before, tokens], axis=1) if before else tokens

    def _extra_shapes(self) -> dict[str, tuple[int, int]]:
        counts = {"class_token": int(self.architecture.class_token), "registers": self.architecture.registers}
        return {name: (count, self.architecture.width) for name, count in counts.items() if count}

    def _extra(self, name: str, shape: tuple[int, int]) -> jax.Array:
        return self.param(name, logical(nn.initializers.truncated_normal(0.02), None, "embed"), shape, jnp.float32)


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32."""

    architecture: Architecture
    dtype: Dtype
    grid: tuple[int, int] | None  # token grid of the image, for rotary positions

    def setup(self) -> None:
        """Projections whose kernels have an axis of heads, so that heads can be sharded."""
        width, heads = self.architecture.width, self.architecture.heads
        shape = (width, 3, heads, width // heads)
        # Own parameters because DenseGeneral cannot carry these axis names under set_mesh.
        init = nn.initializers.xavier_uniform(in_axis=0, out_axis=(2, 3), batch_axis=1)
        self.qkv_kernel = self.param("qkv_kernel", logical(init, "embed", None, "heads", None), shape, jnp.float32)
        biases = logical(nn.initializers.zeros, None, "heads", None)
        self.qkv_bias = self.param("qkv_bias", biases, shape[1:], jnp.float32)
        self.out = nn.Dense(
            width,
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "heads", "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
        )

    def project(self, tokens: Float[Array, "B M C"]) -> list[attention.PerHead]:
        """Queries, keys and values; queries and keys with rotary positions, if the architecture has them."""
        kernel, bias = self.qkv_kernel.astype(self.dtype), self.qkv_bias.astype(self.dtype)
        # Three matmuls: a GPU would transpose the result of a single one, and its gradient.
        made = [jnp.einsum("bnc,chd->bnhd", tokens, kernel[:, i]) + bias[i] for i in range(3)]
        if self.architecture.positions == "rotary":
            assert self.grid
            made[:2] = [rotary.rotate(each, self.grid) for each in made[:2]]
        return [sharding.constrain(each, "batch", None, "heads", None) for each in made]

    def mix(self, query: attention.PerHead, key: attention.PerHead, value: attention.PerHead) -> Float[Array, "B M C"]:
        """Attention and output projection of what `project` returns."""
        mixed = attention.attend(query, key, value, self.architecture.attention)
        return recomputed(Attention._out)(self, mixed)

    def _out(self, mixed: attention.PerHead) -> Float[Array, "B M C"]:
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class Mlp(nn.Module):
    """Two dense layers with exact GELU between them; swiglu: the SiLU of a third one's outputs times the first's."""

    hidden: int
    kind: str
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        hidden = self._expand("expand", tokens)
        hidden = nn.silu(self._expand("gate", tokens)) * hidden if self.kind == "swiglu" else gelu(hidden)
        return nn.Dense(
            tokens.shape[-1],
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "mlp", "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
            name="contract",
        )(hidden)

    def _expand(self, name: str, tokens: Float[Array, "B M C"]) -> Float[Array, "B M hidden"]:
        layer = nn.Dense(
            self.hidden,
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "embed", "mlp"),
            bias_init=logical(nn.initializers.zeros, "mlp"),
            name=name,
        )
        return sharding.constrain(layer(tokens), "batch", None, "mlp")


def drop_path(
    module: nn.Module, branch: Float[Array, "B M C"], rate: Float[Array, ""], train: bool
) -> Float[Array, "B M C"]:
    """Stochastic depth: in training, zeroes an example's branch with probability `rate`, else divides by 1 - rate."""
    if not train:
        return branch
    keep = 1.0 - rate
    kept = jax.random.bernoulli(module.make_rng("drop_path"), keep, (branch.shape[0], 1, 1))
    return branch * (kept / keep).astype(branch.dtype)  # a scalar per example: a full mask would be saved


class Block(nn.Module):
    """Pre-norm transformer block."""

    architecture: Architecture
    dtype: Dtype
    grid: tuple[int, int] | None = None  # token grid of the image, for rotary positions

    def setup(self) -> None:
        vit = self.architecture
        self.norm1, self.norm2 = (LayerNorm(self.dtype, vit.norm_epsilon) for _ in range(2))
        self.attention = Attention(vit, self.dtype, self.grid)
        self.mlp = Mlp(vit.mlp_ratio * vit.width, vit.mlp, self.dtype)
        # LayerScale (Touvron et al., 2021, arXiv 2103.17239).
        init = logical(nn.initializers.constant(vit.layer_scale), "norm")
        names = ("layer_scale1", "layer_scale2") if vit.layer_scale else ()
        self.scales = [self.param(name, init, (vit.width,), jnp.float32) for name in names]

    def __call__(
        self, tokens: Float[Array, "B M C"], drop_rate: Float[Array, ""], train: bool
    ) -> Float[Array, "B M C"]:
        tokens = sharding.constrain(tokens, "batch", None, None)
        mixed = self.attention.mix(*recomputed(Block._project)(self, tokens))
        tokens = tokens + drop_path(self, self._scaled(0, mixed), drop_rate, train)
        mixed = recomputed(Block._mlp)(self, tokens)
        return tokens + drop_path(self, self._scaled(1, mixed), drop_rate, train)

    def _project(self, tokens: Float[Array, "B M C"]) -> list[attention.PerHead]:
        return self.attention.project(self.norm1(tokens))

    def _mlp(self, tokens: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        return self.mlp(self.norm2(tokens))

    def _scaled(self, branch: int, outputs: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        """A branch's outputs times LayerScale's factors, where the model has them."""
        return outputs * self.scales[branch].astype(self.dtype) if self.scales else outputs


class ViT(Backbone):
    """Patch tokens after each of S equal stages of blocks; all taps have the same shape.

    The blocks are scanned: their parameters are stacked as (depth, ...), and the program's size does not grow with
    depth. A scan over stages with their blocks scanned inside would copy the saved activations of the blocks twice.

    Attributes:
      architecture: see `Architecture`.
      grid: token grid (h, w) of the position embeddings.
      stages: S; divides the depth.
      drop_path: stochastic depth rate of the last block; rises linearly from 0.
      remat: rematerialise each block in the backward pass.
      unroll: unroll the scan (same parameters): a larger program, faster on CPUs.
      dtype: compute dtype; parameters, statistics of norms and softmax are float32.
    """

    architecture: Architecture
    grid: tuple[int, int]
    stages: int
    drop_path: float
    remat: bool
    unroll: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"], train: bool) -> tuple[Float[Array, "B h w C"], ...]:
        vit, patch = self.architecture, self.architecture.patch_size
        tokens = PatchEmbed(vit, self.grid, self.dtype, name="patches")(image)
        block = nn.remat(Block, prevent_cse=False, static_argnums=(3,)) if self.remat else Block

        def step(
            block: Block, carry: tuple[jax.Array, jax.Array], rate: jax.Array, stage: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            tokens, taps = carry
            tokens = block(tokens, rate, train)
            # Every block overwrites its stage's tap, so the last block's remains; a condition would cost more.
            taps = jax.lax.dynamic_update_index_in_dim(taps, tokens[:, vit.extra_tokens :], stage, 0)
            return (tokens, sharding.constrain(taps, None, "batch", None, None)), None

        blocks = nn.scan(
            step,
            length=vit.depth,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
            unroll=vit.depth if self.unroll else 1,
        )
        batch, count, width = tokens.shape
        taps = jnp.zeros((self.stages, batch, count - vit.extra_tokens, width), tokens.dtype)
        rates = jnp.linspace(0.0, self.drop_path, vit.depth)
        stages = jnp.repeat(jnp.arange(self.stages), vit.depth // self.stages)
        grid = (image.shape[1] // patch, image.shape[2] // patch)
        (_, taps), _ = blocks(block(vit, self.dtype, grid, name="blocks"), (tokens, taps), rates, stages)
        return tuple(tap.reshape(batch, *grid, width) for tap in taps)

    @property
    def stride(self) -> int:
        return self.architecture.patch_size

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.architecture.patch_size, self.architecture.width),) * self.stages

    @property
    def layers(self) -> int:
        return self.architecture.depth + 1

    def layer(self, name: str) -> int | tuple[int, ...] | None:
        return {"patches": 0, "blocks": tuple(range(1, self.layers))}.get(name.partition("/")[0])

    def multiply_adds(self, height: int, width: int) -> int:
        vit = self.architecture
        tokens = height * width // vit.patch_size**2
        seen = tokens + vit.extra_tokens
        layers = {"gelu": 2, "swiglu": 3}[vit.mlp]
        block = (4 + layers * vit.mlp_ratio) * vit.width**2 * seen + 2 * seen**2 * vit.width
        return vit.patch_size**2 * 3 * vit.width * tokens + vit.depth * block

    @property
    def optional(self) -> tuple[str, ...]:
        return ("patches/class_token",)

    @property
    def of_image_size(self) -> tuple[str, ...]:
        return (POSITIONS,) if self.architecture.positions == "learned" else ()

    def image_size_of(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
        if POSITIONS not in arrays:
            return None
        height, width, _ = arrays[POSITIONS].shape
        return height * self.stride, width * self.stride

    def resized(self, name: str, array: np.ndarray) -> np.ndarray:
        del name  # the only parameter of `of_image_size`
        return np.asarray(position_embedding.resize(jnp.asarray(array), self.grid))


def from_config(config: ConfigDict, device: Any) -> ViT:
    """The ViT of `config.model` for a device.

    Raises:
      UserError: `config.model.attention` is not available on the device.
    """
    model = config.model
    height, width = config.dataset.image_size
    shape = (model.width, model.depth, model.heads, model.mlp_ratio, model.patch_size)
    kind = attention.choose(model.attention, config.dtype, model.width // model.heads, device)
    return ViT(
        architecture=Architecture(
            *shape,
            layer_scale=model.layer_scale,
            class_token=model.class_token,
            registers=model.registers,
            positions=model.positions,
            mlp=model.mlp,
            norm_epsilon=model.norm_epsilon,
            attention=kind,
        ),
        grid=(height // model.patch_size, width // model.patch_size),
        stages=model.taps,
        drop_path=model.drop_path,
        remat=model.remat,
        unroll=unrolled(model.unroll, device),
        dtype=jnp.dtype(config.dtype),
    )
