"""Says so when a run has stopped moving, and where it waits."""

import collections
from collections.abc import Iterable, Iterator
import contextlib
import sys
import threading
import time
from typing import Any, TypeVar

import jax

Item = TypeVar("Item")

_LOOKS = 20  # in the time after which a step is overdue


class Watchdog:
    """Prints a line on stderr when no step has finished for `seconds`, and again after each doubling of that time.

    It never ends a run: a slow file system comes back. A step has finished when the devices are done with it, not when
    it has been handed to them.

    Args:
      seconds: 0 for none.
      step: the last step that is done.
    """

    def __init__(self, seconds: float, step: int):
        self._seconds = seconds
        self._phase = "starting"
        self._finished, self._since = step, time.monotonic()
        self._under_way: collections.deque[tuple[int, Any]] = collections.deque()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    @contextlib.contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Names what the host does in its body; when that ends, the clock starts anew."""
        before, self._phase = self._phase, phase
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._phase, self._since = before, time.monotonic()

    def watching(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each is a sign of life, as a step is."""
        for item in items:
            self._since = time.monotonic()
            yield item

    def started(self, step: int, result: jax.Array) -> None:
        """Notes that a step has been handed to the devices. result: any of its results that nothing will donate."""
        self._phase = "waiting for the devices"
        if self._seconds:
            self._under_way.append((step, result))

    def close(self) -> None:
        """Stops watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        patience = self._seconds
        while not self._ended.wait(min(self._seconds / _LOOKS, 5.0)):
            while self._under_way and self._under_way[0][1].is_ready():
                self._finished, self._since = self._under_way.popleft()[0], time.monotonic()
            waited = time.monotonic() - self._since
            if waited < self._seconds:
                patience = self._seconds
            elif waited >= patience:
                own = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
                print(
                    f"warning: {own}no step has finished for {waited:.0f} s; the last was {self._finished}, and the "
                    f"program is {self._phase}",
                    file=sys.stderr,
                    flush=True,
                )
                patience *= 2
