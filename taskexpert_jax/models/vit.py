"""The ViT backbone: patch and position embedding, and the transformer block that the stages scan.

Differences from the original ViT are those of the benchmark's family (InvPT, TaskPrompter): no class token, any image
size whose sides are multiples of the patch size (position embeddings are resized to the grid), stochastic depth. For
weights that were trained otherwise (DINOv2, MAE) there are a class token, registers and LayerScale.
Dims: B batch, H W image, P patch, h w token grid, N = h * w tokens, C width; see docs/conventions.md.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from taskexpert_jax import sharding
from taskexpert_jax.models import attention, position_embedding

Dtype = jnp.dtype
AttentionKind = attention.Kind


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Shape of a ViT.

    Attributes:
      width: C.
      depth: in blocks.
      heads: of attention.
      mlp_ratio: MLP width over C.
      patch_size: P, in pixels.
      layer_scale: initial factor on every channel of what a block adds, learned (LayerScale); 0: none.
      class_token: whether one learned token stands before the patches'; it has part in the attention alone.
      registers: how many more such tokens (Darcet et al., 2023, arXiv 2309.16588).
      attention: how it is computed: xla, on any device; cudnn, NVIDIA's fused kernel, in bfloat16 on its GPUs alone;
        splash, JAX's fused kernel for TPUs.
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
        """How many tokens stand before those of the patches."""
        return self.class_token + self.registers


def logical(initializer: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """The initializer with the parameter's logical axis names; `sharding` maps them to mesh axes."""
    return nn.with_logical_partitioning(initializer, axes)


class PatchEmbed(nn.Module):
    """Image (B, H, W, 3) -> tokens (B, N, C): a strided convolution and learned position embeddings.

    With a class token or registers, these come first: (B, extra_tokens + N, C). They have no position.
    """

    backbone: Backbone
    grid: tuple[int, int]  # the grid that the position embeddings are learned on
    dtype: Dtype

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        size, width = self.backbone.patch_size, self.backbone.width
        tokens = nn.Conv(
            width,
            (size, size),
            strides=(size, size),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.lecun_normal(), None, None, None, "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
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
    """Multi-head self-attention, (B, N, C) -> (B, N, C); softmax in float32."""

    heads: int
    dtype: Dtype
    kind: AttentionKind = "xla"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = tokens.shape[-1]
        shape = (width, 3, self.heads, width // self.heads)
        # One matmul for q, k and v; written out because DenseGeneral cannot carry these axis names under set_mesh.
        init = nn.initializers.xavier_uniform(in_axis=0, out_axis=(2, 3), batch_axis=1)
        kernel = self.param("qkv_kernel", logical(init, "embed", None, "heads", None), shape, jnp.float32)
        bias = self.param("qkv_bias", logical(nn.initializers.zeros, None, "heads", None), shape[1:], jnp.float32)
        qkv = jnp.einsum("bnc,cqhd->qbnhd", tokens, kernel.astype(self.dtype))  # (3, B, N, heads, C/heads)
        qkv = sharding.constrain(qkv, None, "batch", None, "heads", None)
        query, key, value = qkv + bias.astype(self.dtype)[:, None, None]
        mixed = attention.attend(query, key, value, self.kind)
        return nn.Dense(
            width,
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "heads", "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
            name="out",
        )(mixed.reshape(tokens.shape))


class Mlp(nn.Module):
    """Two dense layers with exact GELU between, (B, N, C) -> (B, N, C)."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden = nn.Dense(
            self.hidden,
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "embed", "mlp"),
            bias_init=logical(nn.initializers.zeros, "mlp"),
            name="expand",
        )(tokens)
        hidden = nn.gelu(sharding.constrain(hidden, "batch", None, "mlp"), approximate=False)
        return nn.Dense(
            tokens.shape[-1],
            dtype=self.dtype,
            kernel_init=logical(nn.initializers.xavier_uniform(), "mlp", "embed"),
            bias_init=logical(nn.initializers.zeros, "embed"),
            name="contract",
        )(hidden)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32, eps 1e-6 as in ViT."""

    dtype: Dtype

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return nn.LayerNorm(
            epsilon=1e-6,
            dtype=self.dtype,
            scale_init=logical(nn.initializers.ones, "norm"),
            bias_init=logical(nn.initializers.zeros, "norm"),
            name="norm",
        )(inputs)


def drop_path(module: nn.Module, branch: jax.Array, rate: jax.Array, train: bool) -> jax.Array:
    """Stochastic depth: in training, zeroes an example's whole branch with probability `rate`, else scales it up."""
    if not train:
        return branch
    keep = 1.0 - rate
    kept = jax.random.bernoulli(module.make_rng("drop_path"), keep, (branch.shape[0], 1, 1))
    return jnp.where(kept, branch / keep.astype(branch.dtype), 0).astype(branch.dtype)


class Block(nn.Module):
    """One pre-norm transformer block, in the form that `nn.scan` wants: (tokens, drop rate) -> (tokens, None)."""

    backbone: Backbone
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, drop_rate: jax.Array, train: bool) -> tuple[jax.Array, None]:
        tokens = sharding.constrain(tokens, "batch", None, None)
        attend = Attention(self.backbone.heads, self.dtype, self.backbone.attention, name="attention")
        mixed = attend(LayerNorm(self.dtype, name="norm1")(tokens))
        mixed = self._scaled("layer_scale1", mixed)
        tokens = tokens + drop_path(self, mixed, drop_rate, train)
        hidden = self.backbone.mlp_ratio * self.backbone.width
        mixed = Mlp(hidden, self.dtype, name="mlp")(LayerNorm(self.dtype, name="norm2")(tokens))
        mixed = self._scaled("layer_scale2", mixed)
        return tokens + drop_path(self, mixed, drop_rate, train), None

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        """The branch times LayerScale's learned factors (Touvron et al., 2021, arXiv 2103.17239), where it has such."""
        initial = self.backbone.layer_scale
        if not initial:
            return branch
        init = logical(nn.initializers.constant(initial), "norm")
        return branch * self.param(name, init, branch.shape[-1:], jnp.float32).astype(self.dtype)
