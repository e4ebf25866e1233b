"""Checks that the processes of a run are one program: the same config, data and code, in the same directory."""

from collections.abc import Iterator, Mapping
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

from taskexpert_jax import installation
from taskexpert_jax.config import flat
from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.parallel import processes

_SECONDS_TO_SEE_A_FILE = 10  # written by another host: network file systems are slow
_SHOWN = 5  # differences in the line
_OWN = ("dataset.data_dir", "dataset.cache", "dataset.threads")  # may differ: hosts have disks of their own
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

    Process 0 creates a file in it, or in its nearest existing parent, and removes it again.
    """
    if jax.process_count() == 1:
        return
    workdir = workdir.absolute()
    first = jax.process_index() == 0
    above = next(i for i, folder in enumerate((workdir, *workdir.parents)) if folder.is_dir())
    above, name = processes.gather((above, f".shared_by_all_processes_{secrets.token_hex(8)}"))[0]
    token = ((workdir, *workdir.parents)[: above + 1])[-1] / name
    problem = None
    if first:
        try:
            token.touch()
        except OSError as error:
            problem = f"--workdir={workdir}: cannot be written to: {error}"
    problem = processes.gather(problem)[0]
    deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    while problem is None and not token.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = processes.gather((socket.gethostname(), token.exists()))
    if first:
        token.unlink(missing_ok=True)
    blind = [f"{index} on {host}" for index, (host, sees) in enumerate(seen) if not sees]
    if problem is None and blind:
        problem = (
            f"--workdir={workdir} is not shared: what process 0 writes there is not seen by process "
            f"{', '.join(blind)}; give a directory on a file system that all hosts mount at the same place"
        )
    if problem is not None:
        raise UserError(problem)
