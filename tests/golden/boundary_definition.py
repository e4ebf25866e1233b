"""Reference implementation of the boundary benchmark (odsF) in NumPy and SciPy, independent of the package.

Short and slow: one threshold at a time, thinning by scikit-image, matching by SciPy's maximum flow. Source: the
MATLAB evaluation of J. Pont-Tuset (SEISM) with P. Dollar's edge code and the matching of the Berkeley benchmark.
"""

import numpy as np
from scipy import sparse
from skimage import morphology

THRESHOLDS = (0.001, *(k / 100 for k in range(1, 100)), 0.999)
F32 = np.float32


def image_counts(prediction: np.ndarray, label: np.ndarray, max_dist: float) -> np.ndarray:
    """Numbers of pairs, true pixels and predicted pixels, (3, 101).

    prediction: (H, W) uint8. label: (H, W) integer region ids.
    """
    strength = candidates(prediction)
    truth = morphology.thin(boundaries(label))
    distance = max_dist * np.hypot(*label.shape)
    rows = []
    for threshold in THRESHOLDS:
        predicted = morphology.thin(strength > F32(threshold))
        rows.append([pairs(predicted, truth, distance), truth.sum(), predicted.sum()])
    return np.array(rows).T


def candidates(prediction: np.ndarray) -> np.ndarray:
    """Non-maximum suppression and fading at the border, float32 in the original's order of operations."""
    strength = prediction.astype(F32) / F32(255)
    smooth = _triangle(_triangle(strength.T, F32(1) / F32(625)).T, F32(1))
    dy, dx = np.gradient(smooth)
    dxx, (dyy, dxy) = np.gradient(dx, axis=1), np.gradient(dy)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.nan_to_num(dyy * np.sign(-dxy) / (dxx + F32(1e-5)), nan=0.0)
    angle = np.arctan(slope.astype(float)).astype(F32)
    angle = np.where(angle < 0, angle + F32(np.pi), angle).astype(float)
    across = np.stack([np.sin(angle), np.cos(angle)]).astype(F32)
    here = np.indices(strength.shape).astype(F32)
    beaten = np.zeros(strength.shape, bool)
    for side in (F32(-1), F32(1)):
        beaten |= strength * F32(1.01) < _bilinear(strength, *(here + side * across))
    kept = np.where(beaten, F32(0), strength)
    for axis, size in ((1, kept.shape[1]), (0, kept.shape[0])):
        reach = min(5, kept.shape[0] // 2, kept.shape[1] // 2)
        inwards = np.minimum(np.arange(size), np.arange(size)[::-1])
        fade = np.minimum(inwards.astype(F32) / F32(reach), F32(1))
        kept = kept * (fade if axis == 1 else fade[:, None])
    return kept


def _triangle(image: np.ndarray, scale: np.float32) -> np.ndarray:
    """Filter [1 2 3 4 5 4 3 2 1] along the first axis (over 9 rows) by running sums, with mirrored borders."""
    mirrored = np.concatenate([image[5::-1], image, image[:-6:-1]])  # row i of the image is row i + 6
    slope = total = image[0]
    for i in range(1, 5):
        slope = slope + image[i]
        total = total + slope
    total, slope = (F32(2) * total - slope) * scale, np.zeros_like(total)
    rows = [total]
    for i in range(1, len(image)):
        slope = slope + ((mirrored[i] + mirrored[i + 10]) - F32(2) * image[i - 1])
        total = total + scale * slope
        rows.append(total)
    return np.stack(rows)


def _bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    y, x = (np.clip(v, F32(0), F32(size - 1.001)) for v, size in zip((y, x), image.shape, strict=True))
    top, left = y.astype(int), x.astype(int)
    low, right = y - top.astype(F32), x - left.astype(F32)
    high, near = F32(1) - low, F32(1) - right
    return (
        image[top, left] * near * high
        + image[top, left + 1] * right * high
        + image[top + 1, left] * near * low
        + image[top + 1, left + 1] * right * low
    )


def boundaries(label: np.ndarray) -> np.ndarray:
    """Pixels whose label differs from the one to the right, below, or below right."""
    padded = np.pad(label, ((0, 1), (0, 1)), mode="edge")
    result = (padded[:-1, 1:] != label) | (padded[1:, :-1] != label)
    result[:-1, :-1] |= label[1:, 1:] != label[:-1, :-1]
    return result


def pairs(predicted: np.ndarray, truth: np.ndarray, distance: float) -> int:
    """Size of a maximum matching of pixels at most `distance` apart, as the maximum flow with unit capacities."""
    ours, theirs = np.argwhere(predicted), np.argwhere(truth)
    near = ((ours[:, None] - theirs) ** 2).sum(axis=-1) <= distance**2
    begin, end = np.nonzero(near)
    source, first, second, sink = 0, 1, 1 + len(ours), 1 + len(ours) + len(theirs)
    tails = np.concatenate([np.full(len(ours), source), first + begin, second + np.arange(len(theirs))])
    heads = np.concatenate([first + np.arange(len(ours)), second + end, np.full(len(theirs), sink)])
    graph = sparse.csr_array((np.ones(len(tails), np.int32), (tails, heads)), shape=(sink + 1, sink + 1))
    return int(sparse.csgraph.maximum_flow(graph, source, sink, method="dinic").flow_value)


def scores(counts: np.ndarray) -> dict[str, float]:
    """odsF, oisF and AP in percent, and odsF's threshold, from counts of several images, (images, 3, 101)."""
    precision, recall, f = _curve(*counts.sum(axis=0))
    best = [counts[i, :, _curve(*image)[2].argmax()] for i, image in enumerate(counts)]
    reached, first = np.unique(recall, return_index=True)
    at_recall = np.interp(np.arange(101) / 100, reached, precision[first], left=0, right=0)
    return {
        "odsF": 100 * float(f.max()),
        "odsF_threshold": THRESHOLDS[int(f.argmax())],
        "oisF": 100 * float(_curve(*np.sum(best, axis=0, keepdims=True).T)[2][0]),
        "AP": float(at_recall.sum()),
    }


def _curve(matched: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F; (0, 1, 0) without true pixels and (1, 0, 0) without predicted pixels."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(predicted == 0, 1, np.where(true == 0, 0, matched / predicted))
        recall = np.where(predicted == 0, 0, np.where(true == 0, 1, matched / true))
        f = 2 * precision * recall / (precision + recall)
    return precision, recall, np.nan_to_num(f)
