"""Locks between the processes of a host."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
from typing import TextIO

from absl import logging

from taskexpert_jax.errors import UserError


@contextlib.contextmanager
def held(path: pathlib.Path, *, refusal: str = "", waiting: str = "") -> Iterator[None]:
    """Holds the lock file `path` and removes it at the end; the operating system releases the lock of a killed process.

    Args:
      path: the file, in an existing local folder.
      refusal: the error if another process holds the lock; empty: waits for it.
      waiting: logged before waiting.

    Raises:
      UserError: another process holds the lock, and there is a `refusal`.
    """
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if refusal:
                    raise UserError(refusal) from error
                logging.info(waiting)
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, file):
                try:
                    yield
                finally:
                    path.unlink()
                return
        # Another process removed the file after it was opened here, so the lock protects nothing: try again.


def _is_at(path: pathlib.Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
