"""Steps 1 and 2 of the boundary benchmark: non-maximum suppression of predictions, boundary maps of labels.

Source: P. Dollar's edge toolbox (triangle filter, orientation, non-maximum suppression) and the boundary map of the
Berkeley benchmark. All computations are float32 in the original's order of operations, because on a boundary of
constant strength the last bit decides.
"""

import numba
import numpy as np
from scipy import ndimage

RADIUS = 4  # radius of the triangle filter in pixels
SLACK = np.float32(1.01)  # a pixel is suppressed only by a neighbour that is more than 1 % stronger
BORDER = 5  # width in pixels over which candidates fade out towards the image border

_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_SCALE = np.float32(1) / np.float32((RADIUS + 1) ** 4)
_PI = np.float32(np.pi)


def candidates(prediction: np.ndarray) -> np.ndarray:
    """Boundary strength after non-maximum suppression, (H, W) float32 in [0, 1].

    prediction: (H, W) uint8, the boundary probability in 8 bits; H and W at least 2.
    """
    strength = prediction.astype(np.float32) / np.float32(255)
    return fade_border(suppress(strength, orientation(triangle_filter(strength))))


def triangle_filter(image: np.ndarray) -> np.ndarray:
    """Separable triangle filter, [1 2 3 4 5 4 3 2 1] / 25, with mirrored borders; (H, W) float32."""
    if min(image.shape) <= 2 * RADIUS + 1:  # too small for the running sums, which mirror the border only once
        taps = np.bartlett(2 * RADIUS + 3)[1:-1] / (RADIUS + 1)
        for axis in (0, 1):
            image = ndimage.correlate1d(image, taps, axis=axis, mode="reflect")
        return image.astype(np.float32)
    along_x = _running_triangle(np.ascontiguousarray(image.T, np.float32), _SCALE)  # (W, H)
    return _running_triangle(np.ascontiguousarray(along_x.T), _ONE)


@numba.njit(cache=True, nogil=True)
def _running_triangle(image: np.ndarray, scale: np.float32) -> np.ndarray:
    """Filter along the first axis by running float32 sums, with the drift (4e-5) of the original."""
    length, width = image.shape
    result = np.empty_like(image)
    for x in range(width):
        slope = total = image[0, x]
        for i in range(1, RADIUS + 1):
            slope += image[i, x]
            total += slope
        total = (_TWO * total - slope) * scale
        slope = _ZERO
        result[0, x] = total
        for i in range(1, length):
            left, right = i - 2 - RADIUS, i + RADIUS
            left = -1 - left if left < 0 else left
            right = 2 * length - 1 - right if right >= length else right
            slope += (image[left, x] + image[right, x]) - _TWO * image[i - 1, x]
            total += scale * slope
            result[i, x] = total
    return result


def orientation(smooth: np.ndarray) -> np.ndarray:
    """Direction normal to the boundary, from second derivatives; (H, W) float32 in radians, [0, pi).

    0 is along x, to the right; pi / 2 is along y, downwards.
    """
    dy, dx = np.gradient(smooth)
    dxx = np.gradient(dx, axis=1)
    dyy, dxy = np.gradient(dy)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is set to 0 below
        ratio = dyy * np.sign(-dxy) / (dxx + np.float32(1e-5))
    angle = _rounded(np.arctan, np.nan_to_num(ratio, nan=0.0))
    return np.where(angle < 0, angle + _PI, angle)


def suppress(strength: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Non-maximum suppression: 0 where a point one pixel further along `angle`, on either side, is over 1 % stronger.

    strength, angle: (H, W) float32. Plateaus and ties are kept; thinning reduces them.
    """
    return _suppress(np.ascontiguousarray(strength), _rounded(np.cos, angle), _rounded(np.sin, angle))


def _rounded(function: np.ufunc, values: np.ndarray) -> np.ndarray:
    """Evaluates in float64 and rounds to float32, because float32 implementations differ between processors."""
    return function(values, dtype=np.float64).astype(np.float32)


@numba.njit(cache=True, nogil=True)
def _suppress(strength: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    height, width = strength.shape
    last_x, last_y = np.float32(width - 1.001), np.float32(height - 1.001)
    result = np.zeros_like(strength)
    for y in range(height):
        for x in range(width):
            if strength[y, x] == _ZERO:
                continue
            raised = strength[y, x] * SLACK
            peak = True
            for side in (-_ONE, _ONE):
                at_x = min(max(np.float32(x) + side * cosine[y, x], _ZERO), last_x)
                at_y = min(max(np.float32(y) + side * sine[y, x], _ZERO), last_y)
                if raised < _interpolate(strength, at_x, at_y):
                    peak = False
                    break
            if peak:
                result[y, x] = strength[y, x]
    return result


@numba.njit(cache=True, nogil=True)
def _interpolate(image: np.ndarray, x: np.float32, y: np.float32) -> np.float32:
    """Bilinear interpolation at a point inside the image."""
    left, top = int(x), int(y)
    right_share, low_share = x - np.float32(left), y - np.float32(top)
    left_share, top_share = _ONE - right_share, _ONE - low_share
    return (
        image[top, left] * left_share * top_share
        + image[top, left + 1] * right_share * top_share
        + image[top + 1, left] * left_share * low_share
        + image[top + 1, left + 1] * right_share * low_share
    )


def fade_border(strength: np.ndarray) -> np.ndarray:
    """Strength multiplied by 0, 0.2, 0.4, 0.6, 0.8 on the five outermost rows and columns; (H, W) float32."""
    height, width = strength.shape
    reach = min(BORDER, height // 2, width // 2)
    result = strength.copy()
    for i in range(reach):
        share = np.float32(i) / np.float32(reach)
        result[:, [i, width - 1 - i]] *= share
    for i in range(reach):
        share = np.float32(i) / np.float32(reach)
        result[[i, height - 1 - i]] *= share
    return result


def region_boundaries(labels: np.ndarray) -> np.ndarray:
    """Boundary pixels: those whose label differs from the pixel to the right, below, or below right; (H, W) bool.

    The last row is compared only to the right, the last column only downwards. Boundaries lie on the upper left side.
    labels: (H, W) integers; no value is special, so unlabelled pixels are one more region.
    """
    boundary = np.zeros(labels.shape, bool)
    boundary[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    boundary[:-1] |= labels[:-1] != labels[1:]
    boundary[:-1, :-1] |= labels[:-1, :-1] != labels[1:, 1:]
    return boundary
