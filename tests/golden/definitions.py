"""Reference definitions of losses, their gradients, and metrics in NumPy float64, independent of the package.

All take the prediction (B, H, W, c) and the label (B, H, W, c_label) of whole images. `task` is semseg (c classes;
human parts are defined in the same way), sal, normals, edge, depth or, for metrics alone, disparity. Source: the
definitions shared by ATRC, InvPT, TaskPrompter and MLoRE; of disparity, LibMTL's and MTMamba's.
"""

import numpy as np
from scipy.special import expit, log_expit, log_softmax

EDGE_WEIGHT = 0.95  # weight of the positives


def ignore_value(task: str) -> int:
    return -1 if task in ("depth", "disparity") else 255


def loss(task: str, prediction: np.ndarray, label: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss over the valid pixels, and its gradient with respect to the prediction; both 0 without valid pixels."""
    valid = (label != ignore_value(task)).all(axis=-1)
    gradient = np.zeros(prediction.shape)
    if not valid.any():
        return 0.0, gradient
    p, g = prediction[valid].astype(np.float64), label[valid].astype(np.float64)
    values, slopes = _LOSSES[task](p, g)
    gradient[valid] = slopes / len(g)
    return float(values.sum() / len(g)), gradient


def _cross_entropy(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    own = g == np.arange(p.shape[-1])
    log_probability = log_softmax(p, axis=-1)
    return -log_probability[own], np.exp(log_probability) - own


def _balanced_cross_entropy(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    negatives = (g == 0).mean()
    weight = np.where(g == 1, negatives, 1 - negatives)
    values, slopes = _cross_entropy(p, g)
    return weight[:, 0] * values, weight * slopes


def _edge_loss(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The family's form: positives are scaled by w / (1 - w), the mean by 1 - w."""
    factor = 1 / (1 - EDGE_WEIGHT)
    weight = np.where(g == 1, EDGE_WEIGHT * factor, 1) / factor
    return -weight * np.where(g == 1, log_expit(p), log_expit(-p)), weight * (expit(p) - (g == 1))


def _normals_l1(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = np.linalg.norm(p, axis=-1, keepdims=True)
    unit = p / length
    sign = np.sign(unit - g)
    along = (sign * unit).sum(axis=-1, keepdims=True)
    return np.abs(unit - g).sum(axis=-1), (sign - along * unit) / length


def _depth_l1(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.abs(p - g), np.sign(p - g)


_LOSSES = {
    "semseg": _cross_entropy,
    "sal": _balanced_cross_entropy,
    "edge": _edge_loss,
    "normals": _normals_l1,
    "depth": _depth_l1,
}


def metrics(task: str, prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """All values of the task's metric, with pixels pooled over the images."""
    valid = (label != ignore_value(task)).all(axis=-1)
    if task == "depth":
        valid &= ((label > 0) & (label < 80))[..., 0]
    if task == "disparity":
        valid &= ((label > 0) & (label < 256))[..., 0]
    values = _METRICS[task](prediction[valid].astype(np.float64), label[valid].astype(np.float64))
    return {name: float(value) for name, value in values.items()}


def _iou(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    predicted, g = p.argmax(axis=-1), g[:, 0]
    classes = range(p.shape[-1])
    unions = [np.sum((predicted == c) | (g == c)) for c in classes]
    ious = [np.sum((predicted == c) & (g == c)) / max(union, 1) for c, union in zip(classes, unions, strict=True)]
    return {"mIoU": 100 * np.mean(ious), "pixel_accuracy": 100 * np.mean(predicted == g)}


def _depth(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    positive, p = np.where(p <= 0, 1e-9, p), np.maximum(p, 0)
    factor = np.maximum(positive / g, g / positive)
    return {
        "rmse": np.sqrt(np.mean((p - g) ** 2)),
        "log_rmse": np.sqrt(np.mean(np.log(positive / g) ** 2)),
        "abs_err": np.mean(np.abs(p - g)),
        "abs_rel": np.mean(np.abs(p - g) / g),
        "sq_rel": np.mean((p - g) ** 2 / g),
        **{f"delta{k}": np.mean(factor < 1.25**k) for k in (1, 2, 3)},
    }


def _disparity(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    error = np.maximum(p, 0) - g
    return {
        "rmse_80": np.sqrt(np.mean(error[g < 80] ** 2)),
        "rmse": np.sqrt(np.mean(error**2)),
        "abs_err": np.mean(np.abs(error)),
        "abs_rel": np.mean(np.abs(error) / g),
    }


def _normals(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    p, g = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (p, g))
    angle = np.degrees(2 * np.arctan2(np.linalg.norm(p - g, axis=-1), np.linalg.norm(p + g, axis=-1)))
    within = {f"within_{limit:g}": 100 * np.mean(angle < limit) for limit in (11.25, 22.5, 30)}
    return {"mean": angle.mean(), "rmse": np.sqrt(np.mean(angle**2)), "median": np.median(angle), **within}


def _saliency(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    probability, g = expit(p[:, 1] - p[:, 0]), g[:, 0] == 1

    def best_f(score: np.ndarray) -> float:
        scores = [0.0]
        for threshold in np.linspace(0.05, 0.95, 19):
            found = np.sum((score > threshold) & g)
            if found:
                precision, recall = found / np.sum(score > threshold), found / np.sum(g)
                scores.append(1.3 * precision * recall / (0.3 * precision + recall))
        return 100 * max(scores)

    return {"maxF": best_f(expit(probability)), "maxF_plain": best_f(probability), "mae": np.mean(abs(probability - g))}


def _edge(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    return {"loss": _edge_loss(expit(p), g)[0].mean(), "loss_plain": _edge_loss(p, g)[0].mean()}


_METRICS = {
    "semseg": _iou,
    "sal": _saliency,
    "edge": _edge,
    "normals": _normals,
    "depth": _depth,
    "disparity": _disparity,
}
