"""Commands that a script prints or runs."""

from collections.abc import Sequence
import json
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

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


def refused_by_gcloud(commands: Sequence[str], folder: pathlib.Path) -> list[str]:
    """gcloud's complaints about its commands, which it parses and does not run; skips the test without gcloud."""
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed")
    (folder / "commands.json").write_text(json.dumps([{"command_string": command.strip()} for command in commands]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={folder / 'commands.json'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "CLOUDSDK_CONFIG": str(folder / "settings")},
        check=False,
    )
    if done.returncode and "lint-gcloud-commands" in done.stderr:
        pytest.skip("this gcloud has no `meta lint-gcloud-commands`")
    return [each["error_message"] for each in json.loads(done.stdout) if not each["success"]]
