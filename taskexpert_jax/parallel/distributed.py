"""Multi-process runs: initialisation, and a clean end of all processes when one fails.

docs/several_hosts.md describes how such runs are started.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple, NoReturn

from absl import flags
import jax

from taskexpert_jax import command_line, interruption
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import processes

_COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes: HOST:PORT where process 0 listens.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: their number.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: index of this one, from 0.")

_SECONDS_TO_SEE_A_FILE = 10  # written by another host: network file systems are slow
_SECONDS_TO_HEAR = 10  # a failed process waits at most this long for the others to read its message
_SECONDS_BETWEEN_LOOKS = 0.5
_FAILED, _HEARD = "taskexpert/failed/", "taskexpert/heard/"  # keys of messages, each with a process's index


class Group(NamedTuple):
    """Address, size and own index of a process group."""

    coordinator: str  # HOST:PORT
    count: int
    index: int


def named_group(env: Mapping[str, str], coordinator: str | None, count: int | None, index: int | None) -> Group | None:
    """Process group given by flags or else by JAX's environment variables; None without either.

    Raises:
      UserError: an incomplete group, or an index that is not below the count.
    """
    given: dict[str, Any] = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
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


_SEVERAL = ("train", "evaluate")  # the modes that several processes share


def start() -> bool:
    """Initialises JAX's distributed runtime where flags or the environment ask for it; returns whether it did.

    Must be called before JAX is asked for its devices. In order of precedence: --coordinator, --num_processes and
    --process_id; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Slurm's `srun`; a TPU VM.

    Raises:
      UserError: as `named_group`; the others are not there in time.
    """
    group = named_group(os.environ, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        if group is not None:
            # All devices of the host: with Slurm's variables in the environment JAX would take only one by default.
            jax.distributed.initialize(*group, cluster_detection_method="deactivate")
        elif is_slurm_step(os.environ) or is_tpu_pod(os.environ):
            jax.distributed.initialize()
        else:
            return False
    except (RuntimeError, ValueError) as error:
        where = f" at {group.coordinator}" if group else ""
        raise UserError(f"the processes did not find each other{where}: {' '.join(str(error).split())}") from error
    return jax.process_count() > 1


def _refuse_several(mode: str) -> None:
    group = named_group(os.environ, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if (group and group.count > 1) or is_slurm_step(os.environ):
        raise UserError(f"--mode={mode} runs in one process: start it once, without srun and without --coordinator")


@contextlib.contextmanager
def joined(mode: str) -> Iterator[None]:
    """Runs its body, a mode of the program, as one of several processes where there are several; see `start`.

    Only process 0 prints and logs. If one process fails, all of them exit with its status and its error message.

    Raises:
      UserError: as `start`; several processes for a mode that runs in one.
    """
    if mode not in _SEVERAL:
        _refuse_several(mode)
    if mode not in _SEVERAL or not start():
        yield
        return
    messages = _Messages()
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
            time.sleep(2 * _SECONDS_BETWEEN_LOOKS)
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


class _Messages:
    """Messages through JAX's key-value store: the devices may be waiting for a process that is gone."""

    def __init__(self) -> None:
        from jax._src import distributed  # the key-value store has no public name

        self._client: Any = distributed.global_state.client
        self._ending = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def fail(self, status: int, text: str, details: str = "") -> NoReturn:
        """Reports this process's failure to all others and exits; `details` are printed by this process only."""
        self._ending.acquire()  # never released: the process reports one error and exits
        sys.stderr.write(details)
        where = f"process {jax.process_index()} on {socket.gethostname()}"
        message = json.dumps({"status": status, "text": " ".join(text.split()), "where": where})
        with contextlib.suppress(RuntimeError):  # the process that carries the messages is gone
            self._client.key_value_set(f"{_FAILED}{jax.process_index()}", message)
        self._end(status, text)

    def close(self) -> None:
        """Stops listening."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            try:
                failed = self._client.key_value_dir_get(_FAILED)
            except RuntimeError:  # process 0 is gone; JAX ends this one when it notices
                return
            if failed and self._ending.acquire(blocking=False):
                message = json.loads(failed[0][1])
                self._end(message["status"], f"{message['text']} ({message['where']})")

    def _end(self, status: int, text: str) -> NoReturn:
        """Exits once all processes have read the message; a normal exit would wait for the others."""
        command_line.print_error(text)
        own = jax.process_index()
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"{_HEARD}{own}", "")
            deadline = time.monotonic() + _SECONDS_TO_HEAR
            while time.monotonic() < deadline and len(self._client.key_value_dir_get(_HEARD)) < jax.process_count():
                time.sleep(0.1)
            if own == 0:  # it hosts the key-value store: the others exit first
                time.sleep(2 * _SECONDS_BETWEEN_LOOKS)
        sys.stdout.flush()
        os._exit(status)


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
