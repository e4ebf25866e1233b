"""Weights & Biases: what a run records there, and that W&B neither ends nor blocks a run.

The package is optional. Without it, the tests with a substitute for it run, and the others are skipped.
"""

import contextlib
import json
import struct
import sys
import types

from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import demo
from taskexpert_jax import train
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import wandb_writer
from taskexpert_jax.runs.writer import RunWriter


class Substitute(types.ModuleType):
    """A package `wandb` that notes what is called; `broken` names the calls that fail, each once."""

    def __init__(self, *broken, mode="online", key=True):
        super().__init__("wandb")
        self.calls, self.run, self._broken, self._key = [], None, list(broken), key
        self.Settings = types.SimpleNamespace
        self.Image = lambda image: ("image", image.shape)
        self.setup = lambda settings: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))

    def note(self, name, /, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        if name in self._broken:
            self._broken.remove(name)
            raise RuntimeError(f"no {name}\nand a second line")
        return self if name == "init" else None

    def login(self, prompt):
        self.note("login")
        return self._key and not prompt

    def __getattr__(self, name):
        if name == "url":
            return "https://example.com/run"
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.note(name, *args, **kwargs)

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def use(monkeypatch, wandb):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def write(workdir, *, resumed=False, project="team/rooms"):
    workdir.mkdir(exist_ok=True)
    writer = wandb_writer.WandbWriter(project, workdir, {"seed": 7}, resumed=resumed)
    writer.write_scalars(3, {"train/loss": 0.5})
    writer.write_images(3, {"prediction/0": np.zeros((4, 6, 3), np.uint8)})
    writer.close()


def test_scalars_and_images_have_the_runs_own_step(tmp_path, monkeypatch, capsys):
    wandb = use(monkeypatch, Substitute())
    write(tmp_path / "run")
    assert wandb.of("define_metric") == [
        (("step",), {"hidden": True}),
        (("*",), {"step_metric": "step", "step_sync": True}),
    ]
    assert wandb.of("log") == [
        (({"step": 3, "train/loss": 0.5},), {}),
        (({"step": 3, "prediction/0": ("image", (4, 6, 3))},), {}),
    ]
    assert wandb.of("finish") == [((), {"exit_code": 0})]
    (options,) = [kwargs for _, kwargs in wandb.of("init")]
    assert (options["entity"], options["project"], options["name"]) == ("team", "rooms", "run")
    assert (options["config"], options["dir"]) == ({"seed": 7}, str(tmp_path / "run"))
    assert capsys.readouterr().err == "W&B: https://example.com/run\n"


def test_a_resumed_run_continues_its_wandb_run_and_others_begin_one(tmp_path, monkeypatch):
    wandb = use(monkeypatch, Substitute())
    for resumed, project in ((False, "a"), (True, "a"), (True, "b"), (True, "b"), (False, "b")):
        write(tmp_path / "run", resumed=resumed, project=project)
    options = [kwargs for _, kwargs in wandb.of("init")]
    first, same, other, same_other, anew = (of["id"] for of in options)
    assert (first, other) == (same, same_other)
    assert len({first, other, anew}) == 3
    assert [of["name"] for of in options] == ["run", None, "run", None, "run"]  # a name that was changed there stays
    assert {of["resume"] for of in options} == {"allow"}
    (tmp_path / "run" / "wandb.json").write_text("{")
    write(tmp_path / "run", resumed=True, project="b")
    assert wandb.of("init")[-1][1]["id"] != anew


@pytest.mark.parametrize(
    ("wandb", "line", "ids"),
    [
        (Substitute(key=False), "not logged in, see `wandb login`; recorded offline", 1),
        (Substitute("login"), "no login; recorded offline", 1),
        (Substitute("init"), "no init; recorded offline", 2),
    ],
    ids=["no key", "no server", "no start"],
)
def test_what_cannot_be_online_is_recorded_offline(tmp_path, monkeypatch, capsys, wandb, line, ids):
    use(monkeypatch, wandb)
    write(tmp_path / "run")
    assert len({kwargs["id"] for _, kwargs in wandb.of("init")}) == 1 and len(wandb.of("init")) == ids
    assert wandb.of("init")[-1][1]["mode"] == "offline"
    assert len(wandb.of("log")) == 2
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: W&B: {line}")


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (("init", "init"), "W&B: no init; the run goes on without it"),
        (("define_metric",), "W&B: no define_metric; the run goes on without it"),
        (("log",), "W&B: no log; the run goes on without it"),
        (("finish",), "W&B: no finish; not everything was uploaded: `wandb sync --include-online "),
    ],
)
def test_an_error_of_wandb_is_one_line_and_the_last_one(tmp_path, monkeypatch, capsys, broken, line):
    wandb = use(monkeypatch, Substitute(*broken))
    write(tmp_path / "run")
    assert f"warning: {line}" in capsys.readouterr().err.splitlines()[-1]
    assert [name for name, _, _ in wandb.calls][-1] == broken[0]


def test_a_run_that_an_exception_ends_has_failed(tmp_path, monkeypatch):
    wandb = use(monkeypatch, Substitute())
    config = ConfigDict({"log": {"wandb": "rooms"}})
    with pytest.raises(ZeroDivisionError), contextlib.closing(RunWriter(config, tmp_path, 0)):
        raise ZeroDivisionError
    assert wandb.of("finish") == [((), {"exit_code": 1})]


def test_without_the_package_nothing_is_made(tmp_path, monkeypatch):
    config = demo.get_config("tiny")
    config.log.wandb = "rooms"
    for absent in (None, types.ModuleType("wandb")):  # a folder of that name is a module without contents
        monkeypatch.setitem(sys.modules, "wandb", absent)
        with pytest.raises(UserError, match=r'needs the package wandb: pip install "taskexpert-jax\[wandb\]"'):
            train.train(config, tmp_path / "run", lambda start: iter(()), lambda: ())
    assert not (tmp_path / "run").exists()


def test_other_processes_than_the_first_do_not_use_wandb(tmp_path, monkeypatch):
    wandb = use(monkeypatch, Substitute())
    writer = RunWriter(ConfigDict({"log": {"wandb": "rooms"}}), tmp_path, 0, active=False)
    writer.scalars(1, {"loss": 0.5})
    writer.close()
    assert wandb.calls == [] and list(tmp_path.iterdir()) == []


def records(path):
    """Records of a .wandb file, a log in LevelDB's form: blocks of 32 KiB, in them parts with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, found, parts = path.read_bytes(), [], b""
    assert content[:4] == b":W&B"
    at = 7
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no room for a part: the rest of the block is empty
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<4xHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def values(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_a_resumed_run_that_was_offline_is_one_run_on_disk(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason='W&B is optional: pip install "wandb>=0.31,<1"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = ConfigDict({"log": {"wandb": "team/rooms"}, "model": {"width": 32, "sizes": (1, 2)}})
    workdir = tmp_path / "run"
    workdir.mkdir()
    wandb.teardown()
    try:
        for first in (0, 20):
            writer = RunWriter(config, workdir, first)
            for step in (first + 10, first + 20):
                writer.scalars(step, {"train/loss": step / 8, "train/norm": float("nan")})
            writer.images(first + 20, {"prediction/0": np.full((4, 6, 3), 9, np.uint8)})
            writer.close()
    finally:
        wandb.teardown()
    run_id = json.loads((workdir / "wandb.json").read_text())["id"]
    rows, images = [], []
    for path in sorted((workdir / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")):
        of_file = records(path)
        (run,) = [record.run for record in of_file if record.WhichOneof("record_type") == "run"]
        assert (run.entity, run.project, run.run_id) == ("team", "rooms", run_id)
        assert values(run.config.update)["model"] == {"width": 32, "sizes": [1, 2]}
        history = [values(record.history.item) for record in of_file if record.HasField("history")]
        rows += [(row["step"], row["train/loss"]) for row in history if "train/loss" in row]
        images += [(row["step"], row["prediction/0.height"]) for row in history if "prediction/0.height" in row]
        (ended,) = [record.exit.exit_code for record in of_file if record.HasField("exit")]
        assert ended == 0
    assert rows == [(10, 1.25), (20, 2.5), (30, 3.75), (40, 5.0)]
    assert images == [(20, 4), (40, 4)]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == rows
