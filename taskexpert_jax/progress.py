"""Progress of long work: a bar on a terminal, elsewhere a line now and then, and nothing for work of a few seconds.

Only programs show it; functions that they call take `Progress.add`.
"""

from collections.abc import Iterable, Iterator
import logging as standard_logging
import os
import sys
import time
from typing import Any, TypeVar

from absl import logging

from taskexpert_jax import terminal

Item = TypeVar("Item")

SECONDS_TO_BAR = 3.0
SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts items that are done, and shows them with the rate and the time to the end. A context manager.

    The rate is measured from the first `add` on, which excludes compilation. With `--verbosity=-1` nothing is shown.

    Args:
      what: the work, such as "evaluating"; may be changed later.
      total: number of items; None if unknown.
      unit: name of the items.
      active: False in all but one process of a run; nothing is shown then.
    """

    def __init__(self, what: str, total: int | None, unit: str = "images", *, active: bool = True):
        self.done = 0
        self.what, self._total, self._unit = what, total, unit
        self._active = active and logging.get_absl_logger().isEnabledFor(standard_logging.INFO)
        self._bar: Any = None
        self._shown = time.monotonic()  # when the last line was logged, or the start
        self._first: tuple[float, int] | None = None  # time of the first `add`, and the items done then

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            terminal.set_bar(None)
            self._bar.close()

    def add(self, count: int = 1) -> None:
        """Counts items as done; what exceeds the total, such as padding examples, is not counted."""
        self.done = self.done + count if self._total is None else min(self.done + count, self._total)
        now = time.monotonic()
        if self._first is None:
            self._first = now, self.done
        if not self._active:
            return
        if self._bar is not None:
            self._bar.set_description_str(self._line(now), refresh=False)
            self._bar.update(self.done - self._bar.n)
        elif self.done == self._total:
            return
        elif sys.stderr.isatty():
            if now >= self._shown + SECONDS_TO_BAR:
                self._bar = self._opened(self._line(now))
                terminal.set_bar(self._bar)
        elif now >= self._shown + SECONDS_BETWEEN_LINES:
            self._shown = now
            logging.info(self._line(now))

    def each(self, items: Iterable[Item], count: int = 1) -> Iterator[Item]:
        """Yields the items, such as batches of `count`; each is done when the next one is asked for."""
        for item in items:
            yield item
            self.add(count)

    def _line(self, now: float) -> str:
        """Such as "evaluating: 120 of 654 examples, 3.2/s, 02:47 left"."""
        import tqdm  # takes 50 ms

        first, before = self._first or (now, 0)
        rate = (self.done - before) / max(now - first, 1e-9)
        parts = [f"{self.done} {self._unit}" if self._total is None else f"{self.done} of {self._total} {self._unit}"]
        if rate:
            parts.append(f"{rate:.2g}/s" if rate < 10 else f"{rate:.0f}/s")
            if self._total is not None:
                parts.append(f"{tqdm.tqdm.format_interval((self._total - self.done) / rate)} left")
        return f"{self.what}: {', '.join(parts)}"

    def _opened(self, line: str) -> Any:
        """A bar on stderr."""
        import tqdm

        has_size = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # unknown in some containers
        return tqdm.tqdm(
            desc=line,
            initial=self.done,
            total=self._total,
            bar_format="{desc}" if self._total is None else "{percentage:3.0f}% |{bar:20}| {desc}",
            file=terminal.stream_of_bar(),
            leave=False,
            mininterval=0.5,
            miniters=1,
            dynamic_ncols=has_size,
            ncols=None if has_size else 79,
        )
