"""Best constant prediction of a task: the baseline that a trained model must beat.

Each function takes the valid labels of a sample, (n, label_channels) float64, and returns the (channels,) prediction
that scores best when every pixel gets it. `evaluation.best_constant` scores it with the task's own metric.
"""

from collections.abc import Callable

import numpy as np

_LOGIT = 20.0  # large enough for a softmax or sigmoid of 1 in float32


def majority_class(count: int) -> Callable[[np.ndarray], np.ndarray]:
    """Logits of the most frequent class, the constant prediction with the best mean IoU."""

    def fit(labels: np.ndarray) -> np.ndarray:
        frequency = np.bincount(labels[:, 0].astype(np.int64), minlength=count)
        return np.where(np.arange(count) == frequency.argmax(), _LOGIT, 0.0)

    return fit


def mean_value(labels: np.ndarray) -> np.ndarray:
    """Mean, which minimises the RMSE."""
    return labels.mean(axis=0)


def mean_below(limit: float) -> Callable[[np.ndarray], np.ndarray]:
    """Mean of the values below `limit`, which minimises the RMSE over them; the mean of all if there are none."""

    def fit(labels: np.ndarray) -> np.ndarray:
        below = labels[labels[:, 0] < limit]
        return mean_value(below if len(below) else labels)

    return fit


def best_direction(labels: np.ndarray) -> np.ndarray:
    """Unit vector with the smallest mean angle to the labels, among 1000 candidates spread over the sphere."""
    count = 1000
    height = 1 - 2 * (np.arange(count) + 0.5) / count
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(count)  # golden angle: Fibonacci sphere
    radius = np.sqrt(1 - height**2)
    candidates = np.stack([radius * np.cos(turn), radius * np.sin(turn), height], axis=-1)
    sample = labels[:: max(1, len(labels) // 20_000)]
    sample = sample / np.maximum(np.linalg.norm(sample, axis=-1, keepdims=True), 1e-12)
    angles = np.arccos(np.clip(sample @ candidates.T, -1, 1)).mean(axis=0)
    return candidates[angles.argmin()]


def best_edge_logit(pos_weight: float) -> Callable[[np.ndarray], np.ndarray]:
    """Logit that minimises the boundary loss, in which positives weigh p = `pos_weight` and negatives 1 - p."""

    def fit(labels: np.ndarray) -> np.ndarray:
        positive = float(np.clip(labels.mean(), 1e-6, 1 - 1e-6))
        return np.array([np.log(pos_weight * positive / ((1 - pos_weight) * (1 - positive)))])

    return fit


def always_foreground(labels: np.ndarray) -> np.ndarray:
    """Logits of foreground at every pixel: recall is 1, precision the share of the foreground."""
    del labels
    return np.array([0.0, _LOGIT])
