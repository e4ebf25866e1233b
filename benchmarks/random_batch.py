"""Batches of random images and labels for timing without a data set; format: docs/conventions.md."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from taskexpert_jax.tasks import Task

if TYPE_CHECKING:
    import torch


def make(
    config: Any, tasks: Sequence[Task], batch_size: int, *, seed: int, whole: bool = True
) -> dict[str, np.ndarray]:
    """One batch at `config.dataset.image_size`; a tenth of the label pixels is ignored.

    whole: every image fills its frame and no example is padding; else images have a border of padding, and the last
      example is padding.
    """
    rng = np.random.default_rng(seed)
    height, width = config.dataset.image_size
    border = 0 if whole else 8
    window = np.tile(np.int32([border, border, height - 2 * border, width - 2 * border]), (batch_size, 1))
    mask = np.ones(batch_size, np.float32)
    mask[-1] = 1.0 if whole else 0.0
    batch = {
        "image": rng.integers(0, 256, (batch_size, height, width, 3), np.uint8),
        "window": window,
        "mask": mask,
    }
    for task in tasks:
        batch[task.name] = _label(task, rng, (batch_size, height, width))
    return batch


def _label(task: Task, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Classes for integer labels (two if the task names none), else unit vectors or positive values."""
    dtype = np.dtype(task.label_dtype)
    if dtype.kind == "u":
        label = rng.integers(0, len(task.class_names) or 2, (*shape, task.label_channels), dtype)
    else:
        label = rng.random((*shape, task.label_channels), np.float32) + 0.1
        if task.label_channels > 1:
            label = (label - 0.6) / np.linalg.norm(label - 0.6, axis=-1, keepdims=True)
        label = label.astype(dtype)
    label[rng.random(shape) < 0.1] = task.ignore
    return label


def as_tensors(batch: Mapping[str, np.ndarray], device: str) -> "dict[str, torch.Tensor]":
    """The batch as PyTorch tensors on a device."""
    import torch

    return {key: torch.from_numpy(value).to(device) for key, value in batch.items()}
