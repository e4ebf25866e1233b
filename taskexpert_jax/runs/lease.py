"""The lease of a workdir in a bucket: the object `.lease`, by which one program at a time writes there.

A bucket has no locks. The object is written only if nobody else has written it since it was read, and renewed while the
program runs. It ends with the program; if that is killed it expires, by the clock of the store: those of hosts differ.
"""

from collections.abc import Iterator
import contextlib
import datetime
import errno
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import NamedTuple

from absl import logging

from taskexpert_jax import json_file
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.storage import client, generations
from taskexpert_jax.storage.bucket import BucketPath

NAME = ".lease"
RENEW_SECONDS = 15.0
EXPIRE_SECONDS = 60.0  # age at which a lease that was not renewed may be taken over
_RELEASE_SECONDS = 5.0  # longest wait for the store at the end: an unreleased lease expires


class Holder(NamedTuple):
    """The program that a lease names; empty where an object of this name is not ours."""

    token: str = ""
    process: int = 0
    host: str = ""
    machine: str = ""
    started: int = 0
    since: str = ""
    ended: bool = False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}" if self.token else "another program"


def _machine() -> str:
    """Names the running system and its numbering of processes; empty where it is unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> int:
    """Start time of a process in ticks since the system's start; 0 if it does not exist or has ended."""
    try:
        _, _, fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")  # a name may have spaces
    except OSError:
        return 0
    state, *rest = fields.split()
    return 0 if state in "ZX" else int(rest[18])


def _own() -> Holder:
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    process = os.getpid()
    return Holder(secrets.token_hex(16), process, socket.gethostname(), _machine(), _started(process), now)


def _holder(version: generations.Version) -> Holder:
    try:
        fields = json_file.parse(version.content, dict)
        found = Holder(**{name: fields[name] for name in Holder._fields})
    except (json_file.MalformedError, KeyError):
        return Holder()
    ours = all(type(value) is type(of_ours) for value, of_ours in zip(found, Holder(), strict=True))
    return found if ours and all(str(value).isprintable() for value in found) else Holder()


def _seconds() -> float:
    """A clock that nobody sets, and that runs on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))  # macOS has only the latter


class Lease:
    """A lease that this program has; a thread renews it.

    Args:
      workdir: the run's directory.
      renew_seconds: interval between renewals.
      expire_seconds: age at which others may take it over.

    Raises:
      UserError: another program has it; the message names it. Nothing is changed.
      StoreError: the store cannot be read or written to.
    """

    def __init__(self, workdir: BucketPath, renew_seconds: float, expire_seconds: float):
        self._workdir, self._path = workdir, workdir / NAME
        self._renew_seconds, self._expire_seconds = renew_seconds, expire_seconds
        self._own = _own()
        self._count = 0
        self._generation = 0
        self._renewed = _seconds()  # not later than the store's time of the last write
        self._lost = ""
        self._writing = threading.Lock()
        self._ending = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if another program has taken it over; asks the store only if it may have expired."""
        if not self._lost and _seconds() - self._renewed >= self._expire_seconds:
            self._renew()
        if self._lost:
            raise UserError(self._lost)

    def renew(self, seconds: float = client.RETRY_SECONDS) -> None:
        """As `check`, and renews it: for writes that take long.

        seconds: longest wait for a store that does not answer.
        """
        if not self._lost:
            self._renew(seconds=seconds)
        self.check()

    # --- acquiring ---

    def _acquire(self) -> None:
        first = None  # the lease of a holder whose next renewal is awaited
        while True:
            current = generations.read(self._path)
            if first is not None and current is not None and current.generation != first.generation:
                self._refuse(_holder(current))
            if current is not None and (wait := self._wait(current)):
                if first is None:
                    logging.info(
                        f"{self._workdir} was in use by {_holder(current)}, which does not say that it has ended: "
                        f"waiting for up to {wait:.0f} s for a sign of it"
                    )
                    first = current
                time.sleep(min(wait, self._renew_seconds / 3))
                continue
            try:
                self._write(current.generation if current else generations.MISSING)
            except generations.Changed as changed:  # another start was faster
                if changed.current is not None:
                    self._refuse(_holder(changed.current))
                continue
            if first is not None:
                logging.info(f"{self._workdir} is taken over from {_holder(first)}")
            return

    def _wait(self, current: generations.Version) -> float:
        """Seconds until a lease that nobody renews expires; 0 if its program has ended."""
        holder = _holder(current)
        if holder.ended:
            return 0
        here = bool(holder.machine) and (holder.host, holder.machine) == (self._own.host, self._own.machine)
        if here and _started(holder.process) != holder.started:
            return 0
        left = max(current.updated + self._expire_seconds - generations.now(self._workdir), 0)
        if here and left:
            self._refuse(holder)
        return left

    def _refuse(self, holder: Holder) -> None:
        if not holder.ended:
            raise UserError(f"{self._workdir} is in use by {holder}: wait until it has ended, or use another --workdir")

    # --- keeping ---

    def _write(self, generation: int, *, ended: bool = False, seconds: float = client.RETRY_SECONDS) -> None:
        self._count += 1
        fields = self._own._replace(ended=ended)._asdict() | {"writes": self._count}
        content = f"{json.dumps(fields, indent=2)}\n".encode()
        began = _seconds()
        version = generations.write(self._path, content, generation, seconds=seconds)
        self._generation, self._renewed = version.generation, began

    def _renew(self, *, ended: bool = False, seconds: float = client.RETRY_SECONDS) -> None:
        """Writes the lease again, or finds that it is lost."""
        if not self._writing.acquire(timeout=seconds):
            raise StoreError(errno.EIO, "the store does not answer", str(self._path))
        try:
            while not self._lost:
                try:
                    return self._write(self._generation, ended=ended, seconds=seconds)
                except generations.Changed as changed:
                    self._found(changed.current)
        finally:
            self._writing.release()

    def _found(self, current: generations.Version | None) -> None:
        """Reacts to a lease that is not as this program wrote it last."""
        holder = Holder() if current is None else _holder(current)
        if current is not None and holder.token == self._own.token:  # a write of ours, whose answer was lost
            self._generation = current.generation
        elif current is None:
            self._lost = f"{self._path} has been deleted during the run, which ends here"
        else:
            self._lost = (
                f"{self._workdir} has been taken over by {holder}, because this run had not reached the store for "
                f"{_seconds() - self._renewed:.0f} s; it ends here and writes nothing more"
            )

    def _keep(self) -> None:
        reached = True
        while not self._lost and not self._ending.wait(self._renew_seconds):
            try:
                self._renew()
                reached = True
            except StoreError as error:
                if reached:
                    logging.warning(f"{self._path} cannot be renewed: {error.strerror}; trying again")
                reached = False

    def release(self) -> None:
        """Ends the lease, so that the next start need not wait; does nothing if that fails."""
        self._ending.set()
        self._thread.join(_RELEASE_SECONDS)
        if not self._lost and not self._thread.is_alive():
            with contextlib.suppress(StoreError):
                self._renew(ended=True, seconds=_RELEASE_SECONDS)


@contextlib.contextmanager
def held(
    workdir: pathlib.Path, *, renew_seconds: float = RENEW_SECONDS, expire_seconds: float = EXPIRE_SECONDS
) -> Iterator[Lease]:
    """Takes the lease of a workdir in a bucket while the body runs; see `Lease`."""
    lease = Lease(BucketPath(workdir), renew_seconds, expire_seconds)
    try:
        yield lease
    finally:
        lease.release()
