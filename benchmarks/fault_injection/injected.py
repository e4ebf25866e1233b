"""Faults of any run: signals at random moments, damaged checkpoints, a second run in the same workdir."""

import dataclasses
import pathlib
import random
import signal
import time

from benchmarks.fault_injection.program import EVERY, Launch, Program, newest, remarks, shortened


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


def killing(rng: random.Random, workdir: pathlib.Path, launch: Launch, signals: list[signal.Signals]) -> list[Fault]:
    """One start for each signal, ended by it at a random moment: while it starts, steps, saves or evaluates."""
    faults: list[Fault] = []
    for number in signals:
        program = Program(workdir, launch)
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
    program = Program(workdir, launch)  # resumes after the last fault
    program.wait_for(r"^step \d+/")
    program.send(signal.SIGKILL)
    program.status()
    finish(faults, program)
    return faults


def resume(fault: Fault, workdir: pathlib.Path, launch: Launch) -> Program:
    """Records how a start after the fault resumes, kills that start at its first step and returns it."""
    program = Program(workdir, launch)
    program.wait_for(r"^step \d+/")
    program.send(signal.SIGKILL)
    program.status()
    fault.resumed = program.resumed
    fault.said = fault.said or remarks(program)
    return program


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
    content = bytearray(victim.read_bytes())
    if how == "deleted":
        victim.unlink()
    elif how == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    return shortened(f"{how} {victim.relative_to(folder.parent)}")


def damaging(workdir: pathlib.Path, launch: Launch) -> list[Fault]:
    """Damages the newest checkpoint in three ways; each start must report it and resume from the one before."""
    faults = []
    for how in ("deleted", "truncated", "altered"):
        before = newest(workdir)
        program = Program(workdir, launch)
        program.wait_for_checkpoint(before + 2 * EVERY)  # so that there is one to fall back to
        program.send(signal.SIGKILL)
        fault = Fault("", program.last, program.status(), newest(workdir))
        fault.what = damage(workdir, how)
        resume(fault, workdir, launch)
        fault.ok = 0 < fault.resumed < fault.newest and bool(fault.said) and fault.newest >= before
        faults.append(fault)
        print(f"{fault.what}: {fault.said}", flush=True)
    return faults


def second_run(workdir: pathlib.Path, launch: Launch) -> Fault:
    """Starts a second run in the workdir of a running one: it must be refused and the first must continue."""
    first = Program(workdir, launch)
    first.wait_for(r"^step \d+/")
    second = Program(workdir, launch)
    status = second.status()
    step = first.last
    alive = first.wait_for(rf"^step {step + 2}/")
    first.send(signal.SIGTERM)
    fault = Fault("a second run", step, status, newest(workdir), resumed=first.resumed, said=remarks(second))
    fault.ok = status == 2 and alive and first.status() == 0
    print(f"{fault.what}: {fault.said}", flush=True)
    return fault


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
