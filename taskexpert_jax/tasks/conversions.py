"""Conversions between a task's predictions, the values shown to users, and the form in which predictions are averaged.

Used by the kinds as `Kind.values`, `from_values`, `to_mean` and `from_mean`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.tasks.metrics.segmentation import largest_class


def first_channel(label: Any) -> Any:
    """Drops the channel axis: (..., 1) -> (...)."""
    return label[..., 0]


def one_channel(values: np.ndarray) -> np.ndarray:
    """Adds a channel axis: (...) -> (..., 1)."""
    return values[..., None]


def unchanged(values: Any) -> Any:
    """Identity."""
    return values


def class_ids(logits: jax.Array) -> jax.Array:
    """Argmax over the classes: (..., classes) -> (...) uint8; the first one on ties."""
    return largest_class(logits).astype(jnp.uint8)


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors (..., c) normalised to length 1; zero vectors stay zero."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def softmax(logits: jax.Array) -> jax.Array:
    """Class probabilities of logits (..., classes)."""
    return jax.nn.softmax(logits, axis=-1)


def log(probabilities: jax.Array) -> jax.Array:
    """Logarithm of probabilities clamped to the smallest normal float32 (1e-38), so that log(0) is finite."""
    return jnp.log(jnp.maximum(probabilities, jnp.finfo(jnp.float32).tiny))


def no_and_yes(logit: jax.Array) -> jax.Array:
    """Probabilities of both classes of a binary logit: (..., 1) -> (..., 2).

    Both are computed by a sigmoid, because 1 - p loses the digits of a small probability.
    """
    return jax.nn.sigmoid(jnp.concatenate([-logit, logit], axis=-1))


def log_odds(no_and_yes: jax.Array) -> jax.Array:
    """Binary logit of the probabilities of both classes: (..., 2) -> (..., 1)."""
    logs = log(no_and_yes)
    return logs[..., 1:] - logs[..., :1]


def one_hot(count: int) -> Callable[[np.ndarray], np.ndarray]:
    """Function from class ids (...) to one-hot vectors (..., count) float32."""
    return lambda ids: (ids[..., None] == np.arange(count)).astype(np.float32)


def logit(probability: np.ndarray) -> np.ndarray:
    """Binary logit of a probability: (...) -> (..., 1), clipped to [1e-7, 1 - 1e-7] so that a loss stays finite."""
    inside = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return (np.log(inside) - np.log1p(-inside)).astype(np.float32)[..., None]


def logit_pair(probability: np.ndarray) -> np.ndarray:
    """Logits of background and foreground of a probability: (...) -> (..., 2).

    They correspond to a probability lower by at most 1e-5. Saliency metrics compare it with thresholds, and an 8-bit
    value may equal one exactly (51 / 255 = 0.2): rounding must not lift it above.
    """
    foreground = logit(probability) - np.float32(4e-5)
    return np.concatenate([np.zeros_like(foreground), foreground], axis=-1)
