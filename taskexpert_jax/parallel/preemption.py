"""Preemption: SIGTERM sets a flag, at which the training loop (`train.py`) saves a checkpoint and returns."""

from collections.abc import Iterable, Iterator
import contextlib
import signal
import threading
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

Item = TypeVar("Item")


class Stopped(Exception):
    """Raised inside an evaluation when the run is preempted."""


class Stop:
    """Preemption flag of a run.

    With several processes, one SIGTERM is enough: JAX, which handles the signal there, makes all of them see it at the
    same call of `asked`. All processes must therefore call it equally often.
    """

    def __init__(self) -> None:
        self._preempted = False
        self._calls = 0

    def asked(self) -> bool:
        """True from the moment the run is preempted."""
        if jax.process_count() > 1 and not self._preempted:
            self._calls += 1
            self._preempted = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._preempted

    def interrupting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; raises Stopped as soon as the run is preempted."""
        for item in items:
            if self.asked():
                raise Stopped
            yield item

    def _preempt(self, *_: Any) -> None:
        self._preempted = True


@contextlib.contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Within its body, SIGTERM sets the yielded flag and does not end the program."""
    stop = Stop()
    # Only the main thread may install handlers; with several processes JAX has installed its own.
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop._preempt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
