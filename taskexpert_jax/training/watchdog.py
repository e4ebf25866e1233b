"""Warns when no step has finished for a while, and reports what the run waits for."""

import collections
from collections.abc import Iterable, Iterator
import contextlib
import threading
import time
from typing import Any, TypeVar

from absl import logging
import jax

Item = TypeVar("Item")

_LOOKS = 20  # polls within the time after which a step is overdue


class Watchdog:
    """Logs a warning when no step has finished for `seconds`, and again each time the wait has doubled.

    It never ends a run, because a slow file system may recover. A step has finished when the devices have computed it,
    not when it has been dispatched.

    Attributes:
      latest: an output of the last dispatched step; None before the first.

    Args:
      seconds: 0 turns it off.
      step: the last finished step.
    """

    def __init__(self, seconds: float, step: int):
        self._seconds = seconds
        self._phase = "starting"
        self._finished, self._since = step, time.monotonic()
        self._dispatched: collections.deque[tuple[int, Any]] = collections.deque()
        self.latest: jax.Array | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    @contextlib.contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Names what the host does within its body, also in profiles; the clock restarts before and after."""
        before, self._phase = self._phase, phase
        self._since = time.monotonic()
        try:
            with jax.profiler.TraceAnnotation(phase):
                yield
        finally:
            self._phase, self._since = before, time.monotonic()

    def watching(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; each restarts the clock, as a finished step does."""
        for item in items:
            self._since = time.monotonic()
            yield item

    def started(self, step: int, result: jax.Array) -> None:
        """Registers a dispatched step. result: one of its outputs, not donated later."""
        self._phase, self.latest = "waiting for the devices", result
        if self._seconds:
            self._dispatched.append((step, result))

    def close(self) -> None:
        """Stops watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        patience = self._seconds
        while not self._ended.wait(min(self._seconds / _LOOKS, 5.0)):
            while self._dispatched and self._dispatched[0][1].is_ready():
                self._finished, self._since = self._dispatched.popleft()[0], time.monotonic()
            waited = time.monotonic() - self._since
            if waited < self._seconds:
                patience = self._seconds
            elif waited >= patience:
                own = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
                # Processes other than the first one show errors only.
                log = logging.error if jax.process_index() else logging.warning
                log(
                    f"{own}no step has finished for {waited:.0f} s; the last was {self._finished}, and the program is "
                    f"{self._phase}"
                )
                patience *= 2
