"""Preprocessing of a batch inside the jitted step: normalisation and padding masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Integer, Shaped, UInt8
import numpy as np

from taskexpert_jax.config import Normalisation


def normalise(
    image: UInt8[Array | np.ndarray, "B H W 3"], window: Integer[Array | np.ndarray, "B 4"], by: Normalisation
) -> Float32[Array, "B H W 3"]:
    """Normalises images; exactly 0 in the padding.

    Args:
      image: (B, H, W, 3) uint8.
      window: (B, 4) int32: top, left, height, width of the image inside its padding.
      by: the model's normalisation, `MultiTaskModel.normalisation`.

    Returns:
      (B, H, W, 3) float32.
    """
    with jax.named_scope("inputs"):
        scaled = (jnp.asarray(image, jnp.float32) / 255.0 - jnp.asarray(by.mean)) / jnp.asarray(by.std)
        return scaled * inside(window, *image.shape[1:3])[..., None]


def inside(window: Integer[Array | np.ndarray, "B 4"], height: int, width: int) -> Bool[Array, "B H W"]:
    """Mask (B, height, width) bool of the image; False in the padding."""
    top, left, rows, columns = (window[:, i, None] for i in range(4))
    row, column = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (row >= top) & (row < top + rows)  # (B, height)
    in_columns = (column >= left) & (column < left + columns)  # (B, width)
    return in_rows[:, :, None] & in_columns[:, None, :]


def token_pixels(
    window: Integer[Array | np.ndarray, "B 4"],
    mask: Shaped[Array | np.ndarray, "B"],  # noqa: F821
    image_size: tuple[int, int],
    stride: int,
) -> Float32[Array, "B N"]:
    """Number of image pixels in each token, (B, N) float32; 0 in the padding and for padding examples.

    Args:
      window: (B, 4) int32, top, left, height and width of the image inside its padding.
      mask: (B,), 0 for padding examples.
      image_size: H, W; multiples of `stride`.
      stride: side of a token in pixels.
    """
    height, width = image_size
    real = inside(window, height, width) & (mask > 0)[:, None, None]
    squares = real.reshape(len(mask), height // stride, stride, width // stride, stride)
    return squares.sum(axis=(2, 4)).reshape(len(mask), -1).astype(jnp.float32)
