"""The how-to pages work: their files are written, their commands run, in a copy of the program.

A fenced block whose info string names a file is that file; of a file that exists, a diff changes it and Python code is
added to its end. A block `sh run` is run. Blocks of other kinds are for the reader alone.
"""

import ast
from collections.abc import Iterator
import json
import pathlib
import re
import shutil
import subprocess
import sys

from PIL import Image
import pytest

import taskexpert_jax
from tests import xla

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MESSAGE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]*\b")
LINK = re.compile(r"\]\(([^)#]+)")
PROGRAM = (
    *("main.py", "pyproject.toml", "configs", "input_pipeline", "taskexpert_jax"),
    *("tests/conftest.py", "tests/xla.py"),
)


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the program, to be changed."""
    for name in PROGRAM:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Language, rest of the info string and text of each fenced block."""
    for match in BLOCK.finditer((ROOT / "docs" / page).read_text()):
        yield match[1], match[2] or "", match[3]


def patched(text: str, diff: str) -> str:
    """The text with the hunks of a diff, whose context must be there exactly once."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if not line.startswith("+"))
        assert text.count(before) == 1, f"the page's context is not in the file: {before}"
        text = text.replace(before, "".join(line[1:] or "\n" for line in lines))
    return text


def write(language: str, path: pathlib.Path, text: str) -> None:
    """Does what a block that names a file says."""
    if language == "diff":
        text = patched(path.read_text(), text)
    elif path.exists():
        text = f"{path.read_text()}\n\n{text}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(folder: pathlib.Path, command: str) -> str:
    """Runs one line of a page; returns what it printed."""
    environment = xla.environment(PYTHONPATH="")
    line = command.replace(".venv/bin/python", sys.executable)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def follow(page: str, folder: pathlib.Path, *, only: str = "") -> dict[str, str]:
    """Follows a page from top to bottom, or only its block for one file; what each of its commands printed.

    Scripts at the top of the copy are run as soon as they are written: the page's text tells the reader to.
    """
    printed = {}
    for language, what, text in blocks(page):
        if only and what != only:
            continue
        if (language, what) == ("sh", "run"):
            printed |= {command: run(folder, command) for command in text.splitlines()}
        elif what:
            write(language, folder / what, text)
            if "/" not in what:
                run(folder, f".venv/bin/python {what}")
    return printed


def texts_of(path: pathlib.Path) -> Iterator[str]:
    """Texts in a source file, with a line break in place of each value; docstrings are none."""
    module = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_program():
    folders = ("configs", "input_pipeline", "taskexpert_jax")
    paths = [ROOT / "main.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    texts = [text for path in paths for text in texts_of(path)]
    messages = MESSAGE.findall((ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(messages) == len(set(messages)) > 50
    gone = []
    for part in (part for message in messages for part in message.split(" ... ")):
        fixed = re.compile(".*".join(map(re.escape, PLACEHOLDER.split(part))), re.DOTALL)
        gone += [] if any(map(fixed.search, texts)) else [part]
    assert not gone, "no longer in a message of the program:\n" + "\n".join(gone)


def test_every_page_is_linked():
    pages = {path.resolve(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
    linked = set()
    for path, text in ({ROOT / "README.md": (ROOT / "README.md").read_text()} | pages).items():
        links = {(path.parent / link).resolve() for link in LINK.findall(text) if "://" not in link}
        assert not (missing := [link for link in links if not link.exists()]), f"{path}: no {missing}"
        linked |= links - {path}
    assert sorted(path.name for path in pages.keys() - linked) == []


def test_every_page_is_in_the_contents_of_the_site():
    contents = set(re.findall(r"^      - (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    from_elsewhere = {"index.md", "quickstart.md", "contributing.md", "changelog.md"}
    assert contents - from_elsewhere == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "hooks.py").read_text()
    page = text[text.index('    "api": (') : text.index('    "tasks": (')]
    assert set(taskexpert_jax.__all__) <= set(re.findall(r"\w+", page))


@pytest.mark.slow
def test_the_page_on_data_sets_works(copy):
    printed = follow("add_a_dataset.md", copy)
    everything = "".join(printed.values())
    evaluations = re.findall(r"^evaluation at step 2: .*", everything, re.MULTILINE)
    assert len(evaluations) == 2 and len(set(evaluations)) == 1  # the same rooms in both formats
    assert everything.count("depth                         4 images labelled, 100.0 % of their pixels") == 2
    assert "best constant" in everything
    for sheet in ("rooms", "frames"):
        with Image.open(copy / "runs" / sheet / "train.png") as picture:
            assert picture.width > 3 * 384  # the image and two labels


@pytest.mark.slow
def test_the_page_on_tasks_works(copy):
    follow("add_a_dataset.md", copy, only="make_rooms.py")
    *_, evaluated = follow("add_a_task.md", copy).values()
    (row,) = [line for line in evaluated.splitlines() if line.startswith("shading ")]
    measured = [float(number) for number in re.findall(r"\d\.\d+", row)]
    assert len(measured) == 2 and all(0 < error < 1 for error in measured)  # of the model, and of the best constant


@pytest.mark.slow
def test_the_page_on_vector_tasks_works(copy):
    """Flow of 2 and albedo of 3 channels, from label files to the report and back from files of predictions."""
    follow("add_a_dataset.md", copy, only="make_rooms.py")
    *_, evaluated, _, scored = follow("add_a_vector_task.md", copy).values()
    for title in ("optical flow", "albedo"):
        (of_model, constant), (of_files, same_constant) = (_errors(text, f"{title} ") for text in (evaluated, scored))
        assert 0 < constant == same_constant
        assert of_model == pytest.approx(of_files, rel=1e-3)
    with Image.open(copy / "runs" / "vectors" / "train.png") as picture:
        assert picture.width > 3 * 384
    (report,) = (copy / "runs" / "vectors_tiny" / "evaluation").glob("*.html")
    page = report.read_text()
    assert "Red points right, yellow down" in page and "from 0 to 1; dark blue" in page


@pytest.mark.slow
@pytest.mark.parametrize("page", ["add_a_backbone.md", "add_a_decoder.md"])
def test_the_pages_on_backbones_and_decoders_work(page, copy):
    trained, evaluated = follow(page, copy).values()
    assert "step 4/4" in trained
    assert len(re.findall(r" \*  *\d", evaluated)) == 6  # the published metric of each task


@pytest.mark.slow
def test_the_page_on_balancing_works(copy):
    (trained,) = follow("balancing.md", copy).values()
    assert "step 4/4" in trained
    lines = [json.loads(line) for line in (copy / "runs" / "log_sum" / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "train/loss" in line):
        assert line["train/weight/depth"] > 0


def _errors(table: str, title: str) -> tuple[float, float]:
    """The model's and the best constant's number in the row that begins with a title."""
    (row,) = [line for line in table.splitlines() if line.startswith(title)]
    of_model, constant = (float(number) for number in re.findall(r"\d+\.\d+", row))
    return of_model, constant


@pytest.mark.parametrize("page", ["balancing.md", *sorted(path.name for path in (ROOT / "docs").glob("add_a_*.md"))])
def test_the_files_of_the_pages_are_in_the_style_of_the_project(page, tmp_path):
    for language, what, text in blocks(page):
        if language == "python":
            path = tmp_path / what
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    settings = ["--config", str(ROOT / "pyproject.toml"), "--extend-ignore", "F821", "--no-cache", str(tmp_path)]
    command = [sys.executable, "-m", "ruff", "check", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
