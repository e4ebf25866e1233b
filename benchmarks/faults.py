"""Fault injection: kills and damages a training run, and compares its end with an undisturbed run.

  python benchmarks/faults.py --output=benchmarks/results/faults.json

The demo is trained with a checkpoint every few steps. At random moments it gets SIGKILL (20 times) or SIGTERM (5 times)
and is restarted with the same command; then checkpoints are damaged, the disk is filled (a small tmpfs, if this user
may mount one) and a second run is started in the same workdir. A table reports each fault and the program's messages.
Parameters, moments, statistics and random key of the last step must equal those of the undisturbed run bit for bit.
The exit status is 1 if they differ, or if a start did not resume from the expected step. Takes about 20 minutes.
"""

import argparse
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from taskexpert_jax.runs import sealing

ROOT = pathlib.Path(__file__).resolve().parent.parent
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


@dataclasses.dataclass
class Fault:
    """One fault, the state that it left, and how the next start resumed."""

    what: str
    step: int  # last step reported before
    status: int
    newest: int  # newest checkpoint left
    resumed: int = -1  # step from which the next start resumed
    said: str = ""  # messages of that start about checkpoints
    ok: bool = False


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


def killing(rng: random.Random, workdir: pathlib.Path, flags: list[str], signals: list[signal.Signals]) -> list[Fault]:
    """One start for each signal, ended by it at a random moment: while it starts, steps, saves or evaluates."""
    faults: list[Fault] = []
    for number in signals:
        program = Program(workdir, flags)
        if number is signal.SIGKILL and rng.random() < 0.2:
            time.sleep(rng.uniform(0.5, 12.0))  # during start-up
        else:
            program.wait_for(r"^step \d+/", rng.randint(1, 2 * EVERY))
            time.sleep(rng.uniform(0.0, 0.6))
        step = program.last
        program.send(number)
        fault = Fault(number.name, 0, program.status(), newest(workdir))
        finish(faults, program)
        fault.step = max(step, program.last)
        faults.append(fault)
        print(f"{len(faults)}: {fault.what} after step {fault.step}, status {fault.status}", flush=True)
    program = Program(workdir, flags)  # resumes after the last fault
    program.wait_for(r"^step \d+/")
    program.send(signal.SIGKILL)
    program.status()
    finish(faults, program)
    return faults


def finish(faults: list[Fault], program: Program) -> None:
    """Records how a start resumed after the fault before it, if it lived long enough to report that."""
    if program.resumed < 0 or not faults or faults[-1].resumed >= 0:
        return
    for fault in reversed(faults):
        if fault.resumed >= 0:
            break
        fault.resumed, fault.said = program.resumed, remarks(program)
    for fault in faults:
        stopped = fault.what != "SIGTERM" or (fault.status == 0 and fault.resumed >= fault.step)
        fault.ok = fault.resumed >= fault.newest and stopped


def damage(workdir: pathlib.Path, how: str) -> str:
    """Damages the largest file of the newest checkpoint; returns how and which."""
    folder = workdir / "checkpoints" / str(newest(workdir))
    victim = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if how == "deleted":
        victim.unlink()
    elif how == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    return shortened(f"{how} {victim.relative_to(folder.parent)}")


def damaging(workdir: pathlib.Path, flags: list[str]) -> list[Fault]:
    """Damages the newest checkpoint in three ways; each start must report it and resume from the one before."""
    faults = []
    for how in ("deleted", "truncated", "altered"):
        before = newest(workdir)
        program = Program(workdir, flags)
        program.wait_for_checkpoint(before + 2 * EVERY)  # so that there is one to fall back to
        program.send(signal.SIGKILL)
        fault = Fault("", program.last, program.status(), newest(workdir))
        fault.what = damage(workdir, how)
        program = Program(workdir, flags)
        program.wait_for(r"^step \d+/")
        program.send(signal.SIGKILL)
        program.status()
        fault.resumed, fault.said = program.resumed, remarks(program)
        fault.ok = 0 < fault.resumed < fault.newest and bool(fault.said) and fault.newest >= before
        faults.append(fault)
        print(f"{fault.what}: {fault.said}", flush=True)
    return faults


def second_run(workdir: pathlib.Path, flags: list[str]) -> Fault:
    """Starts a second run in the workdir of a running one: it must be refused and the first must continue."""
    first = Program(workdir, flags)
    first.wait_for(r"^step \d+/")
    second = Program(workdir, flags)
    status = second.status()
    step = first.last
    alive = first.wait_for(rf"^step {step + 2}/")
    first.send(signal.SIGTERM)
    fault = Fault("a second run", step, status, newest(workdir), resumed=first.resumed, said=remarks(second))
    fault.ok = status == 2 and alive and first.status() == 0
    print(f"{fault.what}: {fault.said}", flush=True)
    return fault


@contextlib.contextmanager
def small_disk(mebibytes: int) -> Iterator[pathlib.Path | None]:
    """A small tmpfs; None if this user may not mount one."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_disk_"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def full_disk(workdir: pathlib.Path, flags: list[str]) -> Fault | None:
    """Resumes a copy of the run on a disk with room for half a checkpoint, until it is full."""
    size = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file()) / 2**20
    each = size / max(len(list((workdir / "checkpoints").glob("[0-9]*"))), 1)
    with small_disk(round(size + 1.5 * each)) as disk:
        if disk is None:
            print("a full disk: not tried, because this user may not mount a tmpfs", flush=True)
            return None
        copy = disk / "run"
        shutil.copytree(workdir, copy)
        filler = disk / "filler"
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(max(free - round(each * 2**19), 0)))
        program = Program(copy, flags)
        fault = Fault("a full disk", 0, program.status(), newest(copy), said=remarks(program))
        fault.step = program.last
        filler.unlink()
        again = Program(copy, flags)
        again.wait_for(r"^step \d+/")
        again.send(signal.SIGKILL)
        again.status()
        fault.resumed = again.resumed
        fault.ok = fault.status not in (0, 1) and fault.resumed == fault.newest > 0
    print(f"{fault.what}: {fault.said}", flush=True)
    return fault


def digests(workdir: pathlib.Path, flags: list[str], step: int) -> dict[str, str]:
    """Digest of the bytes of every array of a checkpoint, by name."""
    command = [sys.executable, __file__, "--digests", json.dumps([str(workdir), step, flags])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: step {step} of {workdir} cannot be read: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_digests(workdir: pathlib.Path, step: int, flags: list[str]) -> None:
    """Prints the result of `digests` as JSON; runs in its own process, so the caller needs no device."""
    from absl import flags as absl_flags
    import jax
    import numpy as np

    import main as program  # defines --config
    from taskexpert_jax.models import model as taskexpert
    from taskexpert_jax.parallel import sharding
    from taskexpert_jax.runs.checkpoints import Checkpoints
    from taskexpert_jax.tasks import best_task, from_config
    from taskexpert_jax.training import optimizer
    from taskexpert_jax.training import state as train_state

    sys.argv = [program.__name__, *flags]  # ml_collections reads changed fields from here
    absl_flags.FLAGS(sys.argv)
    config: Any = absl_flags.FLAGS["config"].value
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    mesh = sharding.make_mesh(config.mesh, {})
    with sharding.use(mesh):
        _, abstract, _ = train_state.abstract_and_shardings(model, optimizer.build(config), mesh, config.seed)
        checkpoints = Checkpoints(workdir, best_task(tasks, config.checkpoint.best_task), read_only=True)
        with contextlib.closing(checkpoints):
            state = train_state.TrainState.from_items(checkpoints.restore(step, abstract.to_items()))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    found = {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves
    }
    print(json.dumps(found))


def table(faults: list[Fault]) -> str:
    """The faults as a Markdown table."""
    lines = [
        "| | fault | after step | exit status | newest checkpoint | resumed from | messages | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i, fault in enumerate(faults, 1):
        cells = (fault.what, fault.step, fault.status, fault.newest, fault.resumed, fault.said)
        cells = (*cells, "ok" if fault.ok else "WRONG")
        lines.append(f"| {i} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Runs all faults and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--kills", type=int, default=20, help="number of SIGKILLs")
    parser.add_argument("--terms", type=int, default=5, help="number of SIGTERMs")
    parser.add_argument("--steps", type=int, default=160, help="steps of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    parser.add_argument("--digests", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.digests:
        workdir, step, flags = arguments.digests
        print_digests(pathlib.Path(workdir), step, flags)
        return
    flags = [
        f"--config={arguments.config}",
        f"--config.num_steps={arguments.steps}",
        f"--config.checkpoint.every_steps={EVERY}",
        f"--config.eval.every_steps={5 * EVERY}",
        "--config.eval.max_examples=20",
        "--config.log.every_steps=1",
        "--config.log.images=0",
        "--config.model.drop_path=0.2",
    ]
    rng = random.Random(arguments.seed)
    signals = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.terms
    rng.shuffle(signals)
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        workdir, undisturbed = pathlib.Path(folder) / "disturbed", pathlib.Path(folder) / "undisturbed"
        whole = Program(undisturbed, flags)
        if whole.status():
            sys.exit("error: the undisturbed run failed: " + "\n".join(whole.lines[-5:]))
        faults = killing(rng, workdir, flags, signals)
        others = damaging(workdir, flags)
        others.append(second_run(workdir, flags))
        if fault := full_disk(workdir, flags):
            others.append(fault)
        end = Program(workdir, flags)
        if status := end.status():
            print("the last start ended with:", *end.lines[-3:], sep="\n")
        faults += others
        ours, theirs = (digests(path, flags, arguments.steps) for path in (workdir, undisturbed))
    equal = sum(ours.get(name) == digest for name, digest in theirs.items())
    same = status == 0 and ours.keys() == theirs.keys() and equal == len(theirs)
    print(table(faults))
    print(f"\n{equal} of {len(theirs)} arrays of step {arguments.steps} equal those of the undisturbed run bit for bit")
    if arguments.output:
        found = {"arrays": len(theirs), "equal": equal, "faults": [dataclasses.asdict(fault) for fault in faults]}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(0 if same and all(fault.ok for fault in faults) else 1)


if __name__ == "__main__":
    main()
