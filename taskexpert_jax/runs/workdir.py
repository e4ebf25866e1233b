"""A run's directory: bound to one config, and locked by one program at a time."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from typing import Any, Protocol

from absl import logging
from ml_collections import ConfigDict

from taskexpert_jax import files, storage
from taskexpert_jax.config import flat, read_run
from taskexpert_jax.errors import UserError

# Fields that may change on resume: they affect speed, placement and reports, not the computation.
_DATA = ("dataset.cache", "dataset.threads", "dataset.data_dir", "dataset.local_cache")
FREE = ("mesh.", "eval.", "log.", "guard.", "checkpoint.", "profile.", *_DATA)


@contextlib.contextmanager
def _written(workdir: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written to: {error.strerror}; use another") from error


class Hold(Protocol):
    """A workdir that this program alone writes to. A lock of the operating system cannot be lost, but a lease can."""

    def check(self) -> None:
        """Raises UserError if another program has taken the workdir over; called before each write to it."""

    def renew(self, seconds: float = ...) -> None:
        """As `check`, and asks the store, for so long; called before writes that take long."""


class Locked:
    """A `Hold` that cannot be lost: a kernel lock, or that of process 0 where this is another one."""

    def check(self) -> None:
        """Does nothing."""

    def renew(self, seconds: float = 0) -> None:
        """Does nothing."""


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[Hold]:
    """Creates the directory and locks it for this program while the body runs.

    On a disk the operating system releases the lock when the program ends for any reason, and the lock file remains. In
    a bucket it is a lease (`lease.py`), which expires.

    Raises:
      UserError: another program holds the lock; the message names it. Nothing is changed.
    """
    with contextlib.ExitStack() as stack:
        if storage.is_bucket(workdir):
            from taskexpert_jax.runs import lease

            with _written(workdir):
                workdir.mkdir(exist_ok=True)  # fails if there is an object of this name
                hold = stack.enter_context(lease.held(workdir))
        else:
            stack.enter_context(_locked(workdir))
            hold = Locked()
        yield hold


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    path = workdir / ".lock"
    with _written(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by {file.read().decode().strip() or 'another program'}: "
                "wait until it has ended, or use another --workdir"
            ) from None
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        with _written(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def claim(workdir: pathlib.Path, config: ConfigDict, *, extend: bool = False) -> int | None:
    """Creates the directory and writes config.json, or checks an existing config.json against the config.

    A directory without any checkpoint is claimed anew: the program that wrote its config.json trained nothing.

    Args:
      workdir: the run's directory.
      config: the config. Fields that are missing from an existing config.json, because they did not exist when the run
        started, must have their defaults.
      extend: accept a larger `num_steps` than the run's, and write it to config.json.

    Returns:
      The `num_steps` that the run had before, if it was raised.

    Raises:
      UserError: the directory belongs to a run with another config (the message lists the differing fields), or its
        config cannot be read. Nothing is written.
    """
    path = workdir / "config.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        _write(path, config)
        return None
    saved = read_run(workdir)
    lines = differences(saved, config)
    if not lines:
        return None
    before = saved.num_steps
    saved.num_steps = max(before, config.num_steps)
    only_longer = not differences(saved, config)
    if not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
        logging.info(f"{workdir} had another config and no checkpoint: it gets this config")
    elif not (extend and only_longer):
        raise UserError(
            f"{workdir} has a run with another config; use another --workdir, or the values of that run"
            f"{', or --extend to train it further' if only_longer else ''}:{listed(lines)}"
        )
    _write(path, config)
    return before if only_longer else None


def _write(path: pathlib.Path, config: ConfigDict) -> None:
    files.write({path: json.dumps(config.to_dict(), indent=2) + "\n"})


def note_other_data(workdir: pathlib.Path, fingerprint: str) -> str:
    """A note if data with this fingerprint are not the training data of the run in the workdir, else empty."""
    trained = read_run(workdir).dataset.fingerprint
    if trained == fingerprint:
        return ""
    return (
        f"other data than those of training: fingerprint {fingerprint or 'unknown'}, in training {trained or 'unknown'}"
    )


def differences(saved: ConfigDict, wanted: ConfigDict, free: Sequence[str] = FREE) -> list[str]:
    """One line per differing field, except those whose names start with one of `free`."""
    return list(_differences(dict(flat(_plain(saved))), dict(flat(_plain(wanted))), tuple(free)))


def listed(lines: Sequence[str]) -> str:
    """The lines of `differences` for the end of a message, indented, each on a line of its own."""
    return "".join(f"\n  {line}" for line in lines)


def _plain(config: ConfigDict) -> Any:
    """The config as JSON keeps it, in which lists and tuples are the same."""
    return json.loads(json.dumps(config.to_dict()))


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], free: tuple[str, ...]) -> Iterator[str]:
    for name in sorted(saved.keys() | wanted.keys()):
        if name.startswith(free) or (name in saved and name in wanted and saved[name] == wanted[name]):
            continue
        was, now = (repr(of[name]) if name in of else "absent" for of in (saved, wanted))
        yield f"{name} was {was}, is {now}"
