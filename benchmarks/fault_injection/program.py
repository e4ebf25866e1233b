"""One start of the training program, and what it left in the workdir."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from taskexpert_jax import storage
from taskexpert_jax.runs import sealing

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))  # starts need not compile again

EVERY = 4  # steps between checkpoints
PATIENCE = 600  # seconds before a wait fails
POLL = 0.01  # seconds between two looks at the program's lines
POLL_CHECKPOINTS = {False: 0.01, True: 0.3}  # at the checkpoints, by whether they are in a bucket: those are requests


@dataclasses.dataclass(frozen=True)
class Launch:
    """Command of a training program: its flags, and environment variables in addition to those of this process."""

    flags: list[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


class Program:
    """One start of the training program, and the lines that it has printed so far."""

    def __init__(self, workdir: pathlib.Path, launch: Launch):
        command = [sys.executable, "main.py", *launch.flags, f"--workdir={workdir}"]
        environment = {**os.environ, **launch.environment}
        self.workdir = workdir
        self.started = time.monotonic()
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.lines.extend(line.rstrip() for line in self._process.stdout)

    def wait_for(self, pattern: str, count: int = 1) -> bool:
        """Waits until `count` lines match; False if the program ends before."""
        deadline = time.monotonic() + PATIENCE
        while sum(bool(re.search(pattern, line)) for line in tuple(self.lines)) < count:
            if self._process.poll() is not None:
                self._reader.join()
                return sum(bool(re.search(pattern, line)) for line in self.lines) >= count
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {pattern!r} in {PATIENCE} s; the last lines: {self.lines[-3:]}")
            time.sleep(POLL)
        return True

    def wait_for_checkpoint(self, step: int) -> None:
        """Waits until a checkpoint of this or a later step is complete."""
        deadline = time.monotonic() + PATIENCE
        while newest(self.workdir) < step:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"no checkpoint of step {step}; the last lines: {self.lines[-3:]}")
            time.sleep(POLL_CHECKPOINTS[storage.is_bucket(self.workdir)])

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits until a condition holds; False if the program ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened in {PATIENCE} s; the last lines: {self.lines[-3:]}")
            time.sleep(POLL)
        return True

    @property
    def running(self) -> bool:
        """True until the program ends."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the program still runs."""
        self._process.send_signal(number)

    def status(self) -> int:
        """Waits for the end and returns the exit status, negative for a signal."""
        status = self._process.wait(timeout=PATIENCE)
        self._reader.join()
        return status

    def last_match(self, pattern: str) -> str:
        """The last line that matches, or empty."""
        return next((line for line in reversed(self.lines) if re.search(pattern, line)), "")

    @property
    def resumed(self) -> int:
        """The step that it resumed from; 0 for a fresh start, -1 if it has not reported it."""
        if found := re.search(r"resumed .* at step (\d+)", self.last_match("^resumed")):
            return int(found[1])
        return 0 if self.last else -1

    @property
    def last(self) -> int:
        """The last step reported, or 0."""
        found = re.match(r"step (\d+)/", self.last_match(r"^step \d+/"))
        return int(found[1]) if found else 0


def newest(workdir: pathlib.Path) -> int:
    """Step of the newest complete, that is sealed, checkpoint in the workdir; 0 if there is none."""
    steps = [int(path.parent.name) for path in (workdir / "checkpoints").glob(f"[0-9]*/{sealing.MANIFEST}")]
    return max(steps, default=0)


def remarks(program: Program) -> str:
    """Warnings and errors of a start about checkpoints, without machine-specific paths and names."""
    lines = [line for line in program.lines if re.search(r"^(warning|error)|being written", line)]
    usual = ("trying again", "Waiting for previous save")
    said = "; ".join(dict.fromkeys(line for line in lines if not any(text in line for text in usual)))
    if retried := sum("trying again" in line for line in lines):
        said = f"{said}; {retried} warnings that a request is tried again".removeprefix("; ")
    said = said.replace(str(program.workdir), "WORKDIR").replace(f" on {socket.gethostname()} ", " on HOST ")
    return shortened(said)


def shortened(text: str) -> str:
    """The text with long names of Orbax's data files shortened."""
    return re.sub(r"\b([0-9a-f]{6})[0-9a-f]{26}\b", r"\1...", text)
