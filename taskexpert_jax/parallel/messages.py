"""Messages of a failed process to the others of its run, so that all end with its status and its line."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from taskexpert_jax import command_line
from taskexpert_jax.parallel.connection import ENDING

SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_HEAR = 10  # a failed process waits at most this long for the others to read its message
_FAILED, _HEARD = "taskexpert/failed/", "taskexpert/heard/"  # keys of messages, each with a process's index


class Messages:
    """Messages through JAX's key-value store: the devices may be waiting for a process that is gone."""

    def __init__(self) -> None:
        from jax._src import distributed  # the key-value store has no public name

        self._client: Any = distributed.global_state.client
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def fail(self, status: int, text: str, details: str = "", seconds: float = _SECONDS_TO_HEAR) -> NoReturn:
        """Reports this process's failure to all others and exits.

        Args:
          status: the exit status of all.
          text: the line.
          details: printed by this process only.
          seconds: longest wait for the others to read the line.
        """
        ENDING.acquire()  # the process reports one error and exits
        sys.stderr.write(details)
        where = f"process {jax.process_index()} on {socket.gethostname()}"
        message = json.dumps({"status": status, "text": " ".join(text.split()), "where": where})
        with contextlib.suppress(RuntimeError):  # the process that carries the messages is gone
            self._client.key_value_set(f"{_FAILED}{jax.process_index()}", message)
        self._end(status, text, seconds)

    def close(self) -> None:
        """Stops listening."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_LOOKS):
            try:
                failed = self._client.key_value_dir_get(_FAILED)
            except RuntimeError:  # process 0 is gone; JAX ends this one when it notices
                return
            if failed and ENDING.acquire(blocking=False):
                message = json.loads(failed[0][1])
                self._end(message["status"], f"{message['text']} ({message['where']})")

    def _end(self, status: int, text: str, seconds: float = _SECONDS_TO_HEAR) -> NoReturn:
        """Exits once all processes have read the message; a normal exit would wait for the others."""
        command_line.print_error(text)
        own = jax.process_index()
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"{_HEARD}{own}", "")
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and len(self._client.key_value_dir_get(_HEARD)) < jax.process_count():
                time.sleep(0.1)
            if own == 0:  # it hosts the key-value store: the others exit first
                time.sleep(2 * SECONDS_BETWEEN_LOOKS)
        sys.stdout.flush()
        os._exit(status)
