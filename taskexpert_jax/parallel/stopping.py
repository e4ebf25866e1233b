"""Being told to stop: a run that gets SIGTERM, as machines that are taken away send it, saves and ends at once."""

from collections.abc import Iterable, Iterator
import contextlib
import signal
import threading
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

Item = TypeVar("Item")


class Stopped(Exception):
    """Raised out of what was going on when the run was told to stop."""


class Stop:
    """Whether the run has been told to stop.

    Of several processes it is enough that one is told: all of them then learn it at the same call of `asked`, which
    all must therefore make equally often. JAX, which has taken the signal over there, sees to that.
    """

    def __init__(self) -> None:
        self._told = False
        self._calls = 0

    def asked(self) -> bool:
        """Whether to stop now; once true, always true."""
        if jax.process_count() > 1 and not self._told:
            self._calls += 1
            self._told = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._told

    def interrupting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until the run is told to stop; then raises Stopped."""
        for item in items:
            if self.asked():
                raise Stopped
            yield item

    def _tell(self, *_: Any) -> None:
        self._told = True


@contextlib.contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Within its body SIGTERM no longer ends the program, but is what `Stop.asked` answers to."""
    stop = Stop()
    # Only the main thread may set handlers; where JAX runs several processes, it has one already.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop._tell)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
