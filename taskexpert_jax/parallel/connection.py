"""The connection between the processes of a run: found within a time limit, and lost in one line.

JAX's client of its coordination service reacts to both by aborting the process from a thread in C++, with a dump of all
threads. Given a callback it raises std::bad_cast instead, because it cannot convert the argument (jaxlib 0.10). So the
callback may come from JAX, from C++'s handler of uncaught exceptions, or as a RuntimeError while connecting.
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import os
import re
import threading
import time
from typing import Any

import jax

from taskexpert_jax import command_line

ENDING = threading.Lock()  # held by the thread that reports why the process ends; never released
_connected = threading.Event()
_SECONDS_TO_END = 20  # for a thread that does so
_LOST = re.compile(r"Gloo|NCCL|coordination|Connection (closed|reset)|Socket closed|heartbeat|[Bb]arrier|UNAVAILABLE")
_LATE = re.compile(r"Gloo context initialization failed: DEADLINE_EXCEEDED")

LOST = (
    "the connection to another process is lost: it was killed, or its host cannot be reached; the same command resumes "
    "from the last checkpoint"
)
LATE = (
    "another process came to the first exchange of a compiled program more than 30 s later, which is Gloo's limit: "
    "start again, on hosts that are equally fast and run nothing else"
)


def loss(error: BaseException) -> str | None:
    """The line for an error of a computation that lost another process; None for other errors."""
    text = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or not _LOST.search(text):
        return None
    return LATE if _LATE.search(text) else LOST


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """JAX's clients that are made within its body end the process with one line when they lose the connection."""
    from jax._src import distributed  # `jax.distributed.initialize` does not pass a callback on

    make = distributed._jax.get_distributed_runtime_client

    def make_watched(*args: Any, **options: Any) -> Any:
        return make(*args, **options, missed_heartbeat_callback=_end)

    distributed._jax.get_distributed_runtime_client = make_watched
    try:
        yield
    finally:
        distributed._jax.get_distributed_runtime_client = make
    _on_uncaught_bad_cast(_end)
    _connected.set()


def _end(*_: Any) -> None:
    """Ends the process with a line, unless another thread is about to; before it is connected, `connect` raises."""
    if not _connected.is_set():
        return
    if ENDING.acquire(blocking=False):
        command_line.print_error(LOST)
    else:
        time.sleep(_SECONDS_TO_END)
    os._exit(1)


_handlers = []  # ctypes frees functions without a reference


def _on_uncaught_bad_cast(call: Callable[[], None]) -> None:
    """Calls a function when std::bad_cast is not caught in C++; other exceptions abort as before."""
    handler_type = ctypes.CFUNCTYPE(None)
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate = library._ZSt13set_terminatePFvvE
        current_type = library.__cxa_current_exception_type
    except (OSError, AttributeError):  # another C++ library: JAX aborts with its own lines
        return
    set_terminate.restype, set_terminate.argtypes = handler_type, [handler_type]
    current_type.restype = ctypes.POINTER(ctypes.c_char_p)

    def handle() -> None:
        found = current_type()
        if found and found[1] == b"St8bad_cast":  # the second word of std::type_info is the name
            call()
        before()

    _handlers.append(handler_type(handle))
    before = set_terminate(_handlers[-1])
