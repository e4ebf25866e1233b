"""A run's directory belongs to one config, and to one program at a time."""

from collections.abc import Iterator, Mapping
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
from typing import Any

from taskexpert_jax.config import flat, read_run
from taskexpert_jax.errors import UserError

# What may change when a run is resumed: where and how fast it runs and what it reports, not what it computes.
FREE = ("mesh.", "eval.", "log.", "guard.", "checkpoint.", "dataset.cache", "dataset.threads", "dataset.data_dir")


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Creates the directory and locks it for this program while the body runs.

    The kernel holds the lock and releases it when the program ends, however it ends; the file remains.

    Raises:
      UserError: another program holds the lock; the message names it. Nothing is changed.
    """
    path = workdir / ".lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written to: {error.strerror}; give another") from error
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
    """Makes the directory and writes config.json, or checks that the one there is the same.

    Args:
      workdir: the run's directory.
      config: plain dict form of the config. Fields that the run's own config lacks, because the program did not have
        them when it started, must have their default.

    Raises:
      UserError: the directory belongs to a run with another config; the message lists the fields. Or its config cannot
        be read. Nothing is written.
    """
    path = workdir / "config.json"
    wanted = json.loads(json.dumps(config))
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n")
        partial.rename(path)
        return
    saved = json.loads(json.dumps(read_run(workdir).to_dict()))
    differences = list(_differences(dict(flat(saved)), dict(flat(wanted))))
    if differences:
        listed = "".join(f"\n  {line}" for line in differences)
        raise UserError(
            f"{workdir} holds a run of another config; use another --workdir, or what the run started with:{listed}"
        )


def note_other_data(workdir: pathlib.Path, config: Mapping[str, Any]) -> str:
    """A line if the data of `config` are not those that the run in the workdir was trained on, else empty."""
    path = workdir / "config.json"
    if not path.exists():
        return ""
    trained, given = read_run(workdir).dataset.fingerprint, config["dataset"]["fingerprint"]
    if trained == given:
        return ""
    return f"other data than those of training: fingerprint {given or 'unknown'}, in training {trained or 'unknown'}"


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """A line for every field that differs, but those that may."""
    for name in sorted(saved.keys() | wanted.keys()):
        if name.startswith(FREE) or (name in saved and name in wanted and saved[name] == wanted[name]):
            continue
        was, now = (repr(of[name]) if name in of else "absent" for of in (saved, wanted))
        yield f"{name} was {was}, is {now}"
