"""Checks of arrays that a program gives: batches with labels to evaluate, and predictions to draw."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.tasks import Task

_REAL = "biuf"  # kinds of dtypes: booleans and real numbers


def prediction(task: Task, array: Any) -> np.ndarray:
    """An array of a prediction, in the form of `task.values`.

    Raises:
      UserError: another shape, no real numbers, or class ids that the task does not have.
    """
    values = np.asarray(array)
    channels = () if task.label_channels == 1 else (task.label_channels,)
    if values.ndim < 2 or values.shape[2:] != channels or not values.size or values.dtype.kind not in _REAL:
        raise UserError(f"{task.name}: must be {task.kind.array_form}, not {shown(values.shape)} {values.dtype}")
    if task.class_names:
        _refuse_unknown(task, values[np.isfinite(values)], task.name)
    return values.astype(np.float32) if values.dtype == bool else values


def batch(found: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, np.ndarray]:
    """The arrays of a batch that evaluation uses, with a mask, windows and ids: by default those of whole images.

    Raises:
      UserError: images, labels, windows, masks or ids of another dtype or shape, or with other values.
    """
    refuse_other_than_dicts(found)
    image = np.asarray(found.get("image", ()))
    shape: tuple[int, ...] = image.shape
    if len(shape) != 4 or shape[3] != 3 or not image.size or image.dtype != np.uint8:
        raise UserError(f'batch["image"] must be (B, H, W, 3) uint8, not {shape} {image.dtype}')
    count, height, width, _ = shape
    labels = {task.name: _label(task, found.get(task.name, ()), (count, height, width)) for task in tasks}
    benchmarks = {name: np.asarray(found[name]) for task in tasks if (name := task.benchmark_label) in found}

    mask = np.asarray(found.get("mask", np.ones(count, np.float32)))
    if mask.shape != (count,) or mask.dtype.kind not in _REAL or not np.isin(mask, (0, 1)).all():
        raise UserError('batch["mask"] must be (B,) float32: 1, or 0 for padding examples')
    window = np.asarray(found.get("window", np.tile([0, 0, height, width], (count, 1))))
    if window.shape != (count, 4) or window.dtype.kind not in "iu" or not _inside(window[mask > 0], height, width):
        raise UserError(
            f'batch["window"] must be (B, 4) int32: top, left, height and width of images inside of {height}x{width}'
        )
    ids = np.asarray(found.get("id", np.arange(count))).astype(str)
    if ids.shape != (count,):
        raise UserError(f'batch["id"] must have the shape {(count,)}, not {ids.shape}')
    own = {"window": window.astype(np.int32), "mask": mask.astype(np.float32), "id": ids}
    return {"image": image, **benchmarks, **labels, **own}


def refuse_other_than_dicts(found: object) -> None:
    """Raises UserError for a batch that is no dict."""
    if not isinstance(found, Mapping):
        raise UserError(f"a batch is a dict of arrays, not {type(found).__name__}")


def _label(task: Task, array: Any, size: tuple[int, int, int]) -> np.ndarray:
    """A label, in the task's dtype if that is whole numbers.

    Raises:
      UserError: another shape, no real numbers, or class ids that the task does not have.
    """
    label, expected, dtype = np.asarray(array), (*size, task.label_channels), np.dtype(task.label_dtype)
    if label.shape != expected:
        raise UserError(f"batch[{task.name!r}] must have the shape {expected}, not {label.shape}")
    if label.dtype.kind not in _REAL:
        raise UserError(f"batch[{task.name!r}] must be {dtype}, not {label.dtype}")
    if dtype.kind == "f":
        return label
    _refuse_unknown(task, label, f"batch[{task.name!r}]")
    return label.astype(dtype)


def _refuse_unknown(task: Task, values: np.ndarray, where: str) -> None:
    """Raises UserError for values that are neither class ids (of a mask: 0 and 1) nor the ignore value."""
    most = len(task.class_names) - 1 if task.class_names else 1
    known = (values >= 0) & (values <= most) & (values == np.floor(values)) | (values == task.ignore)
    if not known.all():
        raise UserError(
            f"{where} has the value {values[~known][0]}; allowed: 0 to {most}, and {task.ignore} where it is ignored"
        )


def _inside(window: np.ndarray, height: int, width: int) -> bool:
    """True if all windows (B, 4) have pixels and none leaves the frame."""
    start, size = window[:, :2], window[:, 2:]
    return bool((start >= 0).all() and (size > 0).all() and (start + size <= (height, width)).all())
