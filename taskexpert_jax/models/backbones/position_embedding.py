"""Position embeddings resized to another token grid, as the benchmark's family does it.

Same as PyTorch's `interpolate(mode="bicubic", align_corners=False)`: Keys' kernel with a = -0.75, half-pixel centres,
clamped borders, no antialiasing. JAX's "cubic" has a = -0.5, so it differs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

_A = -0.75


def _kernel(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at a distance in source samples."""
    x = np.abs(distance)
    near = (_A + 2) * x**3 - (_A + 3) * x**2 + 1
    far = _A * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def weights(source: int, target: int) -> np.ndarray:
    """Interpolation weights along one axis, (target, source) float64."""
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((target, source))
    for offset in range(4):
        sample = first + offset
        np.add.at(matrix, (np.arange(target), np.clip(sample, 0, source - 1)), _kernel(centre - sample))
    return matrix


def resize(
    positions: Float[Array | np.ndarray, "h w C"], grid: tuple[int, int]
) -> Float[Array | np.ndarray, "h2 w2 C"]:
    """Position embeddings on the token grid `grid`; the same array where the grid is the same."""
    height, width = positions.shape[:2]
    if (height, width) == tuple(grid):
        return positions
    rows, columns = (jnp.asarray(weights(*of), jnp.float32) for of in ((height, grid[0]), (width, grid[1])))
    return jnp.einsum("Hh,Ww,hwc->HWc", rows, columns, positions, precision="highest")
