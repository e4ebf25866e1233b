"""Facts about a run's own config, which config.json in its folder has."""

import dataclasses
import json
import re

import pytest

from configs import demo, nyud
from taskexpert_jax.config import flat, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import from_config
from tests.test_config import MODULES, fitting


@pytest.mark.parametrize("data_set", ["scenes", *MODULES])
def test_the_runs_own_config_is_the_one_it_started_with(data_set, tmp_path, capsys):
    config = fitting(data_set)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    read = read_run(tmp_path)
    assert dict(flat(read)) == dict(flat(config))  # what are tuples are tuples again
    assert capsys.readouterr().err == ""
    models = [taskexpert.from_config(of, from_config(of)) for of in (read, config)]
    ours, theirs = (
        dataclasses.asdict(dataclasses.replace(of, tasks=(), decoder=dataclasses.replace(of.decoder, tasks=())))
        for of in models
    )
    assert ours == theirs


def test_fields_that_a_run_is_too_old_for_get_their_first_defaults_and_are_named(tmp_path, capsys):
    saved = demo.get_config("tiny").to_dict()
    del saved["model"]["gate"]["temperature"], saved["model"]["memory"]["write"], saved["guard"]["skip_steps"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    read = read_run(tmp_path)  # residual: the first default of memory.write, not today's
    assert (read.model.gate.temperature, read.model.memory.write, read.guard.skip_steps) == (1.0, "residual", 0)
    added = "model.gate.temperature, model.memory.write, guard.skip_steps"
    assert capsys.readouterr().err.endswith(f"with its first default each: {added}\n")


def test_a_variants_own_defaults_fill_in_what_its_run_lacks(tmp_path):
    saved = nyud.get_config("dinov2_s14_reg4").to_dict()
    del saved["model"]["registers"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_run(tmp_path).model.registers == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json is missing; give the --workdir of a run"),
        ("{", r"config\.json is not a run's config \(.+\); "),
        ("[1]", r"config\.json is not a run's config \(.*\bfields\); "),
        ("[" * 100_000, r"config\.json is not a run's config \(it is nested too deeply\); "),
        ('{"model": 1}', r"config\.json is not a run's config \(config.model=1: must be a group of fields\); "),
        ('{"dataset": null}', r" \(config.dataset=None: must be a group of fields\); "),
        ('{"loss_weights": 1}', r" \(config.loss_weights=1: must be a group of fields\); "),
        ('{"batch_size": {"a": 1}}', r" \(config.batch_size: must be a value, not a group of fields\); "),
        ('{"model": {"width": 1}, "model.width": 2}', r" \(config.model.width is given twice\); "),
        ('{"seed": 1, "seed": 2}', r" \(the key 'seed' is given twice\); "),
        ("\xff", r" \(it is not text in UTF-8 \(byte 0\)\); "),
        ("", r" \(it is empty\); "),
        ("{}", r"config\.json is not a run's config \(config\.variant is missing.*\); "),
    ],
)
def test_what_is_no_config_is_refused_in_a_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as refused:
        read_run(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("num_steps", "1" * 400),
        ("num_steps", "Infinity"),
        ("optimizer.learning_rate", "1e999"),
        ("optimizer.learning_rate", "9" * 400),
        ("optimizer.learning_rate", '"1e-4"'),
        ("model.image_mean", "[0.1, 0.1, NaN]"),
        ("model.image_mean", "{}"),
        ("tasks", '{"semseg": 1}'),
        ("tasks", '[["semseg"]]'),
        ("dataset.image_size", f"[{'9' * 400}, 64]"),
        ("seed", "null"),
    ],
)
def test_a_value_of_another_type_or_size_in_a_runs_config_is_named(field, text, tmp_path):
    saved = demo.get_config("tiny").to_dict()
    group = saved
    for name in field.split(".")[:-1]:
        group = group[name]
    group[field.split(".")[-1]] = "VALUE"
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(saved).replace('"VALUE"', text))
    with pytest.raises(UserError, match=rf"^.* \(config\.{field}\b.{{,300}}$"):
        read_run(tmp_path)


def test_a_run_of_another_version_with_a_field_that_is_unknown_here_is_refused(tmp_path):
    saved = demo.get_config("tiny").to_dict()
    saved["model"]["gate"]["hardness"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=re.escape("(config.model.gate.hardness: unknown field)")):
        read_run(tmp_path)
