"""Faults of a run in a bucket: two writers, leases of runs that ended or froze, a store that is down or refuses.

The programs reach the store through a proxy (`proxy.py`) that fails requests; this process reaches it directly.
"""

import json
import pathlib
import re
import signal
import time

from benchmarks.fault_injection.injected import Fault, resume
from benchmarks.fault_injection.program import EVERY, Launch, Program, newest, remarks
from benchmarks.fault_injection.proxy import Proxy
from taskexpert_jax.runs import lease

_DOWN_SECONDS = 20.0
_THROTTLED_SECONDS = 10.0
CHECKPOINT = r"/checkpoints/\d+/"  # names of objects, as a pattern
METRICS = r"/metrics[^/]*\.jsonl"


def two_at_once(workdir: pathlib.Path, launch: Launch) -> Fault:
    """Starts two runs in the workdir at the same moment: one must be refused and the other must train."""
    both = [Program(workdir, launch), Program(workdir, launch)]
    while all(program.running for program in both):
        if all(program.last for program in both):
            break
        time.sleep(0.1)
    winners = [program for program in both if program.running]
    fault = Fault("two starts at once", 0, 0, newest(workdir))
    if len(winners) == 1:
        (winner,) = winners
        (loser,) = [program for program in both if program is not winner]
        trained = winner.wait_for(r"^step \d+/", 2)
        fault.step, fault.status, fault.said = winner.last, loser.status(), remarks(loser)
        fault.resumed = winner.resumed
        fault.ok = trained and fault.status == 2 and not loser.last and fault.resumed == fault.newest
    for program in both:
        program.send(signal.SIGKILL)
        program.status()
    return _printed(fault)


def lease_of_another_host(workdir: pathlib.Path, launch: Launch) -> Fault:
    """Kills a run whose lease names another host, where nobody can look for its process: it must expire."""
    program = Program(workdir, launch)
    program.wait_for_checkpoint(newest(workdir) + EVERY)
    program.send(signal.SIGKILL)
    fault = Fault("lease of a killed run on another host", program.last, program.status(), newest(workdir))
    held = json.loads((workdir / lease.NAME).read_text())
    (workdir / lease.NAME).write_text(json.dumps({**held, "host": "elsewhere", "machine": "another"}))
    began = time.monotonic()
    following = resume(fault, workdir, launch)
    waited = time.monotonic() - began
    fault.said = following.last_match("taken over")
    fault.ok = fault.resumed == fault.newest > 0 and waited > lease.EXPIRE_SECONDS / 2 and bool(fault.said)
    fault.said = f"{remarks(following)}; {fault.said}".replace(str(workdir), "WORKDIR").strip("; ")
    return _printed(fault)


def frozen(workdir: pathlib.Path, launch: Launch) -> Fault:
    """Freezes a run until its lease has expired and another has taken it over: when it wakes, it must write nothing."""
    first = Program(workdir, launch)
    first.wait_for(r"^step \d+/", 2)
    first.send(signal.SIGSTOP)
    fault = Fault("a run that froze and was replaced", first.last, 0, newest(workdir))
    time.sleep(lease.EXPIRE_SECONDS + 5)
    second = Program(workdir, launch)
    second.wait_for(r"^step \d+/")
    first.send(signal.SIGCONT)
    fault.status, fault.said, fault.resumed = first.status(), remarks(first), second.resumed
    alive = second.wait_for(r"^step \d+/", EVERY)
    second.send(signal.SIGTERM)
    fault.ok = fault.status == 2 and alive and second.status() == 0 and fault.resumed == fault.newest
    return _printed(fault)


def down(workdir: pathlib.Path, launch: Launch, proxy: Proxy, at: str, what: str) -> Fault:
    """Makes the store unreachable in the middle of a write: the run must wait for it and lose nothing.

    Args:
      workdir: the run's directory.
      launch: how it is started.
      proxy: before the store.
      at: pattern of the object's name.
      what: name of this write for the report.
    """
    program = Program(workdir, launch)
    program.wait_for(r"^step \d+/", 2)
    proxy.be_down(_DOWN_SECONDS, at=at)
    program.wait_until(lambda: proxy.is_down)
    step = program.last
    return _survived(f"store down for {_DOWN_SECONDS:.0f} s during {what}", program, step, launch)


def throttled(workdir: pathlib.Path, launch: Launch, proxy: Proxy) -> Fault:
    """Answers 429 to all requests for a time: the run must wait and lose nothing."""
    program = Program(workdir, launch)
    program.wait_for(r"^step \d+/", 2)
    before = proxy.counts[429]
    proxy.refuse(429)
    program.wait_until(lambda: proxy.counts[429] > before)
    step = program.last
    time.sleep(_THROTTLED_SECONDS)
    proxy.refuse(0)
    return _survived(f"HTTP 429 to all requests for {_THROTTLED_SECONDS:.0f} s", program, step, launch)


def _survived(what: str, program: Program, step: int, launch: Launch) -> Fault:
    """Checks that a run trains and saves on after a fault at this step, and that the next start has all of it."""
    workdir = program.workdir
    alive = program.wait_for(rf"^step {step + 2 * EVERY}/")
    if alive:
        program.send(signal.SIGTERM)
    fault = Fault(what, step, program.status(), newest(workdir), said=remarks(program))
    last = program.last
    resume(fault, workdir, launch)
    fault.ok = alive and fault.status == 0 and fault.resumed == fault.newest == last
    return _printed(fault)


def forbidden(workdir: pathlib.Path, launch: Launch, proxy: Proxy, *, at_start: bool) -> Fault:
    """Answers 403 to all requests: the run must end in one line with status 2, and the next one resume."""
    if at_start:
        proxy.refuse(403)
    program = Program(workdir, launch)
    if not at_start:
        program.wait_for(r"^step \d+/", 2)
        proxy.refuse(403)
    status = program.status()
    proxy.refuse(0)
    what = f"HTTP 403 to all requests {'at the start' if at_start else 'during the run'}"
    fault = Fault(what, program.last, status, newest(workdir), said=remarks(program))
    one_line = not any(re.match(r"Traceback|[\w.]+Error:", line) for line in program.lines)
    resume(fault, workdir, launch)
    fault.ok = status == 2 and one_line and bool(fault.said) and fault.resumed == fault.newest > 0
    return _printed(fault)


def _printed(fault: Fault) -> Fault:
    print(f"{fault.what}: {'ok' if fault.ok else 'WRONG'}, status {fault.status}; {fault.said}", flush=True)
    return fault
