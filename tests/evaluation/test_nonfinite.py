"""Predictions with NaN or Inf: no metric of the task is a number, and the examples are named."""

import json
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from configs import demo
from input_pipeline import pipeline
from taskexpert_jax import evaluate, gates, predict, tasks
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import full_pass, results, steps
from taskexpert_jax.parallel import sharding
from taskexpert_jax.report import evaluation_page
from taskexpert_jax.runs.load import Selected
from tests import random_runs

NAMES = ("semseg", "depth", "normals", "edge")
TASKS = tasks.build(NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), semseg_classes=("a", "b", "c"))
SIZE = (16, 24)
IDS = ("one", "two", "three", "four", "padding", "padding")


def batch_of(ids):
    """Three examples of 12x20 pixels in frames of 16x24; the image is the number of the example."""
    random = np.random.default_rng(0)
    batch = {
        "image": np.broadcast_to(np.array([IDS.index(name) for name in ids])[:, None, None, None], (3, *SIZE, 3)),
        "window": np.tile([2, 2, 12, 20], (3, 1)).astype(np.int32),
        "mask": np.array([name != "padding" for name in ids], np.float32),
        "id": np.array(ids),
    }
    for task in TASKS:
        label = np.full((3, *SIZE, task.label_channels), task.ignore, task.label_dtype)
        label[:, 2:14, 2:22] = random.integers(0, 2, (3, 12, 20, task.label_channels))
        if task.name == "depth":
            label[:, 2:14, 2:22] += 1
        batch[task.name] = label
    batch["semseg"][batch["id"] == "four"] = 255
    return {**batch, "image": batch["image"].astype(np.uint8)}


def batches():
    yield from (batch_of(IDS[:3]), batch_of(IDS[3:]))


def predictions(image):
    """Depth is finite where it counts; of the others, some examples are not: see `test_..._are_named`."""
    number, batch = image[:, :1, :1, :1], len(image)
    pixel = jnp.zeros((1, *SIZE, 1), bool).at[0, 5, 7].set(True)
    outside = jnp.ones((1, *SIZE, 1), bool).at[0, 2:14, 2:22].set(False)
    maps = {task.name: jnp.ones((batch, *SIZE, task.channels)) for task in TASKS}
    maps["depth"] = jnp.where((number > 3) | outside, jnp.nan, maps["depth"])
    maps["semseg"] = jnp.where((number == 3) & pixel, jnp.inf, maps["semseg"])
    maps["edge"] = jnp.where(((number == 0) | (number == 2)) & pixel, jnp.nan, maps["edge"])
    return maps


@pytest.fixture(scope="module")
def found():
    """The evaluation by a full pass over four examples and two of padding, and what was logged."""
    lines = []
    mesh = sharding.one_device_mesh()
    benchmark = ConfigDict({"odsf": True, "max_dist": 0.05, "labels": "lines", "quantise": "truncate"})

    def forward(variables, gates, batch):
        return predictions(batch["image"]), None

    with pytest.MonkeyPatch.context() as patch, sharding.use(mesh):
        patch.setattr(results.logging, "warning", lines.append)
        totals = full_pass.Totals(steps.empty_states(TASKS), None)
        step = full_pass.make_step(TASKS, forward, benchmark.quantise, mesh)
        passed = full_pass.run_step(benchmark, TASKS, step, {}, totals, batches(), mesh)
    config = demo.get_config("tiny")
    facts = results.facts(config, workdir="run", checkpoint=Selected(7, "latest"), examples=passed.examples, seconds=1)
    return passed.evaluation(TASKS, facts, ()), lines


def test_the_examples_are_named_by_task_and_padding_counts_nowhere(found):
    evaluation, lines = found
    assert evaluation.nonfinite == {"semseg": (1, ("four",)), "edge": (2, ("one", "three"))}
    assert sorted(lines) == [
        "edge: NaN or Inf in the predictions of 2 examples (one, three): its metrics are nan",
        "semseg: NaN or Inf in the predictions of 1 example (four): its metrics are nan",
    ]


def test_every_metric_of_such_a_task_is_nan_and_of_the_others_none(found):
    evaluation, _ = found
    for name, value in evaluation.metrics.items():
        assert math.isnan(value) == name.startswith(("semseg/", "edge/")), name
    assert {"edge/odsF", "edge/AP", "edge/loss", "semseg/mIoU"} < evaluation.metrics.keys()


def test_what_is_shown_of_such_a_task_is_no_ordinary_number(found):
    evaluation, _ = found
    written = json.loads(results.texts(evaluation)["metrics.json"], parse_constant=pytest.fail)
    assert written["nonfinite"]["edge"] == {"examples": 2, "ids": ["one", "three"]}
    assert written["published"]["edge"]["value"] is None and written["metrics"]["semseg/mIoU"] is None
    assert written["per_class"] == {} and written["boundary"] == {}
    for name, ids in (("edge", {"two", "four"}), ("semseg", {"one", "two", "three"}), ("depth", set(IDS[:4]))):
        ranked = written["examples_ranked"][name]
        assert {entry["id"] for end in (ranked["worst"], ranked["best"]) for entry in end} == ids, name
    table = results.table(results.rows(TASKS, evaluation.metrics, evaluation.best_constant))
    assert [line.split()[4] for line in table.splitlines() if "odsF ↑" in line] == ["nan"]
    page = evaluation_page.html(evaluation)
    assert "NaN or Inf in the predictions of 2 examples (one, three)" in page
    assert "odsF (%) –" in page and "nan" not in page.split("<footer>")[0].replace("nan (", "")


def test_many_examples_are_counted_and_few_named():
    sentence = results.Nonfinite(654, ("a", "b")).sentence()
    assert sentence == "NaN or Inf in the predictions of 654 examples (a, b, ...)"


@pytest.mark.multidevice
@pytest.mark.parametrize("devices", [1, 3])
def test_an_evaluation_in_training_counts_them(devices, caplog):
    mesh = jax.make_mesh(
        (devices, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices]
    )
    with sharding.use(mesh):
        step = steps.make_eval_step(TASKS, lambda variables, image, window: predictions(image), mesh)
        values = steps.run(step, {}, TASKS, batches(), mesh)
    assert {name.split("/")[0] for name, value in values.items() if math.isnan(value)} == {"semseg", "edge"}
    assert [record.getMessage() for record in caplog.records] == [
        "semseg: NaN or Inf in the predictions of 1 example: its metrics are nan",
        "edge: NaN or Inf in the predictions of 2 examples: its metrics are nan",
    ]


def test_a_diverged_run_is_evaluated_predicted_and_inspected(tmp_path, caplog):
    """All of its parameters are NaN, its gates too."""
    config = random_runs.padded_scenes()
    config.tasks = ("semseg", "normals")
    config.dataset.val_scenes = 2
    config.model.depth = config.model.taps = 1
    config.model.experts = 2
    workdir, image = tmp_path / "run", tmp_path / "a.png"
    random_runs.save(config, workdir, scale=math.nan)
    found = evaluate.evaluate(
        config, workdir, "best", lambda: pipeline.eval_batches(config, tasks.from_config(config), batch_size=8)
    )
    assert all(map(math.isnan, found.values()))
    written = json.loads((workdir / "evaluation" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert written["checkpoint"] == "latest" and written["nonfinite"]["semseg"]["examples"] == 2
    Image.fromarray(np.zeros((24, 36, 3), np.uint8)).save(image)
    for program in (predict.predict, gates.inspect):
        caplog.clear()
        output = tmp_path / program.__name__
        if program is predict.predict:
            (output / "a").mkdir(parents=True)
            (output / "a" / "semseg.npy").write_bytes(b"of an earlier prediction")
            with pytest.raises(UserError, match=r"^1 of 1 images have a NaN or Inf in a prediction"):
                program(config, workdir, "best", image, output)
            assert [path.name for path in (output / "a").iterdir()] == ["montage.png"]  # the image alone
        else:
            program(config, workdir, "best", image, output)
        lines = [record.getMessage() for record in caplog.records if "Inf" in record.getMessage()]
        assert sorted(lines) == [
            f"a: NaN or Inf in the prediction of {name}: the model has diverged" for name in ("normals", "semseg")
        ]
    assert not any("(best)" in record.getMessage() for record in caplog.records)
