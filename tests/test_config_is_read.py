"""Every config field is read by the programs: a small run's training, evaluation and prediction are watched."""

import contextlib
import gzip
import json

from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from benchmarks import profile_scopes
from configs import demo, folder
from input_pipeline import pipeline
from taskexpert_jax import evaluate, predict, train
from taskexpert_jax.config import flat
from taskexpert_jax.config.balancing_fields import METHODS
from taskexpert_jax.config.model_fields import DECODERS
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import balancing


class Recorded(ConfigDict):
    """A config that notes the full name of each field that is read on its own, not as one of all."""

    def __init__(self, of, seen=None, prefix=""):
        super().__init__()
        for name, value in {"_seen": set() if seen is None else seen, "_prefix": prefix, "_in_bulk": False}.items():
            object.__setattr__(self, name, value)
        for name, value in of.items():
            group = isinstance(value, ConfigDict)
            self._fields[name] = Recorded(value, self._seen, f"{prefix}{name}.") if group else value

    def __getitem__(self, key):
        if not self._in_bulk:
            self._seen.add(f"{self._prefix}{key}")
        return super().__getitem__(key)

    @contextlib.contextmanager
    def in_bulk(self):
        object.__setattr__(self, "_in_bulk", True)
        yield
        object.__setattr__(self, "_in_bulk", False)

    def items(self, preserve_field_references=False):
        with self.in_bulk():
            return super().items(preserve_field_references)

    def to_dict(self, visit_map=None, preserve_field_references=False):
        return {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in self.items()}

    def to_json_best_effort(self, *args, **kwargs):
        return ConfigDict(self.to_dict()).to_json_best_effort(*args, **kwargs)

    def copy_and_resolve_references(self, visit_map=None):
        return Recorded(self, self._seen, self._prefix)


def test_the_recording_config_notes_single_reads_alone():
    recorded = Recorded(ConfigDict({"a": 1, "b": {"c": 2, "d": 3}}))
    assert recorded.to_dict() == dict(recorded.items()) | {"b": {"c": 2, "d": 3}}
    assert recorded._seen == set()
    assert (recorded.b.copy_and_resolve_references().d, recorded["a"]) == (3, 1)
    assert recorded._seen == {"a", "b", "b.d"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the demo in small, evaluated and used: (its directory, the fields, those that were read)."""
    workdir = tmp_path_factory.mktemp("run")
    config = demo.get_config("tiny")
    config.tasks = ("semseg", "edge")
    config.dataset.train_scenes, config.dataset.val_scenes = 8, 2
    config.batch_size = config.eval.batch_size = 8
    config.num_steps = 2
    config.eval.every_steps = config.checkpoint.every_steps = config.log.every_steps = 0
    config.profile.first_step = 2
    config.loss_weights = ConfigDict({name: config.loss_weights[name] for name in config.tasks})
    recorded, fields = Recorded(config), dict(flat(config))
    tasks = from_config(recorded)

    def eval_batches():
        return pipeline.eval_batches(recorded, tasks, batch_size=recorded.eval.batch_size)

    with pytest.MonkeyPatch.context() as patch:
        for program in (train, evaluate, predict):  # the check reads all fields, and computes nothing
            patch.setattr(program, "check", lambda config: None)
        pipeline.record_fingerprint(recorded)
        train.train(
            recorded,
            workdir,
            lambda start: pipeline.train_batches(recorded, tasks, start_step=start),
            eval_batches,
        )
        evaluate.evaluate(recorded, workdir, "best", eval_batches)
        Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(workdir / "image.png")
        predict.predict(recorded, workdir, "best", workdir / "image.png", workdir / "predictions")
    return workdir, fields, recorded._seen


def test_every_0_steps_is_only_at_the_end(run):
    workdir, _, _ = run
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "train/loss" in line) for line in lines] == [(2, True), (2, False)]
    assert [path.name for path in (workdir / "checkpoints").glob("[0-9]*")] == ["2"]


def test_the_profile_of_a_run_has_its_step(run):
    workdir, _, _ = run
    (path,) = workdir.glob("plugins/profile/steps_00000002-00000002/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["2"]
    assert "jit_step" in {event["args"].get("hlo_module") for event in events if "args" in event}
    host = {"waiting for the next batch", "reporting", "evaluating", "saving"}  # the step is the last
    assert host <= {event.get("name") for event in events}
    shares = profile_scopes.shares(profile_scopes.newest(workdir))
    assert {"backbone, the rest", "experts", "gates", "memory", "heads", "losses", "optimizer"} <= shares.keys()
    assert shares[profile_scopes.OTHER] < sum(shares.values()) / 3


def test_a_run_reads_every_field(run):
    _, fields, read = run
    of_methods = {name for fields in METHODS.values() for name in fields}
    of_decoders = {name for decoder in DECODERS.keys() - {"taskexpert"} for name in DECODERS[decoder]}
    assert of_methods | of_decoders <= fields.keys()
    # Of a backbone that was trained before; of the balancing methods and of the decoders that are not chosen: below.
    assert sorted(fields.keys() - of_methods - of_decoders - read) == ["model.pretrained_fresh"]


@pytest.mark.parametrize("method", METHODS)
def test_a_balancing_method_reads_its_fields(method):
    recorded = Recorded(demo.get_config("tiny"))
    recorded.balancing = method
    balancing.from_config(recorded, from_config(recorded))
    assert METHODS[method].keys() <= recorded._seen


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_reads_its_fields(decoder):
    recorded = Recorded(demo.get_config("tiny"))
    recorded.model.decoder = decoder
    taskexpert.from_config(recorded, from_config(recorded))
    assert DECODERS[decoder].keys() <= recorded._seen


def test_the_fields_of_a_folder_and_of_a_pretrained_backbone_are_read(run, tmp_path):
    workdir, _, _ = run
    for name in ("images", "semseg"):
        (tmp_path / name).mkdir()
        shape = (32, 48, 3) if name == "images" else (32, 48)
        Image.fromarray(np.ones(shape, np.uint8)).save(tmp_path / name / "a.png")
    for split in ("train", "val"):
        (tmp_path / f"{split}.txt").write_text("a\n")
    config = folder.get_config("tiny")
    config.dataset.data_dir = str(tmp_path)
    config.dataset.semseg_classes = ("road", "grass")
    config.dataset.image_size = (32, 48)
    config.model.patch_size = 8
    config.model.pretrained, config.model.pretrained_fresh = str(workdir), ".*pos.*"
    config.eval.image_size = (32, 64)
    recorded = Recorded(config)
    tasks = from_config(recorded)
    pipeline.record_fingerprint(recorded)
    next(pipeline.train_batches(recorded, tasks))
    next(pipeline.eval_batches(recorded, tasks, batch_size=1))
    weights = pretrained.read(recorded, taskexpert.from_config(recorded, tasks))
    assert not any("pos" in name for name in weights.arrays)
    expected = {name for name in dict(flat(config)) if name.startswith("dataset.")} | {"model.pretrained_fresh"}
    assert expected - recorded._seen == set()
