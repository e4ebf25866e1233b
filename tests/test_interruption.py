"""Ctrl-C in a program: one line and status 130, also inside compiled code and while libraries clean up."""

import signal
import subprocess
import sys
import time

import pytest

LINE = "interrupted; nothing was written"
PROGRAM = f"""
import hashlib, sys, time
from taskexpert_jax import command_line
def program():
    %s
sys.exit(command_line.ended(program, {LINE!r}))
"""
CLEANING = """try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("Traceback of a library", file=sys.stderr)
        %s
        print("cleaned", flush=True)
"""
ANOTHER_ERROR = """try:
        print("ready", flush=True)
        time.sleep(60)
    except BaseException as error:
        raise RuntimeError("cancelled") from error
"""
# Half a minute in compiled code that, like XLA's compiler, does not return to Python.
COMPILED = "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 40_000_000)"


@pytest.mark.parametrize(
    ("body", "times", "left"),
    [
        (CLEANING % "time.sleep(0.2)", 1, "cleaned\n"),
        (CLEANING % "time.sleep(60)", 2, ""),
        (ANOTHER_ERROR, 1, ""),
        (COMPILED, 1, ""),
        (COMPILED, 2, ""),
    ],
    ids=["clean-up", "twice", "another error", "compiled code", "compiled code, twice"],
)
def test_ctrl_c_is_one_line_and_status_130(body, times, left):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM % body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    lines = []
    started = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        lines = lines or [process.stderr.readline()]  # printed before the second one is sent
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 15
    assert (process.returncode, out, lines[0] + err) == (130, left, LINE + "\n")
