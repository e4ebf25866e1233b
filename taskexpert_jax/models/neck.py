"""Neck between a pyramid and a decoder: taps of any strides and channels, on one grid and with one width."""

import flax.linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from taskexpert_jax.errors import UserError
from taskexpert_jax.models.backbones.backbone import Tap
from taskexpert_jax.models.layers import Dtype, LayerNorm, dense
from taskexpert_jax.models.upsampling import resize_bilinear

_STRIDE = 16  # default of `config.model.grid_stride`
NECK = "neck"  # name of the module, and of its part of the budget


class Neck(nn.Module):
    """Normalises and projects each tap (1x1 convolution); finer ones are averaged before, coarser ones upsampled after.

    Attributes:
      taps: shapes of the backbone's taps; their strides divide that of the result or are its multiples.
      to: shape of each tap of the result.
      dtype: compute dtype.
    """

    taps: tuple[Tap, ...]
    to: Tap
    dtype: Dtype

    @nn.compact
    def __call__(self, taps: tuple[Float[Array, "B _h _w _C"], ...]) -> tuple[Float[Array, "B h w C"], ...]:
        return tuple(self._fused(index, tap) for index, tap in enumerate(taps))

    def _fused(self, index: int, tap: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C2"]:
        maps = LayerNorm(self.dtype, name=f"norm_{index}")(tap)
        batch, height, width, channels = maps.shape
        stride = self.taps[index].stride
        factor = self.to.stride // stride
        if factor > 1:
            maps = maps.reshape(batch, height // factor, factor, width // factor, factor, channels).mean(axis=(2, 4))
        maps = dense(self.to.channels, self.dtype, f"project_{index}")(maps)
        if stride > self.to.stride:
            factor = stride // self.to.stride
            maps = resize_bilinear(maps, height * factor, width * factor).astype(self.dtype)
        return maps

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of one image of this size."""
        tokens = (height * width // max(tap.stride, self.to.stride) ** 2 for tap in self.taps)
        return sum(n * tap.channels * self.to.channels for n, tap in zip(tokens, self.taps, strict=True))


def from_config(config: ConfigDict, taps: tuple[Tap, ...], dtype: Dtype) -> Neck | None:
    """The neck for a backbone's taps; None where they have one shape already.

    Raises:
      UserError: `config.model.grid_stride` is not the stride of a tap.
    """
    if len(set(taps)) == 1:
        return None
    stride = config.model.get("grid_stride", _STRIDE)  # a backbone of one's own may leave it out
    fitting = [tap for tap in taps if tap.stride == stride]
    if not fitting:
        strides = ", ".join(str(tap.stride) for tap in taps)
        raise UserError(f"config.model.grid_stride={stride}: must be the stride of a tap of the backbone: {strides}")
    return Neck(taps, fitting[-1], dtype)
