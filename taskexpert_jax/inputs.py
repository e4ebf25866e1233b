"""From a batch's uint8 picture to what the backbone sees; runs inside the jitted step."""

import jax
import jax.numpy as jnp

# ImageNet statistics: the family's choice for all backbones.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(image: jax.Array, window: jax.Array) -> jax.Array:
    """Normalised picture, exactly 0 in the padding.

    Args:
      image: (B, H, W, 3) uint8.
      window: (B, 4) int32: top, left, height, width of the real picture.

    Returns:
      (B, H, W, 3) float32.
    """
    scaled = (image.astype(jnp.float32) / 255.0 - jnp.asarray(MEAN)) / jnp.asarray(STD)
    return scaled * inside(window, *image.shape[1:3])[..., None]


def inside(window: jax.Array, height: int, width: int) -> jax.Array:
    """(B, height, width) bool: where the real picture is."""
    top, left, rows, columns = (window[:, i, None] for i in range(4))
    row, column = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (row >= top) & (row < top + rows)  # (B, height)
    in_columns = (column >= left) & (column < left + columns)  # (B, width)
    return in_rows[:, :, None] & in_columns[:, None, :]
