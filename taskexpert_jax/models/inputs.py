"""From a batch's uint8 picture to what the backbone sees; runs inside the jitted step."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from taskexpert_jax.errors import UserError


class Normalisation(NamedTuple):
    """Of colours in 0..1, red, green, blue: what is taken from them, and what they are divided by then."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# ImageNet's statistics: the family's choice for all backbones.
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalisation(config: Any) -> Normalisation:
    """That of `config.model.image_mean` and `config.model.image_std`.

    Raises:
      UserError: not three numbers each, or a deviation that is not positive.
    """
    found = Normalisation(tuple(config.model.image_mean), tuple(config.model.image_std))
    for name, values in found._asdict().items():
        known = len(values) == 3 and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not known or (name == "std" and min(values) <= 0):
            raise UserError(
                f"config.model.image_{name}={values}: give three {'positive ' * (name == 'std')}numbers, for red, "
                "green and blue in 0..1"
            )
    return found


def frame_size(config: Any) -> tuple[int, int]:
    """The frames that images are padded into for evaluation: `eval.image_size`, or `dataset.image_size` where empty.

    Raises:
      UserError: frames smaller than `dataset.image_size`, or no size at all.
    """
    smallest = tuple(config.dataset.image_size)
    size = tuple(config.eval.image_size) or smallest
    if len(size) != 2 or any(type(side) is not int for side in size):
        raise UserError(f"config.eval.image_size={size}: give a height and a width in pixels, or () for the usual")
    if size[0] < smallest[0] or size[1] < smallest[1]:
        raise UserError(
            f"config.eval.image_size={size[0]}x{size[1]} is smaller than config.dataset.image_size="
            f"{smallest[0]}x{smallest[1]}, the size that the model was trained for; give as much or more, or ()"
        )
    return size


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


def token_pixels(window: jax.Array, mask: jax.Array, image_size: tuple[int, int], patch: int) -> jax.Array:
    """(B, N) float32: how many pixels of each token's square are of the picture; 0 in padding and padding examples.

    Args:
      window: (B, 4) int32, top, left, height and width of the picture inside its padding.
      mask: (B,), 0 for padding examples.
      image_size: H, W; multiples of `patch`, the side of a token's square in pixels.
      patch: that side.
    """
    height, width = image_size
    real = inside(window, height, width) & (mask > 0)[:, None, None]
    squares = real.reshape(len(mask), height // patch, patch, width // patch, patch)
    return squares.sum(axis=(2, 4)).reshape(len(mask), -1).astype(jnp.float32)
