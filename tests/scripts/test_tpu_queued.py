"""scripts/tpu_queued.sh: its commands, what it does when the TPU is preempted, and its part on the workers."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from tests.scripts.commands import SCRIPTS, TASKS, call, dry, refusal, refused_by_gcloud

SCRIPT = "tpu_queued.sh"
TPU = {"TPU": "my-tpu", "ZONE": "zone-a", "ACCELERATOR": "v5litepod-16"}
RUN = ("run", "gs://bucket/runs/a run", "--config=nyud:vit_l16", TASKS)
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
EVERYWHERE = ["--node=all", "--worker=all", "--batch-size=all", "--zone=zone-a"]


def on_workers(command: str) -> list[str]:
    """The command that runs a line on all workers at once."""
    return [*QUEUED, "ssh", "my-tpu", f"--command={command}", *EVERYWHERE]


@pytest.mark.parametrize("how", [(("--dry-run",), {}), ((), {"DRY_RUN": "1"})], ids=["flag", "variable"])
def test_a_run_requests_the_tpu_installs_and_trains_on_all_workers(how):
    first, env = how
    *build, create, look, copy, install, train, nothing, delete = dry(SCRIPT, *first, *RUN, **TPU, **env)
    folder = ".cache/tpu/taskexpert"
    assert build == [
        ["rm", "-rf", ".cache/tpu"],
        ["mkdir", "-p", folder],
        [".venv/bin/python", "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", "."],
        ["cp", "requirements.lock", "scripts/tpu_worker.sh", folder],
    ]
    image = "--runtime-version=v2-alpha-tpuv5-lite"
    zone = "--zone=zone-a"
    assert create == [*QUEUED, "create", "my-tpu", "--accelerator-type=v5litepod-16", image, "--node-id=my-tpu", zone]
    assert look == [*QUEUED, "describe", "my-tpu", "--format=value(state.state)", zone]
    assert copy == [*QUEUED, "scp", folder, "my-tpu:", "--recurse", *EVERYWHERE]
    assert install == on_workers("bash taskexpert/tpu_worker.sh install")
    assert shlex.split(train.pop(6).removeprefix("--command=")) == ["bash", "taskexpert/tpu_worker.sh", *RUN]
    assert train == [*QUEUED, "ssh", "my-tpu", *EVERYWHERE]
    assert (nothing, delete) == ([], [*QUEUED, "delete", "my-tpu", "--force", "--quiet", zone])


def test_the_request_has_what_the_variables_ask_for():
    wanted = {"SPOT": "1", "SLICES": "2", "VALID_UNTIL": "6h", "SERVICE_ACCOUNT": "a@b", "CREATE_FLAGS": "--x=1 --y"}
    create, _ = dry(SCRIPT, "--dry-run", "create", **TPU, **wanted)
    assert create[len(QUEUED) + 4 :] == [
        *("--node-count=2", "--node-prefix=my-tpu", "--spot", "--valid-until-duration=6h", "--service-account=a@b"),
        *("--x=1", "--y", "--zone=zone-a"),
    ]


@pytest.mark.parametrize(
    ("accelerator", "image"),
    [("v6e-8", "v2-alpha-tpuv6e"), ("v5p-128", "v2-alpha-tpuv5"), ("v4-8", "tpu-ubuntu2204-base")],
)
def test_the_image_is_that_of_the_accelerator(accelerator, image):
    create, _ = dry(SCRIPT, "--dry-run", "create", **{**TPU, "ACCELERATOR": accelerator})
    assert f"--runtime-version={image}" in create
    create, _ = dry(SCRIPT, "--dry-run", "create", **{**TPU, "ACCELERATOR": accelerator}, RUNTIME="mine")
    assert "--runtime-version=mine" in create


def test_other_commands():
    assert dry(SCRIPT, "--dry-run", "status", **TPU) == [[*QUEUED, "describe", "my-tpu", "--zone=zone-a"]]
    assert dry(SCRIPT, "--dry-run", "stop", **TPU) == [on_workers("bash taskexpert/tpu_worker.sh stop")]
    assert dry(SCRIPT, "--dry-run", "delete", **TPU)[0][4] == "delete"
    assert [command[0] for command in dry(SCRIPT, "--dry-run", "install", **TPU)[-2:]] == ["gcloud", "gcloud"]


@pytest.mark.parametrize(
    ("arguments", "env", "line"),
    [
        ((), TPU, "which command? scripts/tpu_queued.sh [--dry-run] create|install|run|status|stop|delete"),
        (("begin",), TPU, "which command? "),
        (("status",), {"ZONE": "z"}, "give the TPU's name and zone: "),
        (("create",), {"TPU": "t", "ZONE": "z"}, "give the accelerator: ACCELERATOR=v5litepod-16"),
        (("create",), {**TPU, "ACCELERATOR": "v9-8"}, "no image is known for ACCELERATOR=v9-8: give RUNTIME=IMAGE"),
        (("create",), {**TPU, "SPOT": "no"}, "SPOT=no must be 0 or 1"),
        (("create",), {**TPU, "SLICES": "two"}, "SLICES=two must be a whole number from 1"),
        (("run", "runs/nyud", "--config=nyud"), TPU, "the run must be in a bucket, because the workers share no disk"),
        (("run",), TPU, "the run must be in a bucket"),
        (("run", "gs://"), TPU, "the run must be in a bucket"),
        (("delete", "other-tpu"), TPU, "delete takes no argument (the TPU is that of TPU=NAME): other-tpu"),
    ],
)
def test_what_is_missing_is_named_in_one_line(arguments, env, line):
    assert refusal(SCRIPT, *arguments, **env, DRY_RUN="1").startswith(f"error: {line}")


def test_without_gcloud_nothing_is_tried(tmp_path):
    for program in ("env", "bash", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    line = "error: gcloud is missing: install the Google Cloud CLI"
    assert refusal(SCRIPT, "status", **TPU, PATH=str(tmp_path)) == line


# --- with a gcloud whose TPU is preempted ---

GCLOUD = """#!/bin/bash
# Answers `describe` with the next line of states, and a training command with the next status.
next() { head -n 1 "$1"; sed -i 1d "$1"; }
cd "$(dirname "$0")"
echo "$4 ${6#--command=bash taskexpert/tpu_worker.sh }" >>asked
case $4 in
    describe)
        state=$(next states)
        [[ $state != MISSING ]] || { echo "ERROR: (gcloud) NOT_FOUND: no such resource" >&2; exit 1; }
        [[ $state != broken ]] || { echo "ERROR: (gcloud) PERMISSION_DENIED"; echo more; exit 1; }
        echo "$state" ;;
    ssh)
        [[ $6 != *" run "* ]] || exit "$(next statuses)"
        [[ $6 != *" stopped" ]] || [[ -e stopped ]] ;;
esac
"""


def supervised(
    folder: pathlib.Path, states: str, statuses: str, *, stopped: bool = False
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Runs `run` with a TPU that goes through the states, and a program that ends with the statuses; what was asked.

    stopped: the program was ended by `stop`.
    """
    (folder / "scripts").mkdir()
    shutil.copy(SCRIPTS / SCRIPT, folder / "scripts")
    shutil.copy(SCRIPTS / "tpu_worker.sh", folder / "scripts")
    (folder / "requirements.lock").touch()
    stub = folder / "bin" / "gcloud"
    stub.parent.mkdir()
    stub.write_text(GCLOUD)
    stub.chmod(0o755)
    for name, values in (("states", states), ("statuses", statuses)):
        (stub.parent / name).write_text("\n".join(values.split()) + "\n")
    if stopped:
        (stub.parent / "stopped").touch()
    env = {**TPU, "PATH": f"{stub.parent}:{os.environ['PATH']}", "PYTHON": "true", "POLL_SECONDS": "0"}
    done = call(folder / "scripts" / SCRIPT, "run", "gs://b/r", "--config=nyud", **env)
    asked = [line.split(" --")[0].strip() for line in (stub.parent / "asked").read_text().splitlines()]
    assert (stub.parent / "states").read_text().strip() == ""
    return done, asked


TRY = ["scp my-tpu:", "ssh install", "ssh run gs://b/r"]


def test_a_preempted_run_is_started_again_on_a_new_tpu_until_it_is_finished(tmp_path):
    states = "MISSING WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDING SUSPENDED MISSING ACTIVE"
    done, asked = supervised(tmp_path, states, "143 0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("finished: gs://b/r; my-tpu is still there, and is paid for")
    look = "describe"
    assert asked == [
        *(look, "create", look, look, *TRY),
        *(look, look, look, "delete", look, "create", look, *TRY),
    ]


def test_a_run_that_was_stopped_by_hand_is_not_started_again(tmp_path):
    done, asked = supervised(tmp_path, "ACTIVE " * 7, "143", stopped=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143, "error: stopped; the same command resumes")
    assert asked[1:4] == TRY and asked[-1] == "ssh stopped"


def test_a_run_that_had_sigterm_from_its_machine_is_started_again(tmp_path):
    """The state of the request may be behind."""
    done, asked = supervised(tmp_path, "ACTIVE " * 8, "143 0")
    assert done.returncode == 0 and sum(each.startswith("ssh run") for each in asked) == 2


@pytest.mark.parametrize(
    ("states", "statuses", "status", "tries", "line"),
    [
        ("ACTIVE " * 7, "2", 2, 1, "the program refused to run, see above; my-tpu is still there"),
        ("ACTIVE " * 21, "1 255 1", 1, 3, "failed 3 times in a row, last with status 1; my-tpu is still there"),
        ("ACTIVE MISSING", "255", 1, 1, "my-tpu was deleted; the same command requests it again and resumes"),
        ("FAILED", "0", 1, 0, "the request my-tpu failed; the command status says why, delete removes it"),
        (
            "broken " * 5,
            "0",
            1,
            0,
            "the state of my-tpu in zone-a is unknown: ERROR: (gcloud) PERMISSION_DENIED more",
        ),
    ],
)
def test_what_a_new_try_does_not_help_ends_it_in_one_line(states, statuses, status, tries, line, tmp_path):
    done, asked = supervised(tmp_path, states, statuses)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, f"error: {line}")
    assert sum(each.startswith("ssh run") for each in asked) == tries and "delete my-tpu" not in asked


# --- on a worker ---

PROGRAM = """#!/bin/bash
trap 'echo saved >>said; exit 143' TERM
echo "$@" >>said
[[ $* != *quick* ]] || exit 0
for ((i = 0; i < 600; i++)); do sleep 0.05; done
"""


@pytest.fixture
def worker(tmp_path):
    """The script on a worker, beside a program that notes its arguments and that it was stopped."""
    folder = tmp_path / "taskexpert"
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(SCRIPTS / "tpu_worker.sh", folder)
    for name, text in (("taskexpert", PROGRAM), ("pip", '#!/bin/bash\necho "$@" >>said\n')):
        (folder / ".venv" / "bin" / name).write_text(text)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    return folder / "tpu_worker.sh"


def until(found, seconds: float = 20) -> None:
    """Waits until `found()` is true."""
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_installs_the_wheel_with_its_extras(worker):
    (worker.parent / "taskexpert_jax-1-py3-none-any.whl").touch()
    assert call(worker, "install").returncode == 0
    wheel = "./taskexpert_jax-1-py3-none-any.whl"
    assert (worker.parent / "said").read_text().splitlines() == [
        f"install --quiet --constraint=requirements.lock {wheel}[tpu,gcs]",
        f"install --quiet --no-deps --force-reinstall {wheel}",
    ]
    assert not list(worker.parent.glob("*.whl"))


def test_a_worker_has_one_run_and_stops_it(worker):
    said = worker.parent / "said"
    assert call(worker, "stopped").returncode == 1
    assert call(worker, "stop").returncode == 0  # nothing runs
    with subprocess.Popen([worker, "run", "gs://b/r", TASKS], stderr=subprocess.PIPE) as running:
        try:
            until(said.exists)
            assert call(worker, "stopped").returncode == 1
            second = call(worker, "run", "gs://b/r")
            assert second.returncode == 1 and f"process {running.pid} is training already" in second.stderr
            stopped = call(worker, "stop")
            assert stopped.returncode == 0 and f"stopping process {running.pid}" in stopped.stderr
            assert running.wait(timeout=10) == 143
            assert call(worker, "stopped").returncode == 0
        finally:
            running.kill()
    assert said.read_text().splitlines() == [f"train gs://b/r {TASKS} --preempted_status=143", "saved"]
    assert call(worker, "run", "quick").returncode == 0  # the number of the ended process is no obstacle


def test_a_run_that_does_not_end_is_killed(worker):
    program = worker.parent / ".venv" / "bin" / "taskexpert"
    program.write_text(PROGRAM.replace("exit 143", "true"))
    with subprocess.Popen([worker, "run", "gs://b/r"]) as running:
        try:
            until((worker.parent / "said").exists)
            assert call(worker, "stop", STOP_SECONDS="1").returncode == 0
            assert running.wait(timeout=10) == -signal.SIGKILL
        finally:
            running.kill()


def test_gcloud_knows_the_commands(tmp_path):
    """Each command, parsed by the command line of Google Cloud itself."""
    wanted = {"SPOT": "1", "SLICES": "2", "VALID_UNTIL": "6h", "SERVICE_ACCOUNT": "a@b"}
    lines = [line for env in ({}, wanted) for line in call(SCRIPT, "--dry-run", *RUN, **TPU, **env).stdout.splitlines()]
    lines += call("tpu_pod.sh", "--dry-run", TASKS, **TPU).stdout.splitlines()
    commands = [line.strip() for line in lines if line.startswith("gcloud ")]
    assert len(commands) == 13
    assert refused_by_gcloud(commands, tmp_path) == []
