"""The command line: config fields that are given several times."""

import sys

from absl import flags
from ml_collections import config_flags
import pytest

from configs import demo
from taskexpert_jax import command_line


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
