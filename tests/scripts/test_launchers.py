"""The launchers print what they would run; the commands reach the program as the user wrote them."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.scripts.commands import ROOT, SCRIPTS, TASKS, call, dry, refusal

FLAGS = ["--config=configs/nyud.py:vit_b16", "--workdir=a folder/run", TASKS]
PROGRAM = [".venv/bin/python", "main.py", *FLAGS]


def test_all_scripts_have_a_test():
    assert {path.name for path in SCRIPTS.iterdir()} == {
        *("tpu_pod.sh", "tpu_queued.sh", "tpu_worker.sh", "gke.sh", "gke_jobset.yaml", "slurm.sbatch", "multi_gpu.sh"),
        *("space.sh", "space"),
    }


@pytest.mark.parametrize("how", [{"first": ["--dry-run"]}, {"env": {"DRY_RUN": "1"}}], ids=["flag", "variable"])
def test_a_pod_slice_runs_the_command_on_every_worker(how):
    ((*launch, command),) = dry(
        "tpu_pod.sh",
        *how.get("first", []),
        *FLAGS,
        TPU="pod",
        ZONE="zone-a",
        FOLDER="my checkout",
        **how.get("env", {}),
    )
    assert launch == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-a", "--worker=all"]
    assert shlex.split(command.removeprefix("--command=")) == ["cd", "my checkout", "&&", *PROGRAM]


def test_a_pod_slice_must_be_named():
    line = "error: give the TPU's name and zone: TPU=NAME ZONE=ZONE scripts/tpu_pod.sh --config=..."
    assert refusal("tpu_pod.sh", *FLAGS, TPU="pod") == refusal("tpu_pod.sh", *FLAGS, ZONE="z") == line


def test_slurm_starts_one_task_for_each_gpu():
    assert dry("slurm.sbatch", "--dry-run", *FLAGS) == [["srun", "--kill-on-bad-exit=1", *PROGRAM]]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (SCRIPTS / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_one_process_drives_all_gpus_of_a_machine():
    assert dry("multi_gpu.sh", *FLAGS, DRY_RUN="1") == [PROGRAM]


def test_several_processes_have_gpus_of_their_own():
    commands = dry("multi_gpu.sh", "--dry-run", *FLAGS, PROCESSES="2", GPUS="4", PORT="1234")
    group = ["--coordinator=127.0.0.1:1234", "--num_processes=2"]
    assert commands == [
        ["env", f"CUDA_VISIBLE_DEVICES={gpus}", *PROGRAM, *group, f"--process_id={index}"]
        for index, gpus in enumerate(("0,1", "2,3"))
    ]


def test_processes_must_divide_the_gpus():
    line = "error: PROCESSES=3 must divide the number of GPUs, 8"
    assert refusal("multi_gpu.sh", PROCESSES="3", GPUS="8", DRY_RUN="1") == line


def space(tmp_path, folder):
    """Runs scripts/space.sh with a Python that only notes its arguments."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s|" "$@" >> "{tmp_path}/asked"; echo >> "{tmp_path}/asked"\n')
    python.chmod(0o755)
    return call("space.sh", "runs/my demo", str(folder), PYTHON=str(python))


def test_the_folder_of_a_space_has_all_that_its_dockerfile_copies(tmp_path):
    folder = tmp_path / "a space"
    done = space(tmp_path, folder)
    assert (done.returncode, done.stdout) == (0, f"written: {folder}\n")
    release, wheel = (line.split("|")[:-1] for line in (tmp_path / "asked").read_text().splitlines())
    assert release == ["-m", "taskexpert_jax.release", "runs/my demo", f"--output={folder}/model"]
    assert wheel[:3] == ["-m", "pip", "wheel"] and f"--wheel-dir={folder}" in wheel and wheel[-1] == str(SCRIPTS.parent)
    copied = re.findall(r"^COPY (?:--\S+ )?(.*) \S+$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    assert " ".join(copied).split() == ["requirements.lock", "*.whl", "model"]
    assert {path.name for path in folder.iterdir()} == {"Dockerfile", "README.md", "requirements.lock"}
    assert space(tmp_path, folder).stderr == f"error: {folder} is not empty: give another folder\n"


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(pathlib.Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: requirements-ci.txt has it")
    scripts = [path for pattern in ("scripts/*.sh", "scripts/*.sbatch", ".ci/run") for path in ROOT.glob(pattern)]
    assert len(scripts) > 6
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.stdout == ""
