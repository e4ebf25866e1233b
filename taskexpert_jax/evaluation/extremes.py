"""The examples that a task is worst and best at, with small pictures: however long the set, only a few are kept."""

import bisect
from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Self

import numpy as np
from PIL import Image

from taskexpert_jax.images import data_uri
from taskexpert_jax.tasks import Published, Task, drawing

KEPT = 4  # examples at each end
LARGEST = 256  # pixels of the longer side of a picture


@dataclasses.dataclass(frozen=True)
class Entry:
    """An example and what it scored.

    position: its place in the data set.
    pictures: image, prediction and label as `data:` URIs.
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
        """Keeps the example if it is among the best or the worst, and only then draws it; nan is no score."""
        if math.isnan(score):
            return
        entry = Entry(score, position, example_id, ())
        if any(len(kept) < KEPT or key(entry) < key(kept[-1]) for kept, key in self._ends()):
            self._keep(dataclasses.replace(entry, pictures=draw()))

    def merge(self, other: Self) -> None:
        """Takes in the entries of other examples of the set."""
        for entry in {entry.position: entry for entry in (*other._best, *other._worst)}.values():
            self._keep(entry)

    @property
    def best(self) -> tuple[Entry, ...]:
        """The best example first; without those that are among the worst too, so of a small set fewer than `KEPT`."""
        worst = {entry.position for entry in self._worst}
        return tuple(entry for entry in self._best if entry.position not in worst)

    @property
    def worst(self) -> tuple[Entry, ...]:
        """The worst example first."""
        return tuple(self._worst)

    def _ends(self) -> Iterator[tuple[list[Entry], Callable[[Entry], tuple[float, int]]]]:
        """The two lists, each with the key that it is in the order of."""
        for kept, sign in ((self._best, self._towards_best), (self._worst, -self._towards_best)):
            yield kept, lambda entry, sign=sign: (sign * entry.score, entry.position)

    def _keep(self, entry: Entry) -> None:
        for kept, key in self._ends():
            bisect.insort(kept, entry, key=key)
            del kept[KEPT:]


def pictures(task: Task, image: np.ndarray, values: np.ndarray, label: np.ndarray) -> tuple[str, ...]:
    """Image, prediction and label, small, as `data:` URIs.

    Args:
      task: the record.
      image: (h, w, 3) uint8.
      values: as `task.values` gives it, of the image's pixels.
      label: (h, w, label_channels).
    """
    truth = task.label_values(label)
    limits = drawing.limits_of(task, truth)  # for both, so that the colours compare
    drawn = [drawing.colour(task, of, limits=limits) for of in (values, truth)]
    return _small_uri(image, smooth=True), *(_small_uri(rgb, smooth=task.kind.jpeg) for rgb in drawn)


def _small_uri(rgb: np.ndarray, *, smooth: bool) -> str:
    """A `data:` URI of at most `LARGEST` pixels a side; nearest and lossless unless `smooth`."""
    picture = Image.fromarray(rgb)
    if max(picture.size) > LARGEST:
        width, height = (max(1, round(side * LARGEST / max(picture.size))) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)
    return data_uri(picture, lossless=not smooth)
