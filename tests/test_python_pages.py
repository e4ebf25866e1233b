"""The Python code of README.md, docs/python.md and the notebook runs, each page in a process of its own."""

import json
import pathlib
import re
import subprocess
import sys

from PIL import Image
import pytest

from input_pipeline import scenes
from tests import xla

ROOT = pathlib.Path(__file__).resolve().parent.parent
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
MARK = "-- next cell --"
DEMO = ROOT / "taskexpert_jax" / "demo_model"


def execute(code: str, folder: pathlib.Path) -> str:
    """Runs a program in a folder; returns what it printed."""
    environment = xla.environment(PYTHONPATH=str(ROOT), MPLBACKEND="Agg")
    (folder / "page.py").write_text(code)
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells() -> list[dict]:
    """The code cells of the notebook."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def form(text: str) -> list[str]:
    """The words of a text, with 0 for every number."""
    return NUMBER.sub("0", text).split()


def texts(cell: dict) -> str:
    """Text that a cell printed when the notebook was saved."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_code_of_the_readme_runs(tmp_path):
    Image.fromarray(scenes.render(1_000_003, height=288, width=384)["image"]).save(tmp_path / "room.png")
    (code,) = CODE.findall((ROOT / "README.md").read_text())
    metres, gates = execute(code, tmp_path).splitlines()
    assert 2 < float(metres) < 4  # 2.45 by the scene's label
    assert gates == "('expert 1', 'expert 2', 'expert 3', 'expert 4', 'expert 5', 'memory') (4, 6, 12, 16, 6)"
    with Image.open(tmp_path / "montage.png") as picture:
        assert picture.width > 4 * 384 > picture.height


@pytest.mark.slow
def test_the_code_of_the_guide_runs(tmp_path):
    printed = execute("".join(CODE.findall((ROOT / "docs" / "python.md").read_text())), tmp_path)
    assert "\nnormals (288, 384, 3) float32\n" in printed
    assert re.search(r"^semseg \(4, 32, 48, 14\) \d", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == "missing.png: no such image"


@pytest.mark.slow
def test_the_notebook_runs_and_its_saved_outputs_are_its_own(tmp_path):
    """Numbers may differ between machines."""
    code = f"\nprint({MARK!r})\n".join("".join(cell["source"]) for cell in cells())
    printed = execute(code, tmp_path).split(f"{MARK}\n")
    assert [form(text) for text in printed] == [form(texts(cell)) for cell in cells()]
    first, last = (float(loss) for loss in re.search(r"loss: (.*) -> (.*)", printed[-1]).groups())
    assert last < first


def test_the_table_of_the_readme_has_the_results_of_the_bundled_model():
    """In the order of the tasks; the model card has more digits."""
    card = (DEMO / "README.md").read_text()
    of_card = [float(value) for value in re.findall(r"^      value: (.*)$", card, re.MULTILINE)]
    rows = re.findall(r"^\| [^|]+ \| [^|]+ [↑↓] \| ([\d.]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    assert rows == [f"{value:.{len(row.partition('.')[2])}f}" for row, value in zip(rows, of_card, strict=True)]


def test_the_saved_outputs_are_small_and_have_no_errors():
    assert not [output for cell in cells() for output in cell["outputs"] if output["output_type"] == "error"]
    assert (ROOT / "docs" / "quickstart.ipynb").stat().st_size < 400_000
