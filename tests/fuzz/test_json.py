"""JSON of runs and data sets, mutated: a result or one line."""

import json
import pathlib
import shutil
from types import SimpleNamespace
from typing import Any, ClassVar
import zlib

from absl import logging
import numpy as np
import tensorflow_datasets as tfds

from configs import demo
from input_pipeline import records
from taskexpert_jax import compare, json_file
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import sealing, writer
from tests.fuzz.leaks import Reader, leaks

FINGERPRINT = {"fingerprint": "abc"}
METRICS = {
    "examples": 654,
    "dataset": {"name": "nyud", "split": "val", **FINGERPRINT},
    "published": {"semseg": {"metric": "mIoU", "value": 40.5}, "depth": {"metric": "rmse", "value": None}},
}
LINES = [{"step": 1, "time": 1.5, "train/loss": 0.25}, {"step": 2, "time": 2.5, "eval/depth/rmse": float("nan")}]
SEALED = {"params/d/a": b"parameters", "metrics/metrics": b'{"semseg/mIoU": 40.5}'}


def _config(path: pathlib.Path) -> None:
    logging.set_verbosity(logging.ERROR)
    read_run(path.parent)


def _manifest(path: pathlib.Path) -> None:
    """Verifies a checkpoint whose manifest is mutated; a problem is a line."""
    for name, content in SEALED.items():
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_bytes(content)
    if problem := sealing.problem(path.parent) or "; ".join(sealing.unlisted(path.parent)):
        raise UserError(problem)


def _metrics_of_a_checkpoint(path: pathlib.Path) -> None:
    for value in json_file.read(path, json_file.Each(float)).values():
        _ = f"{value:.4g}"


def _metrics(path: pathlib.Path) -> None:
    compare.compare([path])


def _lines(path: pathlib.Path) -> None:
    logging.set_verbosity(logging.ERROR)
    writer._open_lines(path, 1, path.parent).close()


def _record(path: pathlib.Path) -> None:
    (path.parent / "dataset_info.json").touch()
    here: Any = SimpleNamespace(name=path.parent.name, folder=lambda: path.parent.name)
    records.fingerprint(here, str(path.parent.parent))


class _Builder(records.ArchiveBuilder):
    name: ClassVar[str] = "built"
    VERSION: ClassVar[tfds.core.Version] = tfds.core.Version("1.0.0")
    PARTS: ClassVar[dict[str, records.Part]] = {"image": records.Part("uint8", 3)}


def _build(folder: pathlib.Path) -> pathlib.Path:
    """Builds a data set of one example; returns its folder."""
    built = folder / _Builder.name / str(_Builder.VERSION)
    if not built.exists():
        built.mkdir(parents=True)
        builder = _Builder(built, ["train"])
        builder.add("train", {"id": "a", "image": np.zeros((2, 3, 3), np.uint8)})
        builder.close()
    return built


def _index(path: pathlib.Path) -> None:
    """Opens a data set whose index is mutated."""
    shutil.copy(path, _build(path.parent) / path.name)
    source = records.RecordSource(_Builder, str(path.parent), "train")
    source.load(len(source) - 1)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def test_mutated_json_gives_a_result_or_one_line(tmp_path: pathlib.Path) -> None:
    built = _build(tmp_path / "good")
    manifest = {name: (len(content), zlib.crc32(content)) for name, content in SEALED.items()}
    readers = [
        Reader(_config, "config.json", [_json(demo.get_config("tiny").to_dict())]),
        Reader(_manifest, "manifest.json", [_json(manifest)]),
        Reader(_metrics_of_a_checkpoint, "metrics", [SEALED["metrics/metrics"]], None, (json_file.MalformedError,)),
        Reader(_metrics, "metrics.json", [_json(METRICS)]),
        Reader(_lines, "metrics.jsonl", [b"".join(json.dumps(line).encode() + b"\n" for line in LINES)]),
        Reader(_record, "prepared.json", [_json(FINGERPRINT)]),
        *(Reader(_index, name, [(built / name).read_bytes()]) for name in ("dataset_info.json", "features.json")),
    ]
    (tmp_path / "leaks").mkdir()
    assert leaks(readers, tmp_path / "leaks") == []
