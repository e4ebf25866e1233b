"""Boundary probabilities in 8 bits, the input of the boundary benchmark."""

from typing import Literal, TypeVar

import jax
import numpy as np

# truncate: the fraction is cut off, as the family's code writes its images (`astype(uint8)`).
# round: to the nearest integer.
Quantisation = Literal["truncate", "round"]

Array = TypeVar("Array", np.ndarray, jax.Array)


def quantise(probability: Array, how: Quantisation = "truncate") -> Array:
    """Probability in [0, 1], float32, as uint8: 255 times the probability, truncated or rounded."""
    levels = 255 * probability
    return (levels.round() if how == "round" else levels).astype(np.uint8)
