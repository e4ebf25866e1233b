"""The program: from its command line to its end."""

import http.client
import json
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from taskexpert_jax import serve
from tests import xla

pytest.importorskip("uvicorn")
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def command_of_the_space():
    """Arguments of the Dockerfile's command."""
    (line,) = re.findall(r"^CMD (.*)$", (ROOT / "scripts" / "space" / "Dockerfile").read_text(), re.MULTILINE)
    name, command, *arguments = json.loads(line)
    assert (name, command) == ("taskexpert", "serve")
    return arguments


def test_the_command_of_the_space_serves_until_ctrl_c(run, tmp_path):
    (tmp_path / "model").symlink_to(run.path)
    arguments = command_of_the_space()
    arguments[arguments.index("--port=7860")] = "--port=0"
    process = subprocess.Popen(
        [sys.executable, "-m", "taskexpert_jax.serve", *arguments],
        cwd=tmp_path,
        env=xla.environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        port = int(re.fullmatch(r"serving at http://\S+:(\d+) \(Ctrl-C ends it\)\n", said)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/run", headers={"Host": "someone-rooms.hf.space"})
        about = json.loads(connection.getresponse().read())
        connection.close()
        assert about["checkpoint"] == "step 0 (latest)" and len(about["tasks"]) == 6
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert errors.endswith("stopped\n") and "Traceback" not in errors
    assert "warning: whoever reaches this machine can use the page: it has no password\n" in errors


def test_a_missing_run_is_one_line(tmp_path, capsys):
    assert serve.main([str(tmp_path / "none"), "--port=0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(tmp_path / "none") in line


def test_the_settings_of_the_space_agree_with_its_command():
    settings = (ROOT / "scripts" / "space" / "README.md").read_text().split("---")[1]
    assert "sdk: docker" in settings
    assert f"--port={re.search(r'app_port: (.*)', settings)[1]}" in command_of_the_space()
