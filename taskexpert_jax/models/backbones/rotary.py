"""Rotary position embeddings of DINOv3 (arXiv 2508.10104; rotary embeddings: arXiv 2104.09864).

The centre of a patch has coordinates in [-1, 1] along each axis of the image, whatever its size, so nothing is learned
or resized. A quarter of a head's channels rotates with each coordinate and half of a rotation. In pretraining DINOv3
also shifts and rescales coordinates at random; here it does not.
"""

import functools
import math

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

_BASE = 100.0  # periods rise from 1 to nearly this


@functools.cache
def angles(grid: tuple[int, int], size: int) -> np.ndarray:
    """Angles of the patches of a token grid, (N, 1, size) float32; size: channels of a head, a multiple of 4."""
    periods = _BASE ** (2 * np.arange(size // 4, dtype=np.float32) / (size // 2))
    axes = [2 * (np.arange(count, dtype=np.float32) + 0.5) / count - 1 for count in grid]
    coordinates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2, 1)  # (N, 2, 1)
    of_axes = (2 * math.pi * coordinates / periods).reshape(len(coordinates), 1, size // 2)
    return np.tile(of_axes, 2).astype(np.float32)


def rotate(of_heads: Float[Array, "B M heads d"], grid: tuple[int, int]) -> Float[Array, "B M heads d"]:
    """Queries or keys rotated by their positions, in float32; tokens before those of the patches stay as they are."""
    turn = angles(grid, of_heads.shape[-1])
    extra, patches = jnp.split(of_heads, [of_heads.shape[1] - len(turn)], axis=1)
    values = patches.astype(jnp.float32)
    first, second = jnp.split(values, 2, axis=-1)
    rotated = values * np.cos(turn) + jnp.concatenate([-second, first], axis=-1) * np.sin(turn)
    return jnp.concatenate([extra, rotated.astype(of_heads.dtype)], axis=1)
