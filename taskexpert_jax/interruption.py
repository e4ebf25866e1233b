"""Ctrl-C: one line, an orderly end and exit status 130; a second one ends the program at once.

Compiled code, such as XLA's compiler, does not return to Python for minutes, and libraries that are interrupted print
tracebacks. So a thread prints the line, hides what is printed after it, and ends the program if Python does not.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import Any

from taskexpert_jax import terminal

STATUS = 130
_SECONDS_TO_NOTICE = 2.0  # until the main thread has left compiled code
_SECONDS_TO_END = 10.0  # to complete a checkpoint and remove temporary files


@contextlib.contextmanager
def handled(line: Callable[[], str]) -> Iterator[None]:
    """Within its body, Ctrl-C prints `line()`, raises KeyboardInterrupt, and the program then exits with status 130.

    In threads other than the main one, which cannot handle signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interruption = _Interruption(line)
    before = signal.signal(signal.SIGINT, interruption.on_signal)
    wakeup = signal.set_wakeup_fd(interruption.writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if interruption.noticed:
            sys.stdout.flush()
            os._exit(STATUS)  # not sys.exit: threads of libraries would print their errors, or crash
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, before)
        os.close(interruption.writer)  # ends the thread


class _Interruption:
    """State of Ctrl-C in a program; `writer` gets the number of each signal from Python's own handler, in C."""

    def __init__(self, line: Callable[[], str]):
        self._line = line
        self.noticed = False
        self._said = threading.Event()
        self._reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        threading.Thread(target=self._watch, name="Ctrl-C", daemon=True).start()

    def on_signal(self, *_: Any) -> None:
        """Interrupts the main thread, as soon as it is in Python."""
        if not self.noticed:
            self.noticed = True
            os.write(self.writer, b"\0")
            self._said.wait(_SECONDS_TO_END)
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first = None  # time of the first Ctrl-C
        while True:
            seconds = None
            if first is not None:
                patience = _SECONDS_TO_END if self.noticed else _SECONDS_TO_NOTICE
                seconds = max(first + patience - time.monotonic(), 0)
            if not select.select([self._reader], [], [], seconds)[0]:
                os._exit(STATUS)
            received = os.read(self._reader, 64)
            if not received:
                os.close(self._reader)
                return
            for _ in range(received.count(signal.SIGINT)):
                if first is not None:
                    os._exit(STATUS)
                first = time.monotonic()
                self._say()

    def _say(self) -> None:
        terminal.hide_bar()
        with contextlib.suppress(OSError):
            os.write(2, f"{self._line()}\n".encode(errors="backslashreplace"))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)  # hides the tracebacks of libraries
            os.close(null)
        self._said.set()
