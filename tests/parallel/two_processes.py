"""Two real processes on this machine, with four simulated devices each."""

import contextlib
import pathlib
import socket
import subprocess
import sys

from tests import xla

ROOT = pathlib.Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def two_processes(folder, *command):
    """Starts `python *command` as both processes of a group; whatever happens, neither outlives the body."""
    folder.mkdir(parents=True, exist_ok=True)
    env = xla.environment(4, PYTHONPATH=str(ROOT))
    group = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(2):
            out, err = (stack.enter_context((folder / f"{index}.{end}").open("w")) for end in ("out", "err"))
            own = [part.replace("INDEX", str(index)) for part in command]
            arguments = [sys.executable, *own, *group, f"--process_id={index}"]
            started.append(subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=out, stderr=err))
        try:
            yield started
        finally:
            for process in started:
                process.kill()
                process.wait()


def statuses(folder, *command):
    """Exit statuses of both processes; what they said lies in the folder."""
    with two_processes(folder, *command) as started:
        return [process.wait(timeout=280) for process in started]


def said(folder, end="err"):
    """Output of each process."""
    return [(folder / f"{index}.{end}").read_text().rstrip("\n") for index in range(2)]
