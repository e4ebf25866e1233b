"""Sources of examples made of another source: reduced, kept in memory, or with what cannot be read replaced."""

from collections.abc import Sequence
import threading

from absl import logging

from input_pipeline import transforms
from input_pipeline.records import Example, Source
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task


class ReducedSource:
    """A source whose frames are reduced by `factor`, with a label for each of the given tasks and no other."""

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
    """A source that decodes every example once and keeps it in memory from then on."""

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
    """A source whose unreadable examples are replaced by the next readable one, up to a number of them.

    What replaces an example depends on the data alone, so a run that goes on sees the same. Each is named once.

    Args:
      source: whose examples.
      title: of the data and split, for messages.
      limit: how many different examples may be replaced in this process.
    """

    def __init__(self, source: Source, title: str, limit: int):
        self.labels = source.labels
        self._source, self._title, self._limit = source, title, limit
        self._unreadable: dict[int, Exception] = {}
        self._lock = threading.Lock()  # examples are loaded by several threads

    def __len__(self) -> int:
        return len(self._source)

    def load(self, index: int) -> Example:
        """See `Source.load`.

        Raises:
          UserError: one more example than may be replaced, named with what is wrong with it.
        """
        for tried in range(index, index + len(self)):
            try:
                if tried % len(self) not in self._unreadable:
                    return self._source.load(tried % len(self))
            except Exception as error:  # whatever broken bytes lead to in a decoder
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
                    f"{what}{before}; prepare the data anew, or let --config.guard.skip_examples=N of them be replaced"
                ) from error
            self._unreadable[index] = error
            logging.warning(f"{what}; replaced, {len(self._unreadable)} of at most {self._limit}")
