"""Between a task's predictions, the values that a user sees, and the numbers in which predictions are averaged.

The kinds name these functions: see `Kind.values`, `from_values`, `to_mean` and `from_mean`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.tasks.metrics.segmentation import largest_class


def first_channel(label: Any) -> Any:
    """(..., 1) -> (...)."""
    return label[..., 0]


def one_channel(values: np.ndarray) -> np.ndarray:
    """(...) -> (..., 1)."""
    return values[..., None]


def unchanged(values: Any) -> Any:
    """What it is given."""
    return values


def class_ids(logits: jax.Array) -> jax.Array:
    """(..., classes) -> (...) uint8, the first one on ties."""
    return largest_class(logits).astype(jnp.uint8)


def unit(vectors: jax.Array) -> jax.Array:
    """(..., c) vectors at length 1; that of length 0 stays."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def softmax(logits: jax.Array) -> jax.Array:
    """(..., classes) logits -> probabilities."""
    return jax.nn.softmax(logits, axis=-1)


def log(probabilities: jax.Array) -> jax.Array:
    """Of probabilities, at least 1e-38: finite for 0 too."""
    return jnp.log(jnp.maximum(probabilities, jnp.finfo(jnp.float32).tiny))


def no_and_yes(logit: jax.Array) -> jax.Array:
    """(..., 1) logits -> (..., 2) probabilities, each exact where it is small: one minus the other would not be."""
    return jax.nn.sigmoid(jnp.concatenate([-logit, logit], axis=-1))


def log_odds(no_and_yes: jax.Array) -> jax.Array:
    """(..., 2) probabilities -> (..., 1) logits."""
    logs = log(no_and_yes)
    return logs[..., 1:] - logs[..., :1]


def one_hot(count: int) -> Callable[[np.ndarray], np.ndarray]:
    """Of (...) class ids, (..., count) float32."""
    return lambda ids: (ids[..., None] == np.arange(count)).astype(np.float32)


def logit(probability: np.ndarray) -> np.ndarray:
    """(...) -> (..., 1); of 0 and 1 that of 1e-7 and 1 - 1e-7, so that a loss stays finite."""
    inside = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return (np.log(inside) - np.log1p(-inside)).astype(np.float32)[..., None]


def logit_pair(probability: np.ndarray) -> np.ndarray:
    """(...) -> (..., 2), logits of background and foreground.

    They stand for a probability that is smaller by 1e-5 at most. For it is compared with thresholds, which one of 8
    bits may equal (51 / 255 = 0.2), and then rounding must not lift it above.
    """
    foreground = logit(probability) - np.float32(4e-5)
    return np.concatenate([np.zeros_like(foreground), foreground], axis=-1)
