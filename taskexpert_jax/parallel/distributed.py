"""Multi-process runs: initialisation, and a clean end of all processes when one fails.

docs/several_hosts.md describes how such runs are started.
"""

from collections.abc import Iterator, Mapping
import contextlib
import os
import socket
import sys
import time
import traceback
from typing import Any, NamedTuple

import jax

from taskexpert_jax import command_line, interruption
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import connection
from taskexpert_jax.parallel.messages import SECONDS_BETWEEN_LOOKS, Messages


class Wanted(NamedTuple):
    """Process group that flags ask for; None: not given.

    Attributes:
      coordinator: HOST:PORT where process 0 listens.
      count: number of processes.
      index: of this process, from 0.
      timeout: seconds that the processes wait for each other at the start.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    timeout: int = 300


class Group(NamedTuple):
    """Address, size and own index of a process group."""

    coordinator: str  # HOST:PORT
    count: int
    index: int


def named_group(env: Mapping[str, str], wanted: Wanted) -> Group | None:
    """Process group given by flags or else by JAX's environment variables; None without either.

    Raises:
      UserError: an incomplete group, or an index that is not below the count.
    """
    names = ("--coordinator", "--num_processes", "--process_id")
    given: dict[str, Any] = dict(zip(names, wanted[:3], strict=True))
    if all(value is None for value in given.values()):
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        given = {name: env.get(name) or None for name in names}
    if all(value is None for value in given.values()):
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise UserError(f"several processes need {', '.join(given)}, but {', '.join(missing)} is missing")
    address, count_name, index_name = given
    try:
        group = Group(str(given[address]), int(given[count_name]), int(given[index_name]))
    except ValueError as error:
        raise UserError(f"{count_name} and {index_name} must be whole numbers: {error}") from None
    host, colon, port = group.coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(f"{address}={group.coordinator}: must be HOST:PORT, a host that all processes reach")
    if not 0 <= group.index < group.count:
        raise UserError(f"{index_name}={group.index} must be from 0 to {count_name} - 1 = {group.count - 1}")
    return group


def is_slurm_step(env: Mapping[str, str]) -> bool:
    """True if `srun` started this process as one of several; False in the batch script itself."""
    return int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env


def is_tpu_pod(env: Mapping[str, str]) -> bool:
    """True if this host has TPU chips; JAX finds out by itself whether there are other hosts."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    from jax._src import cloud_tpu_init  # no public name for this

    return cloud_tpu_init.running_in_cloud_tpu_vm


def start(wanted: Wanted) -> bool:
    """Initialises JAX's distributed runtime where flags or the environment ask for it; returns whether it did.

    Must be called before JAX is asked for its devices. In order of precedence: --coordinator, --num_processes and
    --process_id; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Slurm's `srun`; a TPU VM.

    Exits with status 2 and one line if the others are not there in time.

    Raises:
      UserError: as `named_group`; the host of process 0 is unknown.
    """
    group = named_group(os.environ, wanted)
    if group is None and not (is_slurm_step(os.environ) or is_tpu_pod(os.environ)):
        return False
    # All devices of the host: with Slurm's variables in the environment JAX would take only one by default.
    given: dict[str, Any] = {}
    if group is not None:
        names = ("coordinator_address", "num_processes", "process_id")
        given = {**dict(zip(names, group, strict=True)), "cluster_detection_method": "deactivate"}
    _refuse_unknown_host(group)
    try:
        with connection.watched():
            jax.distributed.initialize(**given, initialization_timeout=wanted.timeout)
    except ValueError as error:
        raise UserError(_unconnected(group, wanted.timeout, str(error))) from error
    except RuntimeError as error:
        command_line.print_error(_unconnected(group, wanted.timeout, str(error)))
        os._exit(2)  # at a normal exit JAX prints the same in twenty lines
    return jax.process_count() > 1


def _refuse_unknown_host(group: Group | None) -> None:
    host = group.coordinator.rpartition(":")[0] if group else ""
    try:
        _ = host and socket.getaddrinfo(host.strip("[]"), None)  # brackets are around addresses of IPv6
    except (OSError, UnicodeError) as error:  # UnicodeError: two dots in a row, or more than 63 letters without one
        reason = error.strerror if isinstance(error, OSError) else "this is no name of a host"
        raise UserError(f"the host of process 0, {host!r}, is not known here: {reason}") from error


def _unconnected(group: Group | None, timeout: int, reason: str) -> str:
    """The line for a group that did not come together: what to check."""
    limit = f"--connect_timeout={timeout} s"
    if group is None:
        return f"the processes did not find each other within {limit}: {' '.join(reason.split())}"
    same = f"the same --coordinator={group.coordinator} and --num_processes={group.count}"
    if "Failed to start" in reason:
        return f"process 0 cannot listen at {group.coordinator}: another program does already; give a free port"
    if group.index == 0:
        return (
            f"not all of {group.count} processes came to process 0 at {group.coordinator} within {limit}: start each "
            f"--process_id from 0 to {group.count - 1} once, with {same}, on hosts that reach this port"
        )
    return (
        f"process {group.index} did not find process 0 and all others at {group.coordinator} within {limit}: start "
        f"each --process_id from 0 to {group.count - 1} once, with {same}; this host must reach the port"
    )


def refuse_several(mode: str, wanted: Wanted) -> None:
    """Raises UserError if flags or the environment ask for several processes."""
    group = named_group(os.environ, wanted)
    if (group and group.count > 1) or is_slurm_step(os.environ):
        raise UserError(
            f"{command_line.called(mode)} runs in one process: start it once, without srun and without --coordinator"
        )


@contextlib.contextmanager
def joined(wanted: Wanted) -> Iterator[None]:
    """Runs its body as one of several processes where there are several; see `start`.

    Only process 0 prints and logs. If one process fails, all of them exit with its status and its error message.

    Raises:
      UserError: as `start`.
    """
    if not start(wanted):
        yield
        return
    messages = Messages()
    with contextlib.ExitStack() as stack:
        if jax.process_index():
            stack.enter_context(_silent())
        stack.enter_context(contextlib.closing(messages))
        try:
            yield
        except SystemExit:
            raise
        except UserError as error:
            messages.fail(2, str(error))
        except KeyboardInterrupt:
            messages.fail(interruption.STATUS, "interrupted")
        except BaseException as error:
            # The error may only be the lost connection to a process that has failed: let that one report first.
            time.sleep(2 * SECONDS_BETWEEN_LOOKS)
            if lost := connection.loss(error):
                messages.fail(1, lost, seconds=2 * SECONDS_BETWEEN_LOOKS)  # the lost one reads nothing
            messages.fail(1, f"{type(error).__name__}: {error}", traceback.format_exc())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discards stdout, also that of C++ libraries such as JAX's transport, and logs errors only, within its body."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with command_line.errors_only():
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
