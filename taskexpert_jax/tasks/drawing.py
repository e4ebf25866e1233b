"""Predictions and labels as colour images with their keys.

The kind of a task's values (`Task.kind`) chooses the colours and the key. Invalid pixels (ignored labels, NaN, Inf) are
black, or dark blue where black is a value.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from taskexpert_jax.tasks.canvas import GAP, KEY_WIDTH, PAPER, Cell, Drawn, Range, at_display_size, sheet
from taskexpert_jax.tasks.task import Task


def colour(
    task: Task, values: np.ndarray, *, valid: np.ndarray | None = None, limits: Range | None = None
) -> np.ndarray:
    """The values' colours as (H, W, 3) uint8, one a pixel.

    Args:
      task: the record.
      values: what `task.values` or `task.label_values` gives: (H, W), or (H, W, channels) for vectors.
      valid: (H, W) bool; None: the pixels without the task's ignore value.
      limits: the numbers that get the first and the last colour; values beyond get the same. None: from the values.
    """
    return _colour(task, _drawn(task, values, valid, limits))


def limits_of(task: Task, values: np.ndarray) -> Range:
    """The numbers that get the first and the last colour if nothing else is asked for: to draw other values alike."""
    return _drawn(task, values, None, None).limits


def picture(
    task: Task, values: np.ndarray, *, valid: np.ndarray | None = None, limits: Range | None = None
) -> Image.Image:
    """`colour` at a size to look at, with its key underneath; arguments as there."""
    drawn = _drawn(task, values, valid, limits)
    shown = at_display_size(_colour(task, drawn), smooth=task.kind.smooth)
    key = task.kind.key(drawn, max(shown.width, KEY_WIDTH))
    sheet = Image.new("RGB", (key.width, shown.height + GAP // 2 + key.height), PAPER)
    sheet.paste(shown, (0, 0))
    sheet.paste(key, (0, shown.height + GAP // 2))
    return sheet


def comparison(
    image: np.ndarray,
    tasks: Sequence[Task],
    predictions: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
) -> Image.Image:
    """One sheet with a column per task: the prediction above the label, in the same colours. The input comes first.

    Args:
      image: (H, W, 3) uint8.
      tasks: the records, in the order of the columns.
      predictions: name -> `task.values` of the image's pixels.
      labels: name -> `task.label_values`; a task without a label gets an empty place.
    """
    above: list[Cell | None] = [("input", at_display_size(image))]
    below: list[Cell | None] = [None]
    for task in tasks:
        label = labels.get(task.name)
        # Both maps on the label's range: colours then compare, and a prediction that is off shows.
        limits = None if label is None else limits_of(task, label)
        above.append((f"{task.title}: prediction", picture(task, predictions[task.name], limits=limits)))
        below.append(None if label is None else (f"{task.title}: label", picture(task, label, limits=limits)))
    return sheet([above, below])


def _drawn(task: Task, values: np.ndarray, valid: np.ndarray | None, limits: Range | None) -> Drawn:
    values = np.asarray(values)
    known = np.isfinite(values) & (values != task.ignore)
    if values.ndim == 3:
        known = known.all(axis=-1)
    shown = known if valid is None else known & valid
    return Drawn(values, shown, task.kind.limits(values[shown]) if limits is None else limits)


def _colour(task: Task, drawn: Drawn) -> np.ndarray:
    colours = task.kind.colour(drawn)
    colours[~drawn.valid] = task.kind.invalid
    return colours
