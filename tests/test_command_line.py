"""The command line: config fields that are given several times, devices that are not there."""

import pathlib
import sys

from absl import flags
import jax
from ml_collections import config_flags
import pytest

from configs import demo
from taskexpert_jax import command_line

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def parsed(monkeypatch):
    """Arguments -> the config that a program gets."""

    def parse(*arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        holder = config_flags.DEFINE_config_dict("config", demo.get_config("tiny"), flag_values=values)
        assert command_line.parse_flags(sys.argv) == ["main.py"]
        return holder.value

    return parse


@pytest.mark.parametrize(
    ("arguments", "tasks"),
    [
        (["--config.tasks=('semseg','depth')", "--config.tasks=('depth',)"], ("depth",)),
        (["--config.tasks=semseg", "-config.tasks=depth", "--config.tasks=edge"], ("edge",)),
    ],
)
def test_the_last_value_of_a_field_counts_and_is_named(arguments, tasks, parsed, capsys):
    assert parsed(*arguments, "--config.batch_size=8").tasks == tasks
    count, last = len(arguments), arguments[-1].split("=")[1]
    assert capsys.readouterr().err == (
        f"warning: --config.tasks is given {count} times; the last value counts: {last}\n"
    )


def test_the_same_value_twice_is_one_value(parsed, capsys):
    config = parsed("--config.tasks=('depth',)", "--config.num_steps=5", "--config.tasks=('depth',)")
    assert (config.tasks, config.num_steps) == (("depth",), 5)
    assert capsys.readouterr().err == ""


def test_a_flags_file_is_read_too(parsed, tmp_path):
    (tmp_path / "flags").write_text("--config.tasks=('semseg',)\n")
    assert parsed(f"--flagfile={tmp_path / 'flags'}", "--config.tasks=('depth',)").tasks == ("depth",)


def test_a_value_apart_from_its_field_is_not_given_twice(parsed, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed("--config.tasks", "semseg", "--config.tasks", "depth")
    assert capsys.readouterr().err == (
        "error: --config.tasks is given 2 times; give it once, as --config.tasks=VALUE\n"
    )
    assert parsed("--config.tasks", "depth").tasks == ("depth",)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (("--config.tasks", "depth", "--config.num_steps=7", "--workdir=RUN"), True),
        (("--workdir=RUN", "--config.tasks=depth", "--config.num_steps=7", "--verbosity=-1"), True),
        ((f"--config={ROOT}/configs/demo.py:tiny", "--config.tasks=depth", "--config.num_steps=7"), False),
        (("--config=~/configs/demo.py:tiny", "--config.tasks=depth", "--config.num_steps=7"), False),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections, for config files
def test_without_a_config_the_runs_own_is_changed_by_the_flags(arguments, given, monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    monkeypatch.setenv("HOME", str(ROOT))
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_integer("verbosity", 0, "", flag_values=values)
    asked = []

    def own_config():
        asked.append(workdir.value)
        config = demo.get_config("tiny")
        config.model.gate.top_k = 2
        return config

    assert command_line.parse_flags(sys.argv, own_config) == ["main.py"]
    assert asked == (["RUN"] if given else [])
    config = holder.value
    assert (config.tasks, config.num_steps, config.model.gate.top_k) == (("depth",), 7, 2 if given else 0)
    changed = config_flags.get_override_values(values["config"])
    assert changed == {"tasks": ("depth",), "num_steps": 7}


@pytest.mark.parametrize(
    "given", [["--config=demo:tiny"], ["-config", "demo:tiny"], ["--config", "configs/demo.py:tiny"]]
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections, for config files
def test_a_bundled_config_needs_no_folder(given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "FLAGS", values := flags.FlagValues())
    monkeypatch.setattr(sys, "argv", ["main.py", *given, "--config.num_steps=7"])
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
    assert command_line.parse_flags(sys.argv) == ["main.py"]
    assert (holder.value.num_steps, holder.value.variant) == (7, "tiny")


def test_without_any_config_it_is_named(monkeypatch, capsys):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_integer("verbosity", 0, "", flag_values=values)
    with pytest.raises(SystemExit, match="2"):
        command_line.parse_flags(["main.py"], lambda: None)
    assert capsys.readouterr().err.startswith("error: --config is missing: ")


def test_a_flags_file_that_cannot_be_read_is_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    (tmp_path / "latin").write_bytes(b"--mode=\xe9\n")
    for name, why in (("none", "none"), ("latin", "codec can't decode")):
        monkeypatch.setattr(sys, "argv", ["main.py", f"--flagfile={tmp_path / name}"])
        with pytest.raises(SystemExit, match="2"):
            command_line.define_config("")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and why in line


def test_an_argument_without_dashes_is_named_rather_than_a_missing_config(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    config_flags.DEFINE_config_file("config", None, flag_values=values)
    assert command_line.parse_flags(["main.py", "evaluate"]) == ["main.py", "evaluate"]  # which `run` refuses


def test_a_device_that_is_not_there_is_one_line(monkeypatch, capsys):
    def absent():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", absent)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert command_line.ended(jax.devices) == 2
    assert capsys.readouterr().err.startswith("error: JAX_PLATFORMS=cuda: JAX finds no such device here; unset it")


def test_other_errors_are_not_taken_for_an_absent_device(monkeypatch):
    def fails():
        raise RuntimeError("of another kind")

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(RuntimeError, match="of another kind"):
        command_line.ended(fails)
