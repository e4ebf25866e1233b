"""One start of the training program, and what it left in the workdir."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from taskexpert_jax.runs import sealing

ROOT = pathlib.Path(__file__).resolve().parents[2]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))  # starts need not compile again

EVERY = 4  # steps between checkpoints
PATIENCE = 600  # seconds before a wait fails


class Program:
    """One start of the training program, and the lines that it has printed so far."""

    def __init__(self, workdir: pathlib.Path, flags: list[str]):
        command = [sys.executable, "main.py", *flags, f"--workdir={workdir}"]
        self.workdir = workdir
        self.started = time.monotonic()
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
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
            time.sleep(0.01)
        return True

    def wait_for_checkpoint(self, step: int) -> None:
        """Waits until a checkpoint of this or a later step is complete."""
        deadline = time.monotonic() + PATIENCE
        while newest(self.workdir) < step:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"no checkpoint of step {step}; the last lines: {self.lines[-3:]}")
            time.sleep(0.01)

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
    said = "; ".join(line for line in program.lines if re.search(r"^(warning|error)|being written", line))
    said = said.replace(str(program.workdir), "WORKDIR").replace(f" on {socket.gethostname()} ", " on HOST ")
    return shortened(said)


def shortened(text: str) -> str:
    """The text with long names of Orbax's data files shortened."""
    return re.sub(r"\b([0-9a-f]{6})[0-9a-f]{26}\b", r"\1...", text)
