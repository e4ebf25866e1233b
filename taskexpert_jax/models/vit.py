"""The ViT backbone: patch and position embedding, and the transformer block that the stages scan.

Differences from the original ViT are those of the benchmark's family (InvPT, TaskPrompter): no class token, any image
size whose sides are multiples of the patch size (position embeddings are resized to the grid), stochastic depth.
Dims: B batch, H W image, P patch, h w token grid, N = h * w tokens, C width; see docs/conventions.md.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Shape of a ViT: width C, depth in blocks, attention heads, MLP width over C, patch size P in pixels."""

    width: int
    depth: int
    heads: int
    mlp_ratio: int
    patch_size: int


def logical(initializer: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """The initializer with the parameter's logical axis names; `sharding` maps them to mesh axes."""
    return nn.with_logical_partitioning(initializer, axes)


class PatchEmbed(nn.Module):
    """Image (B, H, W, 3) -> tokens (B, N, C): a strided convolution and learned position embeddings."""

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
        if tuple(grid) != self.grid:
            positions = jax.image.resize(positions, (*grid, width), method="cubic", antialias=False)
        tokens = tokens + positions.astype(self.dtype)
        return tokens.reshape(batch, grid[0] * grid[1], width)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, C) -> (B, N, C); softmax in float32."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        width = tokens.shape[-1]
        shape = (width, 3, self.heads, width // self.heads)
        # One matmul for q, k and v; written out because DenseGeneral cannot carry these axis names under set_mesh.
        init = nn.initializers.xavier_uniform(in_axis=0, out_axis=(2, 3), batch_axis=1)
        kernel = self.param("qkv_kernel", logical(init, "embed", None, "heads", None), shape, jnp.float32)
        bias = self.param("qkv_bias", logical(nn.initializers.zeros, None, "heads", None), shape[1:], jnp.float32)
        qkv = jnp.einsum("bnc,cqhd->qbnhd", tokens, kernel.astype(self.dtype))  # (3, B, N, heads, C/heads)
        query, key, value = qkv + bias.astype(self.dtype)[:, None, None]
        mixed = jax.nn.dot_product_attention(query, key, value)
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
        hidden = nn.gelu(hidden, approximate=False)
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
        tokens = nn.with_logical_constraint(tokens, ("batch", None, None))
        mixed = Attention(self.backbone.heads, self.dtype, name="attention")(
            LayerNorm(self.dtype, name="norm1")(tokens)
        )
        tokens = tokens + drop_path(self, mixed, drop_rate, train)
        hidden = self.backbone.mlp_ratio * self.backbone.width
        mixed = Mlp(hidden, self.dtype, name="mlp")(LayerNorm(self.dtype, name="norm2")(tokens))
        return tokens + drop_path(self, mixed, drop_rate, train), None
