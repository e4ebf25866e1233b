"""The ladder for a day with a GPU: packed frames, batches, a rehearsal on the CPU without TensorFlow, and its plan."""

import contextlib
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from benchmarks import device_ladder, seeds
from benchmarks.ladder import feeding, packed, packing, report, running
from benchmarks.ladder.settings import Settings
from configs import nyud as nyud_config
from input_pipeline import nyud, pipeline
from taskexpert_jax import command_line
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import from_config
from tests import xla
from tests.input_pipeline import nyud_layout

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of small frames, built and packed."""
    folder = tmp_path_factory.mktemp("ladder")
    layout = nyud_layout.write(folder / "NYUDv2")
    packing.pack(layout, folder / "data", folder / "packed.zip", 1.0, 95)
    packed.unpack(folder / "packed.zip", folder)
    return folder


@pytest.fixture(scope="module")
def facts(folder):
    return packed.facts(folder / "packed.zip")


def config_of(facts, **changes):
    return Settings(variant="tiny", batch_size=2, **changes).config("full", facts)


def test_packed_labels_are_the_data_sets(folder, facts):
    assert facts["splits"] == {"train": list(nyud_layout.TRAIN), "val": list(nyud_layout.VAL)}
    assert (facts["image_size"], facts["frame_size"]) == ([30, 40], [32, 48])
    frames = packed.Frames(folder, "train", facts["splits"]["train"])
    for index, example_id in enumerate(nyud_layout.TRAIN):
        ours, theirs = frames.load(index), nyud.read_example(folder / "NYUDv2", example_id)
        assert ours["id"] == example_id
        for part in ("semseg", "edge"):
            np.testing.assert_array_equal(ours[part], theirs[part])
        assert ours["image"].shape == theirs["image"].shape
        valid = theirs["depth"] > 0
        np.testing.assert_array_equal(ours["depth"] > 0, valid)
        # More than 255 different depths: the levels are 1 % apart or less.
        np.testing.assert_allclose(ours["depth"][valid], theirs["depth"][valid], rtol=facts["depth_error"] + 1e-6)
    assert 0 < facts["depth_error"] < 0.01


def test_few_depths_are_kept_as_they_are():
    depth = np.array([[0.0, 1.25], [3.5, 1.25]], np.float32)
    example = {"image": np.zeros((2, 2, 3), np.uint8), "depth": depth[..., None]}
    example |= {"semseg": np.zeros((2, 2, 1), np.uint8), "edge": np.zeros((2, 2, 1), np.uint8)}
    levels = packed.levels([depth])
    files = packed.encode(example, levels, 90)
    camera = {"fx": 1.0, "fy": 1.0, "cx": 0.5, "cy": 0.5}
    np.testing.assert_array_equal(packed.decode(files, levels, camera)["depth"][..., 0], depth)


def test_normals_are_those_of_the_plane_that_the_depth_shows():
    camera = {"fx": 100.0, "fy": 110.0, "cx": 20.0, "cy": 15.0}
    normal = np.array([0.3, -0.5, -0.8]) / np.linalg.norm([0.3, -0.5, -0.8])
    rows, columns = np.mgrid[:30, :40]
    rays = np.stack([(columns - 20) / 100, (rows - 15) / 110, np.ones((30, 40))], axis=-1)
    depth = (-2.0 / (rays @ normal)).astype(np.float32)  # points p with p . normal = -2: the plane faces the camera
    depth[3, 3] = 0
    found = packed.normals(depth, camera).astype(np.float32)
    np.testing.assert_allclose(found[10:20, 12:28], np.broadcast_to(normal, (10, 16, 3)), atol=5e-3)
    assert not found[:8, :8].any() and found[8, 8].any()  # an invalid depth in the window


def test_a_thin_line_survives_the_downscaling():
    edge = np.zeros((8, 8, 1), np.uint8)
    edge[:, 2] = edge[:, 5] = 1
    tasks = tuple(task for task in from_config(nyud_config.get_config("tiny")) if task.name == "edge")
    reduced = packing.small({"image": np.zeros((8, 8, 3), np.uint8), "edge": edge, "id": ""}, tasks, 0.5)
    assert reduced["edge"][..., 0].tolist() == [[0, 1, 1, 0]] * 4


def test_batches_are_the_input_pipelines(folder, facts, monkeypatch):
    config = config_of(facts)
    config.num_steps = 4
    frames = packed.Frames(folder, "train", facts["splits"]["train"])
    monkeypatch.setattr(pipeline, "open_source", lambda *_: frames)
    theirs = pipeline.train_batches(config, from_config(config))
    with contextlib.closing(feeding.Feeder(folder, facts["splits"]["train"], config, 1)) as feeder:
        ours = list(feeding.one_ahead(feeder.batches(config)))
        left = feeding.one_ahead(feeder.batches(config))
        next(left)
        left.close()  # a run that is stopped leaves the feeder to the next one
        again = next(feeder.batches(config))
    assert len(ours) == 4
    for batch, other in zip(ours, theirs, strict=False):
        assert batch.keys() == other.keys() - {"id"}
        for name, array in batch.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)
    np.testing.assert_array_equal(again["image"], ours[0]["image"])


def test_evaluation_batches_are_the_input_pipelines(folder, facts, monkeypatch):
    config = config_of(facts)
    frames = packed.Frames(folder, "val", facts["splits"]["val"])
    monkeypatch.setattr(pipeline, "open_source", lambda *_: frames)
    theirs = list(pipeline.eval_batches(config, from_config(config), batch_size=2))
    ours = running.evaluation_batches(folder, facts["splits"]["val"], config)
    assert len(ours) == len(theirs) == 2
    for batch, other in zip(ours, theirs, strict=True):
        for name in other:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


REHEARSAL = """
import sys
for name in ("tensorflow", "tensorflow_datasets"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
from benchmarks import device_ladder
common = ["run", f"--data={sys.argv[1]}", f"--output={sys.argv[2]}", "--device=cpu", "--workers=1", "--variant=tiny"]
common += ["--batch_size=2", "--epochs=2", "--evaluations=2", "--commit=abc", "--rungs", "static", "full", "--fields"]
common += ["model.depth=1", "model.taps=1", "model.experts=2"]
if __name__ == "__main__":
    for seeds in (["0"], ["0", "1"]):
        assert device_ladder.main([*common, "--seeds", *seeds]) == 0
"""


@pytest.mark.slow  # two programs of two rungs, and processes that import JAX
def test_rehearsal_trains_and_a_second_call_goes_on(folder, tmp_path):
    (tmp_path / "rehearse.py").write_text(REHEARSAL)
    output = tmp_path / "ladder.json"
    command = [sys.executable, str(tmp_path / "rehearse.py"), str(folder / "packed.zip"), str(output)]
    environment = xla.environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = report.read(output)
    assert [(run["rung"], run["seed"], run["status"]) for run in content["trainings"]] == [
        ("static", 0, "finished"),
        ("full", 0, "finished"),
        ("static", 1, "finished"),
        ("full", 1, "finished"),
    ]
    assert content["not_run"] == [] and [call["commit"] for call in content["calls"]] == ["abc", "abc"]
    first, *others = content["trainings"]
    assert first["steps"] == 5 and [each["step"] for each in first["evaluations"]] == [3, 5]  # 5 frames, twice, by 2
    assert [each["step"] for each in first["curve"]] == [1, 2, 3, 4, 5]
    assert first["metrics"]["semseg/mIoU"] >= 0 and first["images_per_s"] > 0
    assert first["curve"][0]["loss"] != others[1]["curve"][0]["loss"]  # another seed
    assert content["rungs"]["full"]["parameters"] > content["rungs"]["static"]["parameters"]
    assert content["differences"]["full"]["seeds"] == [0, 1]
    assert "| full" in done.stdout and "± " in done.stdout and "Differences to static" in done.stdout
    assert device_ladder.main(["table", str(output)]) == 0


# --- what is trained, and what is not ---


def record(rung, seed, status="finished", **facts):
    published = {"semseg": {"metric": "mIoU", "value": 10.0 + seed + len(rung)}}
    return {
        "rung": rung,
        "seed": seed,
        "status": status,
        "published": published,
        "device": "x",
        "curve": [{"step": 1, "loss": 2.0, "loss/semseg": 2.0}],
        **facts,
    }


class _FakeRung:
    """Takes no time to compile, and 100 seconds a run."""

    now = 0.0

    compile_seconds = 0.0

    def __init__(self, *_):
        self.size = type("Size", (), {"total_parameters": 1, "total_multiply_adds": 2})()

    def train(self, seed, feeder, batches, evaluations, ends, wrote):
        _FakeRung.now += 100.0
        found = {"status": "finished", "images_per_s": 5.0, "steps": 1}
        return {**found, "curve": [], "published": {"semseg": {"metric": "mIoU", "value": 1.0 + seed}}}


def call(path, plan, seconds, monkeypatch):
    monkeypatch.setattr(running, "Rung", _FakeRung)
    content = report.opened(path, {}, {})
    content["calls"].append({"device": "x", "started": "now", "commit": "abc"})
    configs = dict.fromkeys(rung for rung, _ in plan)
    settings = Settings()
    monkeypatch.setattr(time, "monotonic", lambda: _FakeRung.now)
    ends = _FakeRung.now + seconds
    no_feeder: Any = None
    running._Call(path, content, settings, configs, no_feeder, [{}], ends).train([running.Planned(*p) for p in plan])
    return json.loads(path.read_text())


def test_a_run_that_would_not_end_in_time_is_not_started(tmp_path, monkeypatch, capsys):
    plan = [("static", 0), ("full", 0), ("static", 1), ("full", 1)]
    content = call(tmp_path / "ladder.json", plan, 300.0, monkeypatch)
    assert [(run["rung"], run["seed"]) for run in content["trainings"]] == plan[:2]
    assert content["not_run"] == [{"rung": "static", "seed": 1}, {"rung": "full", "seed": 1}]
    assert "static, seed 1: not started" in capsys.readouterr().out


def test_only_finished_runs_are_kept(tmp_path):
    path = tmp_path / "ladder.json"
    content = report.opened(path, {"epochs": 1}, {"fingerprint": "a"})
    content["trainings"] = [
        record("static", 0, curve=[]),
        record("full", 0, "stopped", reason="no time"),
        {**record("full", 1), "status": "running"},
    ]
    report.write(path, content)
    again = report.opened(path, {"epochs": 1}, {"fingerprint": "a"})
    assert [(run["rung"], run["seed"]) for run in again["trainings"]] == [("static", 0)]
    with pytest.raises(UserError, match="has runs with epochs 1, not 2: choose another --output"):
        report.opened(path, {"epochs": 2}, {"fingerprint": "a"})
    with pytest.raises(UserError, match="has runs with fingerprint 'a', not 'b'"):
        report.opened(path, {"epochs": 1}, {"fingerprint": "b"})


def test_tables_compare_within_seeds():
    content = {"calls": [{"device": "x", "started": "now", "commit": "abc"}], "rungs": {}}
    content["trainings"] = [record("static", 0), record("full", 0), record("static", 1), record("full", 1)]
    assert [(found.rung, found.seed) for found in report.finished(content)] == [
        ("static", 0),
        ("static", 1),
        ("full", 0),
        ("full", 1),
    ]
    assert seeds.differences(report.finished(content), "static")["full"]["mean"]["semseg/mIoU"] == -2.0
    assert report.finished(content)[0].losses == {"step": [1], "semseg": [2.0]}
    assert "x, now, commit abc" in report.text(content)


def test_wrong_input_is_one_line(tmp_path, facts, capsys):
    assert device_ladder.main(["run", f"--data={tmp_path / 'none.zip'}", f"--output={tmp_path / 'a.json'}"]) == 2
    assert "none.zip is missing: write it with" in capsys.readouterr().err
    (tmp_path / "other.zip").write_text("x")
    with pytest.raises(UserError, match="is no packed file"):
        packed.facts(tmp_path / "other.zip")
    with pytest.raises(UserError, match="unknown rung 'fool'"):
        Settings().config("fool", facts)
    with pytest.raises(UserError, match=r"--fields model\.nothing=1: give FIELD=VALUE"):
        Settings(fields=("model.nothing=1",)).config("full", facts)
    with pytest.raises(UserError, match=r"a.json is missing; .* writes it"):
        report.read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0.0), ("epochs", float("nan")), ("batch_size", 0), ("evaluations", 0), ("warmup_epochs", -1.0)],
)
def test_settings_without_a_step_are_refused(facts, field, value):
    with pytest.raises(UserError, match=f"--{field}={value}: give"):
        Settings(**{field: value}).config("full", facts)


def test_a_damaged_ladder_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "ladder.json"
    content = report.opened(path, {}, {})
    for name, value in {"trainings": [{"rung": "full", "seed": 0}], "calls": [1], "rungs": {"full": 2}}.items():
        path.write_text(json.dumps({**content, name: value}))
        assert device_ladder.main(["table", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is no ladder's JSON" in line and name in line


def test_a_device_that_is_not_there_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "absent_device", lambda: "no such device")
    assert device_ladder.main(["run", f"--data={tmp_path}", f"--output={tmp_path / 'a.json'}"]) == 2
    assert capsys.readouterr().err == "error: no such device\n"


@pytest.mark.parametrize("flag", ["--minutes=nan", "--minutes=0", "--workers=0"])
def test_limits_of_no_use_are_refused(flag, tmp_path, capsys):
    assert device_ladder.main(["run", f"--output={tmp_path / 'ladder.json'}", flag]) == 2
    assert "give numbers above 0" in capsys.readouterr().err
