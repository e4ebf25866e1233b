"""The console script: commands, the run as an argument, wrong calls in one line."""

import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

from absl import flags
import pytest

from taskexpert_jax import cli, command_line, installation, paths
from taskexpert_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def called(monkeypatch):
    """Arguments of `taskexpert` -> module that is called, and its command line."""
    seen = []

    def call(*arguments):
        module = type("Program", (), {"main": staticmethod(lambda: seen.append(list(sys.argv)))})
        monkeypatch.setattr(importlib, "import_module", lambda name: seen.append(name) or module)
        monkeypatch.setattr(installation, "enable", lambda: None)
        monkeypatch.setattr(sys, "argv", ["/usr/bin/taskexpert", *arguments])
        assert cli.main() == 0
        return tuple(seen)

    return call


@pytest.mark.parametrize(
    ("arguments", "module", "line"),
    [
        ("train RUN --config=nyud:tiny", "modes", "taskexpert train|--mode=train --workdir=RUN --config=nyud:tiny"),
        ("train --config=x --workdir=RUN", "modes", "taskexpert train|--mode=train --workdir=RUN --config=x"),
        ("evaluate RUN --extend", "modes", "taskexpert evaluate|--mode=evaluate --workdir=RUN --extend"),
        ("predict -workdir RUN --images I", "modes", "taskexpert predict|--mode=predict --workdir=RUN --images I"),
        ("predict --model=demo --images=I", "modes", "taskexpert predict|--mode=predict --workdir=demo --images=I"),
        ("gates --images=I --model hf://O/N", "gates", "taskexpert gates|--workdir=hf://O/N --images=I"),
        ("compile --quick", "modes", "taskexpert compile|--mode=compile --quick"),
        ("checkpoint RUN --verify", "checkpoint", "taskexpert checkpoint|RUN --verify"),
        ("checkpoint --tree --workdir=RUN", "checkpoint", "taskexpert checkpoint|RUN --tree"),
        ("release --model=demo --output=O", "release", "taskexpert release|demo --output=O"),
        ("compare A B --single C", "compare", "taskexpert compare|A B --single C"),
        ("evaluate RUN -- --workdir=2", "modes", "taskexpert evaluate|--mode=evaluate --workdir=RUN -- --workdir=2"),
    ],
)
def test_a_command_is_its_program_with_the_run_as_a_flag(arguments, module, line, called):
    program, rest = line.split("|")
    assert called(*arguments.split()) == (f"taskexpert_jax.{module}", [program, *rest.split()])


def test_a_flags_file_may_name_the_run(tmp_path, called):
    (tmp_path / "flags").write_text("--workdir=RUN\n--checkpoint=latest\n")
    _, argv = called("evaluate", f"--flagfile={tmp_path / 'flags'}")
    assert argv == ["taskexpert evaluate", "--mode=evaluate", "--workdir=RUN", "--checkpoint=latest"]


@pytest.mark.parametrize(
    ("program", "line"),
    [
        ("taskexpert evaluate", "--extend is for taskexpert train or tune, and this is taskexpert evaluate"),
        ("main.py", "--extend is for --mode=train or tune, and this is --mode=evaluate"),
    ],
)
def test_a_flag_of_another_mode_is_named_as_the_modes_were_called(program, line, monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_bool("extend", False, "", flag_values=values)
    values([program, "--extend"])
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(UserError, match=f"^{line}$"):
        command_line.refuse_flags_of_others("evaluate", {"train": ["extend"], "tune": ["extend"], "evaluate": []})


@pytest.mark.parametrize(
    ("program", "name"), [("taskexpert tool", "taskexpert tool"), ("tool.py", "python -m some.tool")]
)
def test_a_wrong_argument_of_a_program_without_a_config_is_one_line(program, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit, match="2"):
        command_line.Parser("some.tool", "").parse_args(["--nothing"])
    assert capsys.readouterr().err == f"error: unrecognized arguments: --nothing; {name} --help lists the arguments\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian RUN", "unknown command 'trian'; did you mean train? taskexpert --help lists the commands"),
        ("xyzzy", "unknown command 'xyzzy'; taskexpert --help lists the commands"),
        ("--workdir=RUN", "the command comes first: taskexpert COMMAND --workdir=RUN ...; "),
        ("evaluate", "which run? taskexpert evaluate RUN [--checkpoint=best|latest|STEP] [--output=DIR], or --model="),
        ("train --config=nyud", "which run? taskexpert train RUN --config=nyud:vit_l16"),
        ("evaluate A --workdir=B", "the run is given 2 times, as 'A', 'B': give it once"),
        ("predict A --model=demo --workdir A", "the run is given 3 times, as 'A', 'A', 'demo': give it once"),
        (
            "evaluate A --mode=train",
            "--mode is a flag of main.py; here the command is the mode, and this is taskexpert ",
        ),
        ("evaluate --workdir", "--workdir needs a value: --workdir=VALUE"),
        ("evaluate A --flagfile=/none", "[Errno 2] No such file or directory: '/none'"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["taskexpert", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("error: ")


def test_the_page_has_an_example_of_each_command():
    page = (ROOT / "docs" / "command_line.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `taskexpert (\w+) ([^`]+)` \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == [name for _, name, _ in rows] == list(cli.COMMANDS)
    for _, name, arguments in rows:
        assert cli.translated(name, arguments.split())
    listed = re.findall(r"^  (\w+) +(\w.+)$", cli.overview(), re.MULTILINE)
    assert [name for name, _ in listed] == list(cli.COMMANDS)


@pytest.mark.parametrize("name", ["checkpoint", "serve", "release"])
def test_help_of_a_program_with_arguments_says_what_the_run_may_be(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(cli.COMMANDS[name].module).main(["--help"])
    assert paths.MODEL_FORM in " ".join(capsys.readouterr().out.split())


def test_each_command_has_a_program():
    for command in cli.COMMANDS.values():
        spec = importlib.util.find_spec(command.module)
        assert spec is not None and spec.origin is not None
        assert re.search(r"^def main\(|import .*\bmain\b", pathlib.Path(spec.origin).read_text(), re.MULTILINE)


WITHOUT_JAX = """
import json, sys
from taskexpert_jax import cli

for status, *arguments in json.loads(sys.argv[1]):
    sys.argv = ["taskexpert", *arguments]
    try:
        found = cli.main()
    except SystemExit as ended:
        found = ended.code
    assert (found or 0) == status, arguments
    heavy = {"jax", "flax", "clu", "orbax", "tensorflow", "matplotlib"} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""


def without_jax(*calls):
    """Output of calls of the console script; each is its exit status and its arguments."""
    command = [sys.executable, "-c", WITHOUT_JAX, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_compare_import_neither_jax_nor_tensorflow(tmp_path):
    metrics = {
        "dataset": {"name": "nyud", "split": "val", "fingerprint": "f"},
        "published": {"depth": {"metric": "rmse", "value": 0.5}, "edge": {"metric": "odsF", "value": 77.0}},
        "examples": 3,
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    names = ("train", "evaluate", "predict", "compare", "compile", "prepare", "scenes")
    compare = [0, "compare", str(tmp_path / "metrics.json"), "--paper=nyud"]
    text = without_jax(
        [0, "--help"], [0, "--version"], [2, "nothing"], compare, *([0, each, "--help"] for each in names)
    )
    assert without_jax([0, "score", "--help"])  # its flags have names of those of the modes
    assert "usage: taskexpert evaluate RUN [--checkpoint=" in text and "\nusage: taskexpert compare [-h]" in text
    of_predict = text[text.index("usage: taskexpert predict") : text.index("usage: taskexpert compare")]
    listed = re.findall(r"^  --([\w.]+)", of_predict, re.MULTILINE)
    assert listed == ["checkpoint", "compilation_cache", "config", "config.FIELD", "images", "output", "verbosity"]
    assert "An image or a folder of images." in of_predict
    assert f"\nRUN: {paths.MODEL_FORM}; also as --model=RUN\n" in of_predict
    assert "RUN: " not in text[text.index("usage: taskexpert train") : text.index("usage: taskexpert evaluate")]
    assert re.search(r"^\| .*metrics.json +\| - +\| 0.5000 +\| - +\| 77.00 +\|$", text, re.MULTILINE)
