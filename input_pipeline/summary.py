"""What a built data set holds, in figures: sizes of the frames, frequencies of the classes, range of the depth.

They are counted from the records as training reads them, so that they also show that what was built can be read.
Which figures a task has follows from the drawing of its values (`Task.draw`).
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import cv2
import numpy as np
import tqdm

from input_pipeline import transforms
from input_pipeline.records import Source
from taskexpert_jax import tasks as task_records
from taskexpert_jax import text_table
from taskexpert_jax.parallel import threads
from taskexpert_jax.tasks import Task

MOST_EXAMPLES = 2000  # of a split; of more, so many are looked at: a minute, on two cores
UNNAMED = tuple(str(index) for index in range(255))  # classes of a data set that does not name them
_STEP = 0.01  # metres, the precision of the median depth
_FARTHEST = 1000  # metres


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over the pixels of some examples' labels of one task.

    Attributes:
      pixels: all of them, and valid: those with a label that counts.
      histogram: pixels by class id, by 0 and 1, or by depth in steps of a centimetre; empty for vectors.
      lowest: the least valid depth in metres, inf without any, and highest: the greatest, or 0.
    """

    pixels: int = 0
    valid: int = 0
    histogram: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    lowest: float = np.inf
    highest: float = 0.0

    @property
    def invalid(self) -> float | None:
        """The share of the pixels that count nowhere."""
        return _share(self.pixels - self.valid, self.pixels)

    def __add__(self, other: "Counts") -> "Counts":
        both = np.zeros(max(len(self.histogram), len(other.histogram)), np.int64)
        both[: len(self.histogram)] += self.histogram
        both[: len(other.histogram)] += other.histogram
        return Counts(
            self.pixels + other.pixels,
            self.valid + other.valid,
            both,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
        )


def _count_bytes(label: np.ndarray, task: Task) -> Counts:
    histogram = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    histogram[int(task.ignore)] = 0
    return Counts(label.size, int(histogram.sum()), np.trim_zeros(histogram, "b"))


def _count_metres(label: np.ndarray, task: Task) -> Counts:
    valid = label[label != task.ignore]
    if not valid.size:
        return Counts(label.size)
    steps = np.minimum(valid / np.float32(_STEP), _FARTHEST / _STEP).astype(np.int64)
    return Counts(label.size, valid.size, np.bincount(steps), float(valid.min()), float(valid.max()))


def _count_vectors(label: np.ndarray, task: Task) -> Counts:
    return Counts(label[..., 0].size, int(np.count_nonzero(label[..., 0] != task.ignore)))


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _class_figures(counts: Counts, task: Task) -> dict[str, Any]:
    pixels = np.zeros(256, np.int64)
    pixels[: len(counts.histogram)] = counts.histogram
    names = task.class_names[: len(counts.histogram)] if task.class_names == UNNAMED else task.class_names
    return {
        "ignored": counts.invalid,
        **{name: _share(pixels[index], counts.valid) for index, name in enumerate(names)},
    }


def _depth_figures(counts: Counts, task: Task) -> dict[str, Any]:
    del task
    figures: dict[str, Any] = dict.fromkeys(("invalid", "least (m)", "median (m)", "greatest (m)"))
    figures["invalid"] = counts.invalid
    if counts.valid:
        middle = int(np.searchsorted(np.cumsum(counts.histogram), counts.valid / 2))
        metres = counts.lowest, (middle + 0.5) * _STEP, counts.highest
        figures |= dict(zip(("least (m)", "median (m)", "greatest (m)"), metres, strict=True))
    return figures


def _mask_figures(counts: Counts, task: Task) -> dict[str, Any]:
    del task
    return {"ignored": counts.invalid, "positive": _share(counts.histogram[1:].sum(), counts.valid)}


def _vector_figures(counts: Counts, task: Task) -> dict[str, Any]:
    del task
    return {"invalid": counts.invalid}


_COUNT: Mapping[str, Callable[[np.ndarray, Task], Counts]] = {
    "classes": _count_bytes,
    "depth": _count_metres,
    "normals": _count_vectors,
    "probability": _count_bytes,
}
_FIGURES: Mapping[str, Callable[[Counts, Task], dict[str, Any]]] = {
    "classes": _class_figures,
    "depth": _depth_figures,
    "normals": _vector_figures,
    "probability": _mask_figures,
}


def _count_example(source: Source, tasks: Sequence[Task], index: int) -> tuple[tuple[int, int], list[Counts]]:
    """Height and width of an example, and the counts of each task's label as evaluation sees it."""
    example = transforms.mark_invalid(transforms.fill_missing(source.load(index), tasks), tasks)
    height, width = example["image"].shape[:2]
    return (height, width), [_COUNT[task.draw](example[task.name], task) for task in tasks]


def tasks_of(source: Source, class_names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks that a data set has labels for; class_names: of semantic segmentation, numbers if there are none."""
    names = [name for name in source.labels if name in task_records.NAMES]
    weights = dict.fromkeys(names, 1.0)
    return task_records.build(names, loss_weights=weights, semseg_classes=tuple(class_names) or UNNAMED)


def of_split(source: Source, tasks: Sequence[Task], title: str) -> dict[str, Any]:
    """The figures of one split, in plain numbers; title: of the progress bar.

    Returns:
      examples, counted (the number that was looked at, evenly spaced), the range of height and width, and for each task
      by its name: the share of the pixels without a valid label, and of the valid ones each class or the positive; of
      depth the least, median and greatest in metres. None where nothing is valid.
    """
    counted = min(len(source), MOST_EXAMPLES)
    indices = (position * len(source) // counted for position in range(counted))
    sizes, totals = set(), [Counts() for _ in tasks]
    count = functools.partial(_count_example, source, tasks)
    with contextlib.closing(threads.in_order(count, indices)) as results:
        for size, counts in tqdm.tqdm(results, total=counted, desc=title, unit=" examples", mininterval=1.0):
            sizes.add(size)
            totals = [total + of_example for total, of_example in zip(totals, counts, strict=True)]
    heights, widths = zip(*sizes, strict=True)
    return {
        "examples": len(source),
        "counted": counted,
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "labels": {task.name: _FIGURES[task.draw](total, task) for task, total in zip(tasks, totals, strict=True)},
    }


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{value[0]}" if value[0] == value[1] else f"{value[0]}-{value[1]}"
    if isinstance(value, int):
        return f"{value}"
    return f"{value:.2f}" if name.endswith("(m)") else f"{100 * value:.2f} %"


def table(splits: Mapping[str, Mapping[str, Any]], tasks: Sequence[Task]) -> list[str]:
    """The figures of all splits side by side, as lines; each number that is not 0 for all splits gets a row."""
    rows = [["", *splits]]
    for name in next(iter(splits.values())):
        values = [of[name] for of in splits.values()]
        told = name == "labels" or (name == "counted" and values == [of["examples"] for of in splits.values()])
        if not told and any(values):
            title = "of these looked at, evenly spaced" if name == "counted" else name
            rows.append([title, *(_text(name, value) for value in values)])
    for task in tasks:
        figures = [of["labels"][task.name] for of in splits.values()]
        names = max(figures, key=len)  # without class names, as many classes as occur
        rows.append([task.title, *([""] * len(figures))])
        rows += [[f"  {name}", *(_text(name, of.get(name)) for of in figures)] for name in names]
    return text_table.lines(rows, "<" + ">" * len(splits))
