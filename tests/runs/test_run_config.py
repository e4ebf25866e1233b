"""The config that a run is loaded with: its own, whatever the command line says of the model."""

import json
import types

import pytest

from configs import demo, nyud, pascal_context
from taskexpert_jax.config import FIELDS, flat, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs import checkpoints, load
from taskexpert_jax.runs import config as run_config
from tests import random_runs

FREE = run_config.FREE_TO_LOAD

# The values of the last field do not fit the shapes.
CONTRADICTIONS = {
    **random_runs.NOT_IN_THE_SHAPES,
    "dtype": "bfloat16",
    "tasks": ("depth", "semseg"),
    "dataset.semseg_classes": ("b", "a"),
    "dataset.downscale": 0.5,
    "edge_pos_weight": 0.5,
    "model.experts": 3,
}


def saved(config, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_what_would_make_another_model_is_refused_with_the_field(field, tmp_path):
    run = saved(demo.get_config("tiny"), tmp_path)
    given = read_run(run)
    given.update_from_flattened_dict({field: CONTRADICTIONS[field]})
    for read in (run_config.of_run, run_config.for_evaluation):
        with pytest.raises(UserError, match=rf"\n  {field} was .*, is ") as refusal:
            read(run, given, {field: CONTRADICTIONS[field]})
        assert len(str(refusal.value).splitlines()) == 2


def test_fields_of_the_decoder_are_never_free():
    assert [name for name in FIELDS if name.startswith(("model.", "optimizer.")) and name.startswith(FREE)] == [
        "model.remat",
        "model.unroll",
        "model.attention",
    ]


def test_what_does_not_change_the_model_may_change(tmp_path):
    run = saved(demo.get_config("tiny"), tmp_path)
    changed = {"eval.flip": True, "mesh.fsdp": 2, "dataset.eval_split": "train", "model.attention": "xla"}
    given = read_run(run)
    given.update_from_flattened_dict(changed)
    config, data = run_config.for_evaluation(run, given, changed)
    assert config is data
    values = dict(flat(config))
    assert {name: values[name] for name in changed} == changed


def test_data_are_identified_anew_unless_their_fingerprint_is_given(tmp_path):
    config = nyud.get_config("tiny")
    config.dataset.fingerprint = "trained"
    run = saved(config, tmp_path)
    assert run_config.of_run(run, read_run(run), {}).dataset.fingerprint == ""
    given = {"dataset.fingerprint": "wanted"}
    assert run_config.of_run(run, read_run(run), given).dataset.fingerprint == "wanted"


def test_another_data_set_is_evaluated_in_the_tasks_that_both_have(tmp_path, capsys):
    trained = nyud.get_config("tiny")  # 64x80
    trained.model.gate.top_k = 2
    run = saved(trained, tmp_path)
    given = pascal_context.get_config("tiny")  # 64x64
    given.dataset.image_size, given.dataset.data_dir, given.eval.flip = (96, 64), "elsewhere", True
    config, data = run_config.for_evaluation(run, given, {"eval.flip": True, "dataset.data_dir": "elsewhere"})
    assert (config.tasks, data.tasks) == (trained.tasks, ("normals", "edge"))
    assert (config.dataset.name, data.dataset.name, data.dataset.data_dir) == ("nyud", "pascal_context", "elsewhere")
    for of in (config, data):
        assert of.model.gate.top_k == 2 and of.eval.flip
        assert (of.dataset.image_size, of.eval.image_size) == ((64, 80), (96, 80))
    assert data.eval.boundary.max_dist == given.eval.boundary.max_dist != trained.eval.boundary.max_dist
    (line,) = capsys.readouterr().err.splitlines()
    assert "'pascal_context', trained on 'nyud'; tasks: normals, edge" in line
    assert "semseg (other classes), depth (not a task of pascal_context)" in line


def test_another_data_set_leaves_the_flags_that_may_change(tmp_path):
    run = saved(nyud.get_config("tiny"), tmp_path)
    changed = {"checkpoint.best_task": "edge", "model.attention": "xla"}
    config, data = run_config.for_evaluation(run, pascal_context.get_config("tiny"), changed)
    assert config.checkpoint.best_task == "edge"  # which selects the best checkpoint
    assert config.model.attention == data.model.attention == "xla"


def test_another_data_set_does_not_excuse_other_flags(tmp_path):
    run = saved(nyud.get_config("tiny"), tmp_path)
    with pytest.raises(UserError, match=r"\n  model.gate.top_k was 0, is 2$"):
        run_config.for_evaluation(run, pascal_context.get_config("tiny"), {"model.gate.top_k": 2})


def test_another_data_set_without_a_common_task_is_refused(tmp_path):
    trained = nyud.get_config("tiny")
    trained.tasks, trained.checkpoint.best_task = ("depth",), "depth"
    run = saved(trained, tmp_path)
    with pytest.raises(UserError, match=r"no task in common.*depth"):
        run_config.for_evaluation(run, pascal_context.get_config("tiny"), {})


def checkpoint_of(config, run, step=2):
    """Gives the run the part of a checkpoint that holds its config."""
    path = run / "checkpoints" / str(step) / "config" / "metadata"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(config.to_dict()))


@pytest.mark.parametrize("field", [name for name in CONTRADICTIONS if name != "model.experts"])
def test_a_checkpoint_of_another_config_is_refused_with_the_field(field, tmp_path):
    config = demo.get_config("tiny")
    checkpoint_of(config, tmp_path)
    config.update_from_flattened_dict({field: CONTRADICTIONS[field]})
    with pytest.raises(UserError, match=rf"checkpoints/2 .*config.json; .*\n  {field} was .*, is "):
        run_config.check_checkpoint(tmp_path, 2, config)


def test_a_checkpoint_of_its_own_run_is_accepted(tmp_path):
    config = demo.get_config("tiny")
    checkpoint_of(config, tmp_path)
    config.update_from_flattened_dict({"num_steps": 9, "eval.flip": True, "mesh.fsdp": 2})
    run_config.check_checkpoint(tmp_path, 2, config)
    run_config.check_checkpoint(tmp_path, 4, config)  # has no record of its config


def test_all_processes_load_the_checkpoint_that_process_0_selects(tmp_path, monkeypatch):
    loaded = []
    found = types.SimpleNamespace(
        best=None, select=lambda which: 4, restore_variables=lambda step, abstract: loaded.append(step), close=list
    )
    monkeypatch.setattr(checkpoints, "Checkpoints", lambda *_, **__: found)
    monkeypatch.setattr(load.processes, "gather", lambda own: [2, own])  # 4 was saved after process 0 had looked
    _, _, selected = load.load(demo.get_config("tiny"), tmp_path, "latest", sharding.one_device_mesh())
    assert loaded == [selected.step] == [2]
