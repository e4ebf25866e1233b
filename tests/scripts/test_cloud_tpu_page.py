"""The commands of docs/cloud_tpu.md: expanded by a shell, and parsed by the programs that they call."""

import ast
import os
import re
import shlex
import subprocess
import sys

import pytest

from taskexpert_jax.compile import topologies
from tests.scripts.commands import ROOT, refused_by_gcloud

PAGE = (ROOT / "docs" / "cloud_tpu.md").read_text()
OTHERS = ("gcloud", "taskexpert", "make", "docker", "source", ".venv/bin/pip")


def lines(text: str) -> list[str]:
    """Commands in the page's indented blocks and in its prose."""
    blocks = "\n".join(
        line.removeprefix("    ") for line in text.splitlines() if line.startswith("    ") and "chip-hours" not in line
    )
    prose = re.findall(r"`((?:gcloud|taskexpert|scripts/\w+\.sh) (?:[^`]|\n)+ [^`]*)`", text)
    return [*blocks.replace("\\\n", " ").splitlines(), *(" ".join(command.split()) for command in prose)]


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """All commands of the page, run in a shell in which they print themselves, and the scripts what they would run."""
    echo = [f"function {name} {{ printf '%q ' {name} \"$@\"; echo; }}" for name in OTHERS]
    done = subprocess.run(
        ["bash", "-euc", "\n".join([*echo, *lines(PAGE)])],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "DRY_RUN": "1"},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_there_are_ten_commands_and_each_is_explained():
    section = PAGE[PAGE.index("## Ten commands") : PAGE.index("## Stop and resume")]
    assert len([line for line in section.splitlines() if line.startswith("    ")]) == 10
    explained = re.findall(r"^\*\*(\d+)(?: to (\d+))?, ", section, re.MULTILINE)
    assert explained == [("1", "4"), *((str(number), "") for number in range(5, 11))]


def test_gcloud_knows_the_commands_of_the_page(printed, tmp_path):
    commands = [line for line in printed if line.startswith("gcloud ")]
    assert len(commands) > 15
    assert refused_by_gcloud(commands, tmp_path) == []


def test_the_program_knows_the_commands_of_the_page(printed):
    """Also those that the launchers run: on a TPU's workers, in a pod, with XPK."""
    commands = [line for line in printed if line.startswith("taskexpert ")]
    for line in printed:
        for part in shlex.split(line, comments=True):
            if " run gs://" in part:
                commands.append(f"taskexpert train {part.partition(' run ')[2]} --preempted_status=143")
            if "exec taskexpert " in part:
                commands.append(part.partition("exec ")[2])
        if line.strip().startswith("args: ['train'"):
            commands.append(shlex.join(["taskexpert", *ast.literal_eval(line.partition(": ")[2])]))
    assert len(commands) >= 8 and {shlex.split(command)[1] for command in commands} == {
        *("prepare", "compile", "train", "checkpoint", "evaluate"),
    }
    wrong = "taskexpert evaluate gs://my-bucket/run --batch_size=3"
    done = subprocess.run(
        [sys.executable, "-m", "tests.scripts.parsed"],
        input="\n".join([*commands, wrong]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.splitlines() == [wrong], done.stdout + done.stderr


def test_topologies_of_the_page_exist():
    names = re.findall(r'--topology="?(?:\d+x )?([\w:]+)', PAGE)
    assert len(names) == 2 and set(names) <= set(topologies.NAMES)


def test_the_costs_are_those_of_the_formula():
    """4 images a step of 457 G multiply-adds, which compile mode reports as 1.097e13 FLOPs; 197 TFLOP/s a v5e chip."""
    flops, steps = float(re.search(r"\(([\d.]+e13) a step", PAGE)[1]), 40_000
    at_peak = flops * steps / topologies.ACCELERATORS["v5e"].teraflops / 1e12 / 3600
    assert re.search(r"([\d.]+) chip-hours if", PAGE)[1] == f"{at_peak / 0.4:.3g}"
    assert re.search(r"20 % it is ([\d.]+) ", PAGE)[1] == f"{at_peak / 0.2:.2g}"
    assert float(re.search(r"([\d.e+]+) model FLOPs", PAGE)[1]) == pytest.approx(flops * steps, rel=1e-3)
