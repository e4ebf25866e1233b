"""Predictions and labels as colour images with a legend or colour bar (key).

The kind of a task's values (`Task.kind`) defines the colours and the key. Invalid pixels (ignored labels, NaN, Inf) are
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
    """Colours of the values, (H, W, 3) uint8.

    Args:
      task: task record.
      values: in the form of `task.values` or `task.label_values`: (H, W), or (H, W, channels) for vectors.
      valid: (H, W) bool, False for pixels drawn as invalid; NaN, Inf and the task's ignore value are always invalid.
      limits: values at the two ends of the colour map, to which others are clipped. None: computed from the values.
    """
    return _colour(task, _drawn(task, values, valid, limits))


def limits_of(task: Task, values: np.ndarray) -> Range:
    """Default limits of the colour map for these values, e.g. to draw a prediction on the scale of its label."""
    return _drawn(task, values, None, None).limits


def picture(
    task: Task, values: np.ndarray, *, valid: np.ndarray | None = None, limits: Range | None = None
) -> Image.Image:
    """`colour` at display size, with its key underneath; same arguments."""
    drawn = _drawn(task, values, valid, limits)
    shown = at_display_size(_colour(task, drawn), smooth=task.kind.smooth)
    key = task.kind.key(drawn, max(shown.width, KEY_WIDTH))
    paper = Image.new("RGB", (key.width, shown.height + GAP // 2 + key.height), PAPER)
    paper.paste(shown, (0, 0))
    paper.paste(key, (0, shown.height + GAP // 2))
    return paper


def comparison(
    image: np.ndarray,
    tasks: Sequence[Task],
    predictions: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
) -> Image.Image:
    """Sheet with the input first and a column per task: the prediction above the label, in the same colours.

    Args:
      image: (H, W, 3) uint8.
      tasks: task records, in the order of the columns.
      predictions: task name -> `task.values` of the image's pixels.
      labels: task name -> `task.label_values`; a task without a label gets an empty cell.
    """
    above: list[Cell | None] = [("input", at_display_size(image))]
    below: list[Cell | None] = [None]
    for task in tasks:
        label = labels.get(task.name)
        # Both maps on the label's range, so that colours are comparable and a biased prediction is visible.
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
