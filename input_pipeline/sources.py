"""Wrappers of a `records.Source`: downscaling, caching in memory, and replacement of unreadable examples."""

from collections.abc import Sequence
import threading

from absl import logging

from input_pipeline import transforms
from input_pipeline.records import Example, Source
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.tasks import Task


class ReducedSource:
    """Downscales examples by `factor`; they have a label for each of the given tasks and no other."""

    def __init__(self, source: Source, tasks: Sequence[Task], factor: float):
        self.labels = tuple(task.name for task in tasks)
        self._source = source
        self._tasks = tasks
        self._factor = factor

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int) -> Example:
        """See `Source.load`."""
        example = transforms.fill_missing(self._source.load(index), self._tasks)
        return transforms.downscale(example, self._tasks, self._factor)


class KeptSource:
    """Caches decoded examples in memory; each is decoded once."""

    def __init__(self, source: Source):
        self.labels = source.labels
        self._source = source
        self._examples: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int) -> Example:
        """See `Source.load`."""
        if index not in self._examples:
            self._examples[index] = self._source.load(index)
        return self._examples[index]


class ReplacingSource:
    """Replaces up to `limit` unreadable examples, each by the next readable one.

    The replacement depends on the data alone, so a resumed run sees the same examples. Each one is reported once.

    Args:
      source: the wrapped source.
      title: name of data set and split, for messages.
      limit: largest number of different examples that may be replaced in this process.
    """

    def __init__(self, source: Source, title: str, limit: int):
        self.labels = source.labels
        self._source, self._title, self._limit = source, title, limit
        self._unreadable: dict[int, Exception] = {}
        self._lock = threading.Lock()  # several threads load examples

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int) -> Example:
        """See `Source.load`.

        Raises:
          UserError: more than `limit` examples cannot be read; names the last one and its fault.
        """
        for tried in range(index, index + len(self)):
            try:
                if tried % len(self) not in self._unreadable:
                    return self._source.load(tried % len(self))
            except StoreError:  # which says nothing about the example
                raise
            except Exception as error:  # decoders raise many types on damaged files
                self._note(tried % len(self), error)
        raise UserError(f"no example of {self._title} can be read")

    def _note(self, index: int, error: Exception) -> None:
        with self._lock:
            if index in self._unreadable:
                return
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            what = f"example {index} of {self._title} cannot be read: {kind}{' '.join(str(error).split())}"
            if len(self._unreadable) >= self._limit:
                before = f" after {self._limit} others" if self._limit else ""
                raise UserError(
                    f"{what}{before}; fix or rebuild the data, or set --config.guard.skip_examples=N to replace up to N"
                ) from error
            self._unreadable[index] = error
            logging.warning(f"{what}; replaced, {len(self._unreadable)} of at most {self._limit}")
