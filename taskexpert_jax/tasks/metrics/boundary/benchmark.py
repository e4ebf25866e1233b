"""The boundary benchmark for a set of predictions and labels in memory."""

from collections.abc import Iterable

import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks.metrics.boundary.counts import LabelKind, image_counts
from taskexpert_jax.tasks.metrics.boundary.quantisation import Quantisation, quantise
from taskexpert_jax.tasks.metrics.boundary.scores import BoundaryCounts, scores


def odsf(
    predictions: Iterable[np.ndarray],
    labels: Iterable[np.ndarray],
    *,
    max_dist: float = 0.0075,
    kind: LabelKind = "regions",
    how: Quantisation = "truncate",
) -> dict[str, float]:
    """Boundary scores of a set: `odsF`, `oisF`, `AP` and others in percent, see `scores`.

    Args:
      predictions: boundary probability of each image, (H, W) float in [0, 1]; or 8 bits, (H, W) uint8.
      labels: label of each image, (H, W) integers or bool, of the same size.
      max_dist: maximum matching distance as a fraction of the image diagonal: 0.0075 on PASCAL-Context, 0.011 on NYUD.
      kind: "regions": boundaries are where the label changes, the benchmarks' protocol; "lines": pixels not 0.
      how: conversion of probabilities to 8 bits.

    Raises:
      UserError: no image, different numbers of predictions and labels, values that are no probabilities, or labels
        that are no whole numbers.
    """
    parts = []
    try:
        for prediction, label in zip(predictions, labels, strict=True):
            strength = _in_8_bits(np.asarray(prediction), how)
            parts.append(image_counts(strength, _whole(np.asarray(label)), max_dist, kind=kind))
    except UserError:
        raise
    except ValueError as error:  # of zip
        raise UserError(f"different numbers of predictions and labels: {error}") from error
    if not parts:
        raise UserError("no prediction to score")
    return scores(BoundaryCounts.join(parts))


def _whole(label: np.ndarray) -> np.ndarray:
    if label.dtype.kind not in "biuf" or (label.dtype.kind == "f" and not (label == np.floor(label)).all()):
        raise UserError(f"a boundary label must be whole numbers or bool, and this {label.dtype} is not")
    return label.astype(np.int64)


def _in_8_bits(probability: np.ndarray, how: Quantisation) -> np.ndarray:
    if probability.dtype == np.uint8:
        return probability
    if probability.dtype.kind != "f":
        raise UserError(f"a boundary prediction must be float in [0, 1] or uint8, not {probability.dtype}")
    if not (probability.min(initial=0) >= 0 and probability.max(initial=0) <= 1):  # also NaN
        raise UserError("a boundary prediction has values outside of [0, 1]: apply the sigmoid first")
    return np.asarray(quantise(probability.astype(np.float32), how))
