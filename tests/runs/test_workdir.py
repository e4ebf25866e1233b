"""A run's directory: one config, and a lock for one program at a time."""

import json
import os

import pytest

from configs import demo
from taskexpert_jax.config import base
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import workdir
from tests.runs import holding

DEFAULTS = base("tiny", "scenes").augment.to_dict()


@pytest.fixture
def holder(tmp_path):
    """Another program that holds the lock: (its process, the directory)."""
    folder = tmp_path / "run"
    with holding.holder(folder) as process:
        yield process, folder


def test_a_directory_in_use_is_refused_with_who_uses_it(holder):
    process, folder = holder
    refused = pytest.raises(UserError, match=rf"run .*process {process.pid} on \S+ since 2.*--workdir")
    with refused, workdir.lock(folder):
        pass
    process.communicate("\n")  # it ends
    for _ in range(2):
        with workdir.lock(folder):
            assert f"process {os.getpid()} on" in (folder / ".lock").read_text()


def test_a_killed_program_leaves_no_lock(holder):
    process, folder = holder
    process.kill()
    process.wait()
    with workdir.lock(folder):
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=r"--workdir=.*/file/run .*Not a directory")
    with refused, workdir.lock(tmp_path / "file" / "run"):
        pass


def trained(folder):
    """Gives the directory a checkpoint, as far as `claim` looks."""
    (folder / "checkpoints" / "4").mkdir(parents=True)


def test_all_that_differs_is_listed_a_line_each(tmp_path):
    config = demo.get_config("tiny")
    workdir.claim(tmp_path, config)
    trained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    config.optimizer.learning_rate = 0.5
    config.model.gate.top_k = 2
    config.tasks = ("semseg",)
    for field, value in (("guard.skip_steps", 9), ("eval.flip", True), ("mesh.fsdp", 8), ("log.images", 7)):
        config.update_from_flattened_dict({field: value})  # may change, because they do not affect the computation
    with pytest.raises(UserError) as refusal:
        workdir.claim(tmp_path, config)
    _, *lines = str(refusal.value).splitlines()
    assert lines[0] == "  model.gate.top_k was 0, is 2"
    assert [line.split()[0] for line in lines] == ["model.gate.top_k", "optimizer.learning_rate", "tasks"]
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_directory_without_a_checkpoint_is_claimed_anew(tmp_path):
    config = demo.get_config("tiny")
    workdir.claim(tmp_path, config)
    config.model.gate.top_k = 2
    assert workdir.claim(tmp_path, config) is None
    assert json.loads((tmp_path / "config.json").read_text())["model"]["gate"]["top_k"] == 2


def test_a_run_is_extended_on_purpose_only_and_only_to_more_steps(tmp_path):
    config = demo.get_config("tiny")
    workdir.claim(tmp_path, config)
    trained(tmp_path)
    config.num_steps = 8
    with pytest.raises(UserError, match=r"--extend to train it further:\n  num_steps was 4, is 8$"):
        workdir.claim(tmp_path, config)
    assert workdir.claim(tmp_path, config, extend=True) == 4
    assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 8
    assert workdir.claim(tmp_path, config) is None  # it resumes without the flag
    for field, value in (("num_steps", 6), ("seed", 1)):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({"num_steps": 16, field: value})
        with pytest.raises(UserError, match=rf"\b{field} was"):
            workdir.claim(tmp_path, other, extend=True)


def test_a_field_that_is_new_may_have_its_default_and_nothing_else(tmp_path):
    config = demo.get_config("tiny")
    older = config.to_dict()
    del older["optimizer"]["ema_decay"], older["augment"], older["model"]["layer_scale"], older["guard"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    trained(tmp_path)
    config.augment.update(DEFAULTS)
    workdir.claim(tmp_path, config)
    assert "guard" not in json.loads((tmp_path / "config.json").read_text())
    config.optimizer.ema_decay = 0.5
    config.augment.update(DEFAULTS | {"hue": 3})
    with pytest.raises(UserError) as refusal:
        workdir.claim(tmp_path, config)
    assert str(refusal.value).splitlines()[1:] == [
        "  augment.hue was 18, is 3",
        "  optimizer.ema_decay was 0.0, is 0.5",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_config_that_cannot_be_read_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for read in (
        lambda: workdir.claim(tmp_path, demo.get_config("tiny")),
        lambda: workdir.note_other_data(tmp_path, ""),
    ):
        with pytest.raises(UserError, match=r"/config.json "):
            read()
    assert (tmp_path / "config.json").read_text() == text
