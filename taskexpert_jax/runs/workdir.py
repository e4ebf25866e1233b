"""A run's directory: bound to one config, and locked by one program at a time."""

from collections.abc import Iterator, Mapping
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from typing import Any

from taskexpert_jax import files
from taskexpert_jax.config import flat, read_run
from taskexpert_jax.errors import UserError

# Fields that may change on resume: they affect speed, placement and reports, not the computation.
FREE = ("mesh.", "eval.", "log.", "guard.", "checkpoint.", "dataset.cache", "dataset.threads", "dataset.data_dir")


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Creates the directory and locks it for this program while the body runs.

    The operating system releases the lock when the program ends for any reason; the lock file remains.

    Raises:
      UserError: another program holds the lock; the message names it. Nothing is changed.
    """
    path = workdir / ".lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written to: {error.strerror}; use another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by {file.read().strip() or 'another program'}: "
                "wait until it has ended, or use another --workdir"
            ) from None
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def claim(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Creates the directory and writes config.json, or checks an existing config.json against the config.

    Args:
      workdir: the run's directory.
      config: the config as plain dicts. Fields that are missing from an existing config.json, because they did not
        exist when the run started, must have their defaults.

    Raises:
      UserError: the directory belongs to a run with another config (the message lists the differing fields), or its
        config cannot be read. Nothing is written.
    """
    path = workdir / "config.json"
    wanted = json.loads(json.dumps(config))
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        files.write({path: json.dumps(wanted, indent=2) + "\n"})
        return
    saved = json.loads(json.dumps(read_run(workdir).to_dict()))
    differences = list(_differences(dict(flat(saved)), dict(flat(wanted))))
    if differences:
        listed = "".join(f"\n  {line}" for line in differences)
        raise UserError(
            f"{workdir} has a run with another config; use another --workdir, or the values of that run:{listed}"
        )


def note_other_data(workdir: pathlib.Path, config: Mapping[str, Any]) -> str:
    """A note if the data of `config` differ from the training data of the run in the workdir, else empty."""
    path = workdir / "config.json"
    if not path.exists():
        return ""
    trained, given = read_run(workdir).dataset.fingerprint, config["dataset"]["fingerprint"]
    if trained == given:
        return ""
    return f"other data than those of training: fingerprint {given or 'unknown'}, in training {trained or 'unknown'}"


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """One line per differing field, except those in FREE."""
    for name in sorted(saved.keys() | wanted.keys()):
        if name.startswith(FREE) or (name in saved and name in wanted and saved[name] == wanted[name]):
            continue
        was, now = (repr(of[name]) if name in of else "absent" for of in (saved, wanted))
        yield f"{name} was {was}, is {now}"
