"""Swin Transformer (Liu et al., 2021, arXiv 2103.14030): a pyramid of four stages at strides 4 to 32.

Attention is computed in windows, which every other block shifts by half their size. Maps are padded to whole windows,
as in the authors' code for dense prediction. Pairs of blocks are scanned, so a stage's parameters are stacked as
(pairs, ...). Dims: docs/conventions.md.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.models.backbones.backbone import Backbone, Tap
from taskexpert_jax.models.backbones.vit import Mlp, drop_path, patches_matmul
from taskexpert_jax.models.layers import Dtype, LayerNorm, dense, logical, unrolled
from taskexpert_jax.parallel import sharding

PATCH = 4  # stride of the first stage
STAGES = 4
MLP_RATIO = 4
_EPSILON = 1e-5  # of all layer norms
_FAR = -100.0  # added to the scores of tokens that only the shift has brought together


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Architecture of a Swin Transformer.

    Attributes:
      width: C of the first stage; doubles from stage to stage.
      depths: number of blocks of each stage, even.
      heads: attention heads of each stage.
      window: side of a window in tokens.
    """

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int


def _norm(dtype: Dtype, name: str) -> LayerNorm:
    return LayerNorm(dtype, _EPSILON, name=name)


@functools.cache
def relative_positions(window: int) -> np.ndarray:
    """Row of the table of relative positions for each pair of tokens in a window, (window^2, window^2) int."""
    places = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), axis=-1).reshape(-1, 2)
    offsets = places[:, None] - places[None] + window - 1
    return offsets[..., 0] * (2 * window - 1) + offsets[..., 1]


@functools.cache
def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """0 where two tokens of a shifted window are neighbours in the map, else a large negative score.

    (windows, window^2, window^2) float32. height, width: of the padded map, multiples of the window.
    """
    bands = [np.searchsorted([side - window, side - shift], np.arange(side), side="right") for side in (height, width)]
    regions = 3 * bands[0][:, None] + bands[1][None]
    of_windows = regions.reshape(height // window, window, width // window, window).swapaxes(1, 2)
    of_windows = of_windows.reshape(-1, window * window)
    return np.where(of_windows[:, :, None] == of_windows[:, None], 0.0, _FAR).astype(np.float32)


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows, with a learned bias for each relative position; softmax in float32."""

    heads: int
    window: int
    shift: int
    dtype: Dtype

    @nn.compact
    def __call__(self, maps: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        side, shift = self.window, self.shift
        batch, height, width, channels = maps.shape
        padded = jnp.pad(maps, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
        if shift:
            padded = jnp.roll(padded, (-shift, -shift), axis=(1, 2))
        _, rows, columns, _ = padded.shape
        windows = padded.reshape(batch, rows // side, side, columns // side, side, channels).swapaxes(2, 3)
        windows = windows.reshape(batch, -1, side * side, channels)  # (B, windows, tokens, C)
        windows = sharding.constrain(windows, "batch", None, None, None)
        mixed = self._attend(windows, shift_mask(rows, columns, side, shift) if shift else None)
        mixed = mixed.reshape(batch, rows // side, columns // side, side, side, channels).swapaxes(2, 3)
        mixed = mixed.reshape(batch, rows, columns, channels)
        if shift:
            mixed = jnp.roll(mixed, (shift, shift), axis=(1, 2))
        return mixed[:, :height, :width]

    def _attend(self, windows: Float[Array, "B W M C"], mask: np.ndarray | None) -> Float[Array, "B W M C"]:
        channels = windows.shape[-1]
        size = channels // self.heads
        init = nn.initializers.xavier_uniform(in_axis=0, out_axis=(2, 3), batch_axis=1)
        shape = (channels, 3, self.heads, size)
        kernel = self.param("qkv_kernel", logical(init, "embed", None, "heads", None), shape, jnp.float32)
        zeros = logical(nn.initializers.zeros, None, "heads", None)
        bias = self.param("qkv_bias", zeros, shape[1:], jnp.float32)
        count = (2 * self.window - 1) ** 2
        start = logical(nn.initializers.truncated_normal(0.02), None, "heads")
        table = self.param("relative_position_bias", start, (count, self.heads), jnp.float32)
        made = (
            jnp.einsum("bwnc,chd->bwnhd", windows, kernel[:, i].astype(self.dtype)) + bias[i].astype(self.dtype)
            for i in range(3)
        )
        query, key, value = (sharding.constrain(each, "batch", None, None, "heads", None) for each in made)
        with jax.named_scope("attend"):
            scores = jnp.einsum("bwnhd,bwmhd->bwhnm", query, key, preferred_element_type=jnp.float32) / math.sqrt(size)
            scores = scores + table[relative_positions(self.window)].transpose(2, 0, 1)
            if mask is not None:
                scores = scores + mask[:, None]
            weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
            mixed = jnp.einsum("bwhnm,bwmhd->bwnhd", weights, value).reshape(windows.shape)
        return dense(channels, self.dtype, "out", axes=("heads", "embed"))(mixed)


class Block(nn.Module):
    """Pre-norm block: attention in windows and MLP."""

    heads: int
    window: int
    shift: int
    dtype: Dtype

    @nn.compact
    def __call__(self, maps: Float[Array, "B h w C"], rate: Float[Array, ""], train: bool) -> Float[Array, "B h w C"]:
        batch, height, width, channels = maps.shape
        maps = sharding.constrain(maps, "batch", None, None, None)
        attention = WindowAttention(self.heads, self.window, self.shift, self.dtype, name="attention")
        mixed = attention(_norm(self.dtype, "norm1")(maps))
        tokens = (batch, height * width, channels)
        maps = maps + drop_path(self, mixed.reshape(tokens), rate, train).reshape(maps.shape)
        mlp = Mlp(MLP_RATIO * channels, "gelu", self.dtype, name="mlp")
        mixed = mlp(_norm(self.dtype, "norm2")(maps).reshape(tokens))
        return maps + drop_path(self, mixed, rate, train).reshape(maps.shape)


class Pair(nn.Module):
    """A block with plain windows, then one with windows shifted by half their size."""

    heads: int
    window: int
    dtype: Dtype

    @nn.compact
    def __call__(self, maps: Float[Array, "B h w C"], rates: Float[Array, "2"], train: bool) -> Float[Array, "B h w C"]:
        for index, (name, shift) in enumerate((("plain", 0), ("shifted", self.window // 2))):
            maps = Block(self.heads, self.window, shift, self.dtype, name=name)(maps, rates[index], train)
        return maps


class Merging(nn.Module):
    """Halves height and width and doubles the channels: 2x2 tokens are concatenated, normalised and projected."""

    dtype: Dtype

    @nn.compact
    def __call__(self, maps: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C2"]:
        batch, height, width, channels = maps.shape
        quads = maps.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        quads = sharding.constrain(
            quads.reshape(batch, height // 2, width // 2, 4 * channels), "batch", None, None, None
        )
        reduce = dense(2 * channels, self.dtype, "reduce", use_bias=False, axes=("embed", "mlp"))
        return sharding.constrain(reduce(_norm(self.dtype, "norm")(quads)), "batch", None, None, None)


class Swin(Backbone):
    """Swin Transformer; the taps are the maps after each stage, at strides 4, 8, 16 and 32.

    Attributes:
      architecture: see `Architecture`.
      drop_path: stochastic depth rate of the last block; rises linearly from 0.
      remat: rematerialise each pair of blocks in the backward pass.
      unroll: unroll the scans (same parameters): a larger program, faster on CPUs.
      dtype: compute dtype; parameters, statistics of norms and softmax are float32.
    """

    architecture: Architecture
    drop_path: float
    remat: bool
    unroll: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"], train: bool) -> tuple[Float[Array, "B _h _w _C"], ...]:
        swin = self.architecture
        init = logical(nn.initializers.lecun_normal(), None, None, None, "embed")
        zeros = logical(nn.initializers.zeros, "embed")
        size = (PATCH, PATCH)
        embed = nn.Conv(
            swin.width,
            size,
            strides=size,
            padding="VALID",
            dtype=self.dtype,
            kernel_init=init,
            bias_init=zeros,
            conv_general_dilated=patches_matmul,
            name="embedding",
        )
        maps = _norm(self.dtype, "embedding_norm")(embed(image))
        rates = jnp.linspace(0.0, self.drop_path, sum(swin.depths))
        pair = nn.remat(Pair, prevent_cse=False, static_argnums=(3,)) if self.remat else Pair

        def step(pair: Pair, maps: jax.Array, rates: jax.Array) -> tuple[jax.Array, None]:
            return pair(maps, rates, train), None

        taps, first = [], 0
        for stage, (depth, heads) in enumerate(zip(swin.depths, swin.heads, strict=True)):
            if stage:
                maps = Merging(self.dtype, name=f"merging_{stage}")(maps)
            scanned = nn.scan(
                step,
                length=depth // 2,
                variable_axes={"params": 0},
                split_rngs={"params": True, "drop_path": True},
                metadata_params={nn.PARTITION_NAME: "layers"},
                unroll=depth // 2 if self.unroll else 1,
            )
            blocks = pair(heads, swin.window, self.dtype, name=f"stage_{stage}")
            maps, _ = scanned(blocks, maps, rates[first : first + depth].reshape(-1, 2))
            taps.append(maps)
            first += depth
        return tuple(taps)

    @property
    def stride(self) -> int:
        return PATCH * 2 ** (STAGES - 1)

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(Tap(PATCH * 2**stage, self.architecture.width * 2**stage) for stage in range(STAGES))

    @property
    def layers(self) -> int:
        return sum(self.architecture.depths) + 1

    def layer(self, name: str) -> int | tuple[int, ...] | None:
        """0 for the embedding, then the blocks of all stages; a merging is in the layer of the block after it."""
        first, _, rest = name.partition("/")
        if first in ("embedding", "embedding_norm"):
            return 0
        kind, _, index = first.partition("_")
        if kind not in ("merging", "stage") or not index.isdigit():
            return None
        before = sum(self.architecture.depths[: int(index)])
        if kind == "merging":  # of the stage that it begins
            return before + 1
        start = before + (1 if rest.startswith("plain") else 2)
        return tuple(range(start, before + self.architecture.depths[int(index)] + 1, 2))

    def multiply_adds(self, height: int, width: int) -> int:
        """As in the papers' counters: windows are counted with their padding."""
        swin, count = self.architecture, PATCH**2 * 3 * self.architecture.width * (height // PATCH) * (width // PATCH)
        for stage, (tap, depth) in enumerate(zip(self.taps, swin.depths, strict=True)):
            rows, columns, channels = height // tap.stride, width // tap.stride, tap.channels
            tokens = rows * columns
            padded = (rows + -rows % swin.window) * (columns + -columns % swin.window)
            attention = 4 * channels**2 * padded + 2 * padded * swin.window**2 * channels
            count += depth * (attention + 2 * MLP_RATIO * channels**2 * tokens)
            count += 2 * channels**2 * tokens if stage else 0  # the merging before: 4 (C / 2) x C
        return count


def from_config(config: ConfigDict, device: Any) -> Swin:
    """The Swin Transformer of `config.model.swin` for a device."""
    model, sizes = config.model, config.model.swin
    architecture = Architecture(sizes.width, tuple(sizes.depths), tuple(sizes.heads), sizes.window)
    unroll = unrolled(model.unroll, device)
    return Swin(architecture, model.drop_path, model.remat, unroll, jnp.dtype(config.dtype))
