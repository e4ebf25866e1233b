"""Worst and best examples of each task, with thumbnails; memory does not grow with the size of the set."""

import bisect
from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Self

import numpy as np
from PIL import Image

from taskexpert_jax.images import data_uri
from taskexpert_jax.tasks import Published, Task, panels

KEPT = 4  # examples at each end
LARGEST = 256  # maximum side of a thumbnail in pixels


@dataclasses.dataclass(frozen=True)
class Entry:
    """Scored example.

    position: index in the data set.
    pictures: thumbnails of image, prediction and label as `data:` URIs.
    """

    score: float
    position: int
    example_id: str
    pictures: tuple[str, ...]


class Extremes:
    """One task's worst and best examples so far, by a score; ties go to the earlier example."""

    def __init__(self, score: Published):
        self.score = score
        self._towards_best = -1.0 if score.higher_is_better else 1.0
        self._best: list[Entry] = []
        self._worst: list[Entry] = []

    def offer(self, score: float, position: int, example_id: str, draw: Callable[[], tuple[str, ...]]) -> None:
        """Keeps the example if it is among the best or the worst, and draws it only then.

        Scores that are NaN or Inf are skipped.
        """
        if not math.isfinite(score):
            return
        entry = Entry(score, position, example_id, ())
        if any(len(kept) < KEPT or key(entry) < key(kept[-1]) for kept, key in self._ends()):
            self._keep(dataclasses.replace(entry, pictures=draw()))

    def merge(self, other: Self) -> None:
        """Merges the entries of other examples of the set."""
        for entry in {entry.position: entry for entry in (*other._best, *other._worst)}.values():
            self._keep(entry)

    @property
    def best(self) -> tuple[Entry, ...]:
        """Best examples, the best first; those that are also among the worst of a small set are omitted."""
        worst = {entry.position for entry in self._worst}
        return tuple(entry for entry in self._best if entry.position not in worst)

    @property
    def worst(self) -> tuple[Entry, ...]:
        """Worst examples, the worst first."""
        return tuple(self._worst)

    def _ends(self) -> Iterator[tuple[list[Entry], Callable[[Entry], tuple[float, int]]]]:
        """Both lists with their sort keys."""
        for kept, sign in ((self._best, self._towards_best), (self._worst, -self._towards_best)):
            yield kept, lambda entry, sign=sign: (sign * entry.score, entry.position)

    def _keep(self, entry: Entry) -> None:
        for kept, key in self._ends():
            bisect.insort(kept, entry, key=key)
            del kept[KEPT:]


def pictures(task: Task, image: np.ndarray, values: np.ndarray, label: np.ndarray) -> tuple[str, ...]:
    """Thumbnails of image, prediction and label as `data:` URIs.

    Args:
      task: task record.
      image: (h, w, 3) uint8.
      values: prediction in the form of `task.values`, without padding.
      label: (h, w, label_channels).
    """
    truth = task.label_values(label)
    limits = panels.limits_of(task, truth)  # for both, so that colours are comparable
    drawn = [panels.colour(task, of, limits=limits) for of in (values, truth)]
    return _small_uri(image, smooth=True), *(_small_uri(rgb, smooth=task.kind.jpeg) for rgb in drawn)


def _small_uri(rgb: np.ndarray, *, smooth: bool) -> str:
    """`data:` URI of an image of at most `LARGEST` pixels per side; nearest-neighbour and lossless unless `smooth`."""
    image = Image.fromarray(rgb)
    if max(image.size) > LARGEST:
        width, height = (max(1, round(side * LARGEST / max(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)
    return data_uri(image, lossless=not smooth)
