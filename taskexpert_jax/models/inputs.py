"""From a batch's uint8 picture to what the backbone sees; runs inside the jitted step."""

import jax
import jax.numpy as jnp

from taskexpert_jax.config import Normalisation


def normalise(image: jax.Array, window: jax.Array, by: Normalisation) -> jax.Array:
    """Normalised picture, exactly 0 in the padding.

    Args:
      image: (B, H, W, 3) uint8.
      window: (B, 4) int32: top, left, height, width of the real picture.
      by: the model's own normalisation, `TaskExpert.normalisation`.

    Returns:
      (B, H, W, 3) float32.
    """
    scaled = (image.astype(jnp.float32) / 255.0 - jnp.asarray(by.mean)) / jnp.asarray(by.std)
    return scaled * inside(window, *image.shape[1:3])[..., None]


def inside(window: jax.Array, height: int, width: int) -> jax.Array:
    """(B, height, width) bool: where the real picture is."""
    top, left, rows, columns = (window[:, i, None] for i in range(4))
    row, column = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (row >= top) & (row < top + rows)  # (B, height)
    in_columns = (column >= left) & (column < left + columns)  # (B, width)
    return in_rows[:, :, None] & in_columns[:, None, :]
