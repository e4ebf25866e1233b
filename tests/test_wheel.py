"""The wheel: what is in it, and that it works from any folder without names such as `configs` in site-packages."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

from PIL import Image
import pytest

from taskexpert_jax import __version__
from tests import xla

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("taskexpert_jax", "configs", "input_pipeline")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "requirements.txt", "README.md", "LICENSE", "main.py")


def files_of(folder: pathlib.Path) -> set[str]:
    """Files below a folder, relative to it, except those that Python makes."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", ".pyo")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout with a commit, tests, and the remains of an earlier build."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    for name in (*FOLDERS, "tests"):
        content = ROOT / name if name in FOLDERS else ROOT / name / "report"
        shutil.copytree(content, copy / name)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    (copy / ".gitignore").write_text("/build/\n*.egg-info/\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *command], cwd=copy, check=True)
    stale = copy / "build" / "lib" / "taskexpert_jax"
    stale.mkdir(parents=True)
    (stale / "removed_since.py").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(source):
    """The wheel that pip builds."""
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir=dist", "."]
    subprocess.run([sys.executable, "-m", "pip", *command], cwd=source, check=True)
    (path,) = (source / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Folder of a virtual environment with the wheel, and with this one's packages but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", f"--python={folder}/bin/python"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "needs.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def test_the_wheel_has_one_package_with_all_of_its_files_and_no_tests(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        commit = archive.read("taskexpert_jax/bundled/COMMIT").decode()
        metadata = archive.read(f"taskexpert_jax-{__version__}.dist-info/METADATA").decode()
    wanted = {f"taskexpert_jax/{name}" for name in files_of(source / "taskexpert_jax")} | {
        f"taskexpert_jax/bundled/{folder}/{name}" for folder in FOLDERS[1:] for name in files_of(source / folder)
    }
    assert {name for name in names if ".dist-info/" not in name} == {*wanted, "taskexpert_jax/bundled/COMMIT"}
    assert {"taskexpert_jax/py.typed", "taskexpert_jax/report/base.css"} <= wanted
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True).stdout
    assert head.startswith(commit.strip()) and len(commit.strip()) >= 7
    needs = [line for line in (source / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert len(re.findall("^Requires-Dist: [^;\n]*$", metadata, re.MULTILINE)) == len(needs)


def test_only_the_programs_see_the_bundled_folders(environment, tmp_path):
    program = (
        "import importlib.util as util, taskexpert_jax\n"
        "from taskexpert_jax import installation\n"
        "names = ('configs', 'input_pipeline', 'tests', 'main', 'setup')\n"
        "print(taskexpert_jax.__file__, [name for name in names if util.find_spec(name)])\n"
        "installation.enable()\n"
        "print(installation.version_text(), [name for name in names if util.find_spec(name)])\n"
    )
    python = environment / "bin" / "python"
    done = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    before, after = done.stdout.splitlines()
    assert before.startswith(str(environment)) and before.endswith("taskexpert_jax/__init__.py []")
    assert after.startswith(f"{__version__} (") and after.endswith(") ['configs', 'input_pipeline']")


OWN_CONFIG = """
from configs import demo

def get_config(variant="tiny"):
    config = demo.get_config(variant)
    config.dataset.name = "own"
    config.tasks, config.checkpoint.best_task = ("semseg", "depth"), "depth"
    config.num_steps = config.model.depth = config.model.taps = 1
    return config
"""


@pytest.mark.slow
def test_an_installed_package_trains_evaluates_and_predicts_in_a_folder_of_the_user(environment, tmp_path):
    """With a config and a data set of the user in that folder, which build on the bundled ones."""
    for name, text in {
        "configs/own.py": OWN_CONFIG,
        "input_pipeline/own.py": "from input_pipeline.scenes import fingerprint, source",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")

    def taskexpert(*arguments):
        command, env = [environment / "bin" / "taskexpert", *arguments], xla.environment()
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    version = taskexpert("--version").split(maxsplit=1)[1].strip()
    assert version in taskexpert("train", "run", "--config=own")
    taskexpert("evaluate", "run")
    assert json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["version"] == version
    taskexpert("predict", "run", "--images=red.png", "--output=predictions")
    assert (tmp_path / "predictions/red/montage.png").is_file()
