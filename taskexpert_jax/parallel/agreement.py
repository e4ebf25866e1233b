"""Checks that the processes of a run are one program: the same config, data and code, in the same directory."""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.metadata
import json
import pathlib
import platform
import secrets
import socket
import time
from typing import Any
import zlib

import jax
from ml_collections import ConfigDict

from taskexpert_jax import installation, storage
from taskexpert_jax.config import flat
from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.parallel import processes

_SECONDS_TO_SEE_A_FILE = 10  # written by another host: network file systems are slow
_SHOWN = 5  # differences in the line
_OWN = (
    "dataset.data_dir",
    "dataset.local_cache",
    "dataset.cache",
    "dataset.threads",
)  # may differ: hosts have disks of their own
_PACKAGES = ("jax", "jaxlib", "numpy")


def refuse_other_programs(config: ConfigDict, seconds: int, **given: Any) -> None:
    """Raises UserError, in every process, if config, code, versions or the `given` flags are not the same in all.

    seconds: that the processes wait for a late one.
    """
    fields = {f"config.{name}": value for name, value in flat(config) if name not in _OWN}
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    own = {**{f"--{name}": value for name, value in given.items()}, **fields}
    own |= {"the code": code(), "Python": platform.python_version(), **versions}
    _refuse_different("command", own, seconds)


def refuse_other_data(dataset: ConfigDict, seconds: int) -> None:
    """Raises UserError, in every process, if their data differ; see `pipeline.record_fingerprint`."""
    _refuse_different("data", {"dataset.fingerprint": dataset.get("fingerprint", "")}, seconds)


def code() -> str:
    """Checksum of the sources of this program."""
    value = 0
    for package in (installation.PACKAGE, installation.root() / "input_pipeline"):
        for path in sorted(package.rglob("*.py")):
            value = zlib.crc32(path.read_bytes(), zlib.crc32(str(path.relative_to(package)).encode(), value))
    return f"{value:08x}"


def _refuse_different(what: str, own: Mapping[str, Any], seconds: int) -> None:
    """Raises UserError, in every process, if they do not all call it with equal facts.

    The facts go through JAX's key-value store, which waits longer for a late process than an exchange of arrays does.

    Args:
      what: names the exchange; each once in a run.
      own: facts of this process, by name.
      seconds: that it waits for the others.
    """
    if jax.process_count() == 1:
        return
    from jax._src import distributed  # the key-value store has no public name

    client: Any = distributed.global_state.client
    key = f"taskexpert/{what}/"
    host = socket.gethostname()
    client.key_value_set(f"{key}{jax.process_index()}", json.dumps([host, dict(own)], default=str))
    found = []
    deadline = time.monotonic() + seconds
    for index in range(jax.process_count()):
        left = max(int(1000 * (deadline - time.monotonic())), 1)
        try:
            found.append(json.loads(client.blocking_key_value_get(f"{key}{index}", left)))
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"process {index} has not come to the comparison of the processes ({what}) within {seconds} s; see "
                "what it waits for, or raise --connect_timeout"
            ) from error
    if lines := list(differences(found)):
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise UserError(
            f"the processes are not one program: {'; '.join(lines[:_SHOWN])}{more}; start all with the same command, "
            "code and data"
        )


def differences(found: list[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    """A clause for each fact that differs from process 0's, with the first process where it does.

    found: host and facts of each process.
    """
    _, first = found[0]
    for name in sorted({name for _, facts in found for name in facts}):
        for index, (host, facts) in enumerate(found):
            if (name in facts, facts.get(name)) != (name in first, first.get(name)):
                ours, theirs = (shown(of[name]) if name in of else "absent" for of in (first, facts))
                yield f"{name} is {ours} in process 0 and {theirs} in process {index} on {host}"
                break


def refuse_unshared(workdir: pathlib.Path) -> None:
    """Raises UserError, in every process, if they do not all see the same directory; it need not exist yet.

    Process 0 creates a file in it, or in its nearest existing parent, and removes it again. In a bucket all do, each
    its own, because there each has permissions of its own.
    """
    if jax.process_count() == 1:
        return
    workdir = workdir.absolute()
    index, bucket = jax.process_index(), storage.is_bucket(workdir)
    folders = (workdir, *workdir.parents)
    above = 0 if bucket else next(i for i, folder in enumerate(folders) if folder.is_dir())
    above, name = processes.gather((above, f".shared_by_all_processes_{secrets.token_hex(8)}"))[0]
    tokens = [folders[: above + 1][-1] / f"{name}_{of}" for of in range(jax.process_count())]
    written = index == 0 or bucket
    problem = ""
    if written:
        try:
            tokens[index].write_bytes(b"")
        except OSError as error:
            problem = f"cannot be written to by process {index} on {socket.gethostname()}: {error.strerror}"
    problem = next(filter(None, processes.gather(problem)), "")
    blind = "" if problem else _unseen(tokens[0], 0 if bucket else _SECONDS_TO_SEE_A_FILE)
    seen = processes.gather((socket.gethostname(), blind))
    if written:
        with contextlib.suppress(OSError):
            tokens[index].unlink(missing_ok=True)
    if lines := [f"process {of} on {host} {why}" for of, (host, why) in enumerate(seen) if why]:
        problem = f"is not shared: {', '.join(lines)}; " + (
            "all processes need the same store, with permission to read and write"
            if bucket
            else "give a directory on a file system that all hosts mount at the same place"
        )
    if problem:
        raise UserError(f"--workdir={workdir} {problem}")


def _unseen(token: pathlib.Path, seconds: float) -> str:
    """Why this process does not see a file that process 0 has written; empty if it does within some seconds."""
    deadline = time.monotonic() + seconds
    try:
        while not token.exists():
            if time.monotonic() >= deadline:
                return "does not see what process 0 writes there"
            time.sleep(0.1)
    except OSError as error:
        return f"cannot read what process 0 writes there: {error.strerror}"
    return ""
