"""Commands that a script prints or runs."""

import os
import pathlib
import shlex
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "scripts"
TASKS = "--config.tasks=('semseg','depth')"


def call(script: pathlib.Path | str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a script with the environment `env` alone; PATH is that of the tests if it is not in `env`."""
    return subprocess.run(
        [SCRIPTS / script, *arguments],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **env},
        check=False,
        timeout=60,
    )


def dry(script: pathlib.Path | str, *arguments: str, **env: str) -> list[list[str]]:
    """The commands that a script prints, each split as a shell would."""
    done = call(script, *arguments, **env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


def refusal(script: pathlib.Path | str, *arguments: str, **env: str) -> str:
    """The one line with which a script refuses to start."""
    done = call(script, *arguments, **env)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line
