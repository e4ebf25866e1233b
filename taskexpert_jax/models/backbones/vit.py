"""ViT backbone: patch and position embedding, and the transformer block that is scanned.

As in the benchmark's family (InvPT, TaskPrompter): no class token, any image size whose sides are multiples of the
patch size (position embeddings are resized to the token grid), stochastic depth. DINOv2 and MAE weights need a class
token, registers and LayerScale, which are options. Dims: docs/conventions.md; `M` is the number of all tokens, those of
the patches and extra ones.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from taskexpert_jax.models import attention
from taskexpert_jax.models.backbones import position_embedding
from taskexpert_jax.models.layers import Dtype, LayerNorm, gelu, logical, recomputed
from taskexpert_jax.parallel import sharding

AttentionKind = attention.Kind


@dataclasses.dataclass(frozen=True)
class Backbone:
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
    attention: AttentionKind = "xla"

    @property
    def extra_tokens(self) -> int:
        """Number of tokens before those of the patches."""
        return self.class_token + self.registers


def _patches_matmul(
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
    """Patch embedding with learned position embeddings; extra tokens come first and have no position."""

    backbone: Backbone
    grid: tuple[int, int]  # token grid of the position embeddings
    dtype: Dtype

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B M C"]:
        size, width = self.backbone.patch_size, self.backbone.width
        tokens = nn.Conv(
            width,
            (size, size),
            strides=(size, size),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.lecun_normal(), None, None, None, "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
            conv_general_dilated=_patches_matmul,
            name="embedding",
        )(image)  # (B, h, w, C)
        positions = self.param(
            "pos_embedding",
            logical(nn.initializers.truncated_normal(0.02), None, None, "embed"),
            (*self.grid, width),
            jnp.float32,
        )
        batch, *grid, _ = tokens.shape
        positions = position_embedding.resize(positions, (grid[0], grid[1]))
        tokens = tokens + positions.astype(self.dtype)
        tokens = tokens.reshape(batch, grid[0] * grid[1], width)
        extra = [self._extra(name, shape) for name, shape in self._extra_shapes().items()]
        before = [jnp.broadcast_to(of.astype(self.dtype), (batch, *of.shape)) for of in extra]
        return jnp.concatenate([*before, tokens], axis=1) if before else tokens

    def _extra_shapes(self) -> dict[str, tuple[int, int]]:
        backbone = self.backbone
        counts = {"class_token": int(backbone.class_token), "registers": backbone.registers}
        return {name: (count, backbone.width) for name, count in counts.items() if count}

    def _extra(self, name: str, shape: tuple[int, int]) -> jax.Array:
        return self.param(name, logical(nn.initializers.truncated_normal(0.02), None, "embed"), shape, jnp.float32)


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32."""

    backbone: Backbone
    dtype: Dtype

    def setup(self) -> None:
        """Projections whose kernels have an axis of heads, so that heads can be sharded."""
        width, heads = self.backbone.width, self.backbone.heads
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
        """Queries, keys and values."""
        kernel, bias = self.qkv_kernel.astype(self.dtype), self.qkv_bias.astype(self.dtype)
        # Three matmuls: a GPU would transpose the result of a single one, and its gradient.
        made = [jnp.einsum("bnc,chd->bnhd", tokens, kernel[:, i]) + bias[i] for i in range(3)]
        return [sharding.constrain(each, "batch", None, "heads", None) for each in made]

    def mix(self, query: attention.PerHead, key: attention.PerHead, value: attention.PerHead) -> Float[Array, "B M C"]:
        """Attention and output projection of what `project` returns."""
        mixed = attention.attend(query, key, value, self.backbone.attention)
        return recomputed(Attention._out)(self, mixed)

    def _out(self, mixed: attention.PerHead) -> Float[Array, "B M C"]:
        return self.out(mixed.reshape(*mixed.shape[:2], -1))


class Mlp(nn.Module):
    """Two dense layers with exact GELU between them."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: Float[Array, "B M C"]) -> Float[Array, "B M C"]:
        hidden = nn.Dense(
            self.hidden,
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "embed", "mlp"),
            bias_init=logical(nn.initializers.zeros, "mlp"),
            name="expand",
        )(tokens)
        hidden = gelu(sharding.constrain(hidden, "batch", None, "mlp"))
        return nn.Dense(
            tokens.shape[-1],
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "mlp", "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
            name="contract",
        )(hidden)


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

    backbone: Backbone
    dtype: Dtype

    def setup(self) -> None:
        backbone = self.backbone
        self.norm1, self.norm2 = LayerNorm(self.dtype), LayerNorm(self.dtype)
        self.attention = Attention(backbone, self.dtype)
        self.mlp = Mlp(backbone.mlp_ratio * backbone.width, self.dtype)
        # LayerScale (Touvron et al., 2021, arXiv 2103.17239).
        init = logical(nn.initializers.constant(backbone.layer_scale), "norm")
        names = ("layer_scale1", "layer_scale2") if backbone.layer_scale else ()
        self.scales = [self.param(name, init, (backbone.width,), jnp.float32) for name in names]

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
