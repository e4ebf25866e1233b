"""The breakdown of an evaluation: groups and parts by hand, that they sum to the whole, and the program end to end."""

import json
import math
import re

import jax
import numpy as np
import pytest

from benchmarks import breakdown, image_groups
from benchmarks.breakdown import Found, Run
from configs import demo
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import steps
from taskexpert_jax.tasks import from_config
from tests import random_runs

HEIGHT, WIDTH, COUNT = 12, 16, 3


@pytest.fixture(scope="module")
def tasks():
    return from_config(demo.get_config("tiny"))


def frames(tasks, seed=0):
    """A batch of three random images, the last one padding, in frames with a margin of 1."""
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(256, size=(COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8),
        "window": np.array([(1, 1, HEIGHT - 2, WIDTH - 2)] * COUNT, np.int32),
        "mask": np.array([1, 1, 0], np.float32),
    }
    for task in tasks:
        shape = (COUNT, HEIGHT, WIDTH, task.label_channels)
        top = len(task.class_names) or 2
        label = rng.uniform(0.5, 6, shape) if task.name in ("depth", "normals") else rng.integers(top, size=shape)
        label = label.astype(task.label_dtype)
        if task.name == "semseg":
            label = np.repeat(np.repeat(label[:, ::4, ::4], 4, axis=1), 4, axis=2)
        label[:, [0, -1]] = label[:, :, [0, -1]] = task.ignore
        batch[task.name] = label
    return batch


# ------------------------------------------------------------------------------------------------- groups and parts


def test_boundary_is_two_pixels_on_both_sides_of_a_change_of_class(tasks):
    semseg = [task for task in tasks if task.name == "semseg"]
    label = np.zeros((1, 5, 16, 1), np.uint8)
    label[:, :, 6:] = 1
    label[:, :, 12:] = 255  # unlabelled: nothing is known to change there
    batch = {"semseg": label, "image": np.zeros((1, 5, 16, 3), np.uint8), "window": np.array([(0, 0, 5, 15)])}
    parts = image_groups.parts_of_images(semseg, batch)
    assert list(parts) == ["boundary", "interior"]
    for row in np.asarray(parts["boundary"][0]):
        assert np.flatnonzero(row).tolist() == [4, 5, 6, 7]
    inside = np.arange(16) < 15
    np.testing.assert_array_equal(parts["interior"][0], inside & ~np.asarray(parts["boundary"][0]))


def test_bands_of_distance_have_the_pixels_with_a_depth(tasks):
    depth = [task for task in tasks if task.name == "depth"]
    label = np.array([-1, 0.5, 1.99, 2, 3.9, 4, 70], np.float32).reshape(1, 1, 7, 1)
    batch = {"depth": label, "image": np.zeros((1, 1, 7, 3), np.uint8), "window": np.array([(0, 0, 1, 7)])}
    found = {name: np.flatnonzero(part) for name, part in image_groups.parts_of_images(depth, batch).items()}
    assert {name: pixels.tolist() for name, pixels in found.items()} == {
        "nearer than 2 m": [1, 2],
        "2 to 4 m": [3, 4],
        "farther than 4 m": [5, 6],
    }


def test_thirds_partition_the_images_and_conditions_name_theirs(tasks):
    batches = [frames(tasks, seed) for seed in range(5)]
    for number, batch in enumerate(batches):
        batch["image"][...] = 10 * number + np.array([0, 5, 200]).reshape(3, 1, 1, 1)
    batches[0]["depth"][0] = -1
    conditions = [("light", "near"), ("dark", "near")] * 5
    groups = image_groups.of_images(batches, tasks, conditions)
    assert groups.members["all"].all() and len(groups.members["all"]) == 10  # without the padding
    thirds = [groups.members[f"brightness {third}"].tolist() for third in image_groups.THIRDS]
    assert thirds == [[index < 3 for index in range(10)], [3 <= i < 6 for i in range(10)], [i >= 6 for i in range(10)]]
    assert groups.bounds["brightness"] == pytest.approx((15, 30))  # of 0, 5, ..., 45
    for name in groups.bounds:
        count = np.sum([groups.members[f"{name} {third}"] for third in image_groups.THIRDS], axis=0)
        assert count.tolist() == [0 if name == "median depth" else 1] + [1] * 9
    assert groups.members["dark"].tolist() == [False, True] * 5 and groups.members["near"].all()


def test_regions_are_counted_by_connection(tasks):
    batch = frames(tasks)
    batch["semseg"][...] = 255
    batch["semseg"][0, 2:10, 2:14] = 0
    batch["semseg"][0, 3:5, 3:5] = batch["semseg"][0, 7:9, 3:5] = 1  # two regions of a class
    found = image_groups._statistics(batch, tasks)
    assert [row["semantic regions"] for row in found] == [3, 0]


# ------------------------------------------------------------------------------------------------------------ sums


@pytest.fixture(scope="module")
def sums(tasks):
    """States of two batches by group and part; and those of all images, computed as the project's evaluation does."""
    rng = np.random.default_rng(1)
    shapes = {task.name: (COUNT, HEIGHT, WIDTH, task.channels) for task in tasks}
    predictions = {name: rng.normal(1, 2, shape).astype(np.float32) for name, shape in shapes.items()}
    batches = [frames(tasks, seed) for seed in range(2)]
    groups = image_groups.of_images(batches, tasks, [("light",), ("dark",), ("dark",), ("light",)])
    mesh = breakdown.sharding.one_device_mesh()
    tally = breakdown.make_tally(tasks, lambda variables, image, window: variables)
    whole, parts = breakdown.add_up(tally, predictions, breakdown.with_members(batches, groups), mesh)
    expected = steps.empty_states(tasks)
    merge = jax.jit(lambda states, batch: steps.merge_batch(tasks, states, predictions, batch))
    for batch in batches:
        expected = merge(expected, batch)
    return dict(zip(groups.members, whole, strict=True)) | parts, jax.device_get(expected)


def assert_equal(tasks, states, expected):
    for task in tasks:
        values, wanted = states[task.name].compute(), expected[task.name].compute()
        assert values == pytest.approx(wanted, rel=1e-6, nan_ok=True), task.name
        assert not math.isnan(values[task.main_metric])


def merged(tasks, states, names):
    first, *others = (states[name] for name in names)
    for other in others:
        first = {task.name: first[task.name].merge(other[task.name]) for task in tasks}
    return first


@pytest.mark.parametrize(
    "names",
    [
        ["all"],
        ["light", "dark"],
        ["boundary", "interior"],
        image_groups.BANDS,
        [f"brightness {third}" for third in image_groups.THIRDS],
        [f"semantic regions {third}" for third in image_groups.THIRDS],
    ],
    ids=", ".join,
)
def test_groups_sum_to_the_whole(tasks, sums, names):
    states, expected = sums
    assert_equal(tasks, merged(tasks, states, names), expected)


def test_groups_differ(tasks, sums):
    states, _ = sums
    for one, other in (("light", "dark"), ("boundary", "interior"), image_groups.BANDS[:2]):
        for task in tasks:
            assert states[one][task.name].compute() != states[other][task.name].compute()


# ------------------------------------------------------------------------------------------------ tables and program


def found(miou, person):
    groups = {"all": {"semseg/mIoU": miou, "depth/rmse": 0.5}, "brightness low": {"semseg/mIoU": math.nan}}
    data = {"images": {"all": 9, "brightness low": 3}, "bounds": {"brightness": (100.0, 120.0)}}
    return Found(groups, {"semseg": {"person": person}}, data)


def test_differences_are_within_seeds_and_bold_if_the_interval_excludes_0():
    runs = {Run("full", seed): found(60 + seed, 50 - seed) for seed in (1, 2, 3)}
    runs |= {Run("static", seed): found(58 + seed + 0.1 * (seed == 2), 51.0) for seed in (0, 1, 2, 3)}
    table = breakdown.differences(runs, "full", "static")
    assert table["seeds"] == [1, 2, 3]
    cell = table["groups"]["all"]["semseg/mIoU"]
    assert cell["mean"] == pytest.approx((2 + 1.9 + 2) / 3) and cell["other"] == pytest.approx(58 + 2 + 0.1 / 3)
    assert cell["half_width"] == pytest.approx(4.3027 * 0.057735 / math.sqrt(3), rel=1e-4)
    assert table["groups"]["brightness low"] == {}
    text = breakdown.markdown(found(0, 0).data, table, "full", "static")
    assert "## full minus static, 3 seeds" in text
    assert "| all | 9 | **+1.97 ± 0.14** (60.03) | +0.0000 ± 0.0000 (0.5000) |" in text
    assert "| brightness < 100 | 3 | - | - |" in text
    assert "| person | -3.00 ± 2.48 (51.00) |" not in text and "| person | **-3.00 ± 2.48** (51.00) |" in text


@pytest.fixture
def runs(tmp_path):
    """Folder like that of benchmarks/ablation.py with two runs on wide scenes; their evaluations are of others."""
    config = demo.get_config("tiny")
    config.dataset.update({"variety": "wide", "val_scenes": 5, "train_scenes": 4})
    config.tasks = ("semseg", "depth")
    for number, rung in enumerate(("full", "static")):
        workdir = tmp_path / "runs" / rung / "seed0"
        random_runs.save(config, workdir, scale=0.1 + 0.1 * number)
        (workdir / "evaluation").mkdir()
        content = {"dataset": {"name": "", "split": "", "fingerprint": ""}, "examples": 5, "metrics": {}}
        content["published"] = {"depth": {"metric": "rmse", "value": 1.0}}
        (workdir / "evaluation" / "metrics.json").write_text(json.dumps(content))
    return tmp_path / "runs"


def test_the_program_completes_a_table_and_evaluates_a_run_once(runs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    given = [f"--runs={runs}", f"--output={output}"]
    assert breakdown.main(["full", *given]) == 0
    assert "depth/rmse is" in capsys.readouterr().out  # not what its evaluation says
    first = json.loads((output / "breakdown.json").read_text())
    (run,) = first["runs"]
    assert first["data"]["dataset"]["fingerprint"] == "scenes-wide-1"
    images = first["data"]["images"]
    assert images["all"] == 5 == images["light"] + images["dark"] == images["empty"] + images["cluttered"]
    assert list(run["groups"])[-5:] == list(image_groups.PARTS)
    assert run["groups"]["all"].keys() == {"semseg/mIoU", "depth/rmse"} and len(run["classes"]["semseg"]) == 14
    evaluated, other = [], Found(run["groups"], run["classes"], first["data"])
    monkeypatch.setattr(breakdown, "evaluate", lambda path: evaluated.append(path.parent.name) or other)
    assert breakdown.main(["full", "static", *given, "--compare", "full", "static"]) == 0
    assert evaluated == ["static"]
    second = json.loads((output / "breakdown.json").read_text())
    assert [found["rung"] for found in second["runs"]] == ["full", "static"] and second["runs"][0] == run
    assert second["differences"][0]["seeds"] == [0]
    assert "## full minus static, 1 seed\n" in (output / "breakdown.md").read_text()

    second["data"]["images"]["all"] = 6
    (output / "breakdown.json").write_text(json.dumps(second | {"runs": [run]}))
    assert breakdown.main(["full", "static", *given]) == 2
    assert "static/seed0 has other data or tasks than" in capsys.readouterr().err


def test_wrong_input_gets_one_line(tmp_path, capsys):
    given = [f"--runs={tmp_path}", f"--output={tmp_path / 'output'}"]
    assert breakdown.main(["full", *given]) == 2
    assert "has no finished run of full; train with benchmarks/ablation.py" in capsys.readouterr().err
    (tmp_path / "full" / "seed0").mkdir(parents=True)
    assert breakdown.main(["full", *given]) == 2
    assert "full/seed0 is not finished: left out" in capsys.readouterr().out
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "breakdown.json").write_text('{"data": {}, "runs": [{"rung": 1}]}')
    assert breakdown.main(["full", *given]) == 2
    assert "is not a table of this program" in capsys.readouterr().err


EMPTY = {"groups": {}, "classes": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": {}}, "runs is {}, and must be an array"),
        ({"runs": [{"rung": "full", "seed": 0, **EMPTY, "groups": {"all": {"a": "b"}}}]}, "runs.0.groups.all.a is 'b'"),
        ({"data": {"images": {}, "bounds": 1}}, "data.bounds is 1"),
    ],
)
def test_a_table_with_values_of_other_kinds_is_refused(tmp_path, change, message):
    content = {"data": {"images": {}, "bounds": {}}, "runs": [], **change}
    (tmp_path / "breakdown.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)):
        breakdown.read(tmp_path)


def test_rungs_without_runs_are_named_before_anything_is_evaluated(tmp_path, capsys):
    for folder in ("full/seed0", "static/seed1"):
        (tmp_path / folder / "evaluation").mkdir(parents=True)
        (tmp_path / folder / "evaluation" / "metrics.json").write_text("{}")
    given = [f"--runs={tmp_path}", f"--output={tmp_path / 'output'}"]
    assert breakdown.main(["full", "statik", *given]) == 2
    assert "has no finished run of statik; train with" in capsys.readouterr().err
    assert breakdown.main(["full", "static", *given, "--compare", "full", "static"]) == 2
    assert "--compare: no seed has finished runs of both full and static" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
