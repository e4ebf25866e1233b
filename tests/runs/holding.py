"""A program that holds a workdir, on a disk or in a bucket, until it reads a line."""

from collections.abc import Iterator
import contextlib
import subprocess
import sys

_PROGRAM = """
import sys
from taskexpert_jax import storage
from taskexpert_jax.runs import workdir
with workdir.lock(storage.path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@contextlib.contextmanager
def holder(workdir: object) -> Iterator[subprocess.Popen[str]]:
    """Yields the process once it holds the workdir; it does not outlive the body."""
    command = [sys.executable, "-c", _PROGRAM, str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()
