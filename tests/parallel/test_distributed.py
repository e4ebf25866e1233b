"""Two real processes, four simulated devices each: they compute what one computes, resume, and end together."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from configs import demo
from input_pipeline import pipeline
from taskexpert_jax import storage, train
from taskexpert_jax.runs import sealing
from taskexpert_jax.tasks import from_config
from tests.parallel.two_processes import said, statuses, two_processes

STEPS = 16
SCENES = 11  # of evaluation, in batches of 8: the last one is filled up, in parts that lie in both processes

CHANGES = {
    "tasks": ("semseg", "depth"),
    "num_steps": STEPS,
    "batch_size": 8,
    "model.depth": 2,
    "model.taps": 2,
    "model.experts": 2,
    "model.width": 16,
    "model.feature_width": 8,
    "model.gate.width": 8,
    "model.drop_path": 0.3,
    "dataset.val_scenes": SCENES,
    "optimizer.learning_rate": 1e-3,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.slices": 2,  # each process is one
    "eval.batch_size": 8,
    "eval.every_steps": STEPS // 2,
    "checkpoint.every_steps": 4,
    "log.every_steps": 1,
    "log.images": 1,
}
CONFIG = "--config=configs/demo.py:tiny"
FLAGS = [f"--config.{field}={value}" for field, value in CHANGES.items()]


def scalars(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The run in this process on its eight devices: (workdir, what was compiled until each report, jitted step)."""
    config = demo.get_config("tiny")
    config.update_from_flattened_dict(CHANGES)
    tasks, workdir = from_config(config), tmp_path_factory.mktemp("one") / "run"
    compiled, until, steps = [], {}, []

    def listen(event, _seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    write, make_train_step = train.Reports.write, train.make_train_step

    def counting_write(self, step, tally):
        until[step] = tuple(compiled)
        return write(self, step, tally)

    def kept_step(*arguments):
        steps.append(make_train_step(*arguments))
        return steps[-1]

    jax.monitoring.register_event_duration_secs_listener(listen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Reports, "write", counting_write)
        patch.setattr(train, "make_train_step", kept_step)
        pipeline.record_fingerprint(config)
        train.train(
            config,
            workdir,
            lambda start: pipeline.train_batches(config, tasks, start_step=start),
            lambda: pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size),
        )
    jax.monitoring.unregister_event_duration_listener(listen)
    until["end"] = tuple(compiled)
    return workdir, until, steps[0]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The run of two processes, told to stop after its first checkpoint and started again: (workdir, log folder)."""
    folder = tmp_path_factory.mktemp("two")
    workdir = folder / "run"
    command = ["main.py", CONFIG, f"--workdir={workdir}", *FLAGS]
    with two_processes(folder / "stopped", *command, "--preempted_status=143") as started:
        deadline = time.monotonic() + 280
        while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
            assert all(process.poll() is None for process in started), said(folder / "stopped")
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started[1].send_signal(signal.SIGTERM)  # it is enough that one is told
        assert [process.wait(timeout=280) for process in started] == [143, 143], said(folder / "stopped")
    assert statuses(folder / "resumed", *command, "--preempted_status=143") == [0, 0], said(folder / "resumed")
    return workdir, folder


@pytest.fixture(scope="module")
def in_bucket(session_bucket, tmp_path_factory):
    """The run of two processes in a bucket, both killed after the first checkpoint and started again: its workdir."""
    folder = tmp_path_factory.mktemp("bucket")
    workdir = storage.path(session_bucket) / "distributed"
    command = ["main.py", CONFIG, f"--workdir={workdir}", *FLAGS]
    with two_processes(folder / "killed", *command) as started:
        deadline = time.monotonic() + 280
        while not list(workdir.glob(f"checkpoints/*/{sealing.MANIFEST}")):
            assert all(process.poll() is None for process in started), said(folder / "killed")
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "trained to" not in said(folder / "killed")[0]
    assert statuses(folder / "resumed", *command) == [0, 0], said(folder / "resumed")
    assert re.search(rf"resumed {workdir} at step \d+ of {STEPS}", said(folder / "resumed")[0])
    return workdir


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_run_compiles_nothing_twice(one_process):
    """After two steps nothing but what the first checkpoint (after 4) and the first evaluation (after 8) need."""
    _, until, step = one_process
    assert step._cache_size() == 1
    for first, last in ((2, 4), (5, 8), (9, "end")):  # step 2 is reported when step 3 is under way
        assert until[last][len(until[first]) :] == ()
    assert len(until[2]) > 0


def assert_same_logs(found, expected):
    """Asserts that a run's scalars are those of another one."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert len([line for line in found if "train/loss" in line]) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"time", "train/images_per_second"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{name} at {ours['step']}")


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_processes_stopped_and_resumed_log_what_one_logs(one_process, resumed):
    assert_same_logs(scalars(resumed[0]), scalars(one_process[0]))


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_processes_killed_and_resumed_in_a_bucket_log_what_one_logs(one_process, in_bucket):
    assert_same_logs(scalars(in_bucket), scalars(one_process[0]))
    files = storage.listed(in_bucket)
    assert json.loads((in_bucket / ".lease").read_text())["ended"]
    assert not [name for name in files if name.startswith((".shared", ".now"))]
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} >= {"12", "16"}


@pytest.mark.slow
@pytest.mark.multidevice
def test_all_save_and_end_when_one_is_told_to_stop(resumed):
    _, folder = resumed
    first, second = said(folder / "stopped")
    saved = re.search(rf"saved step (\d+) of {STEPS}", first)
    assert saved and "trained to" not in first and second == ""
    assert re.search(rf"resumed .* at step {saved[1]} of {STEPS}", said(folder / "resumed")[0])


@pytest.mark.slow
@pytest.mark.multidevice
def test_one_process_speaks_and_writes(resumed):
    workdir, folder = resumed
    first, second = said(folder / "resumed")
    assert re.search(rf"resumed {workdir} at step \d+ of {STEPS}", first) and "trained to step" in first
    assert second == ""
    events = [path for path in workdir.iterdir() if path.name.startswith("events.")]
    assert len(events) == 2  # of the stopped run and the last one, not of two processes each
    assert any(b"prediction/0" in path.read_bytes() for path in events)
    assert not list(workdir.glob(".shared*"))


@pytest.mark.slow
@pytest.mark.multidevice
def test_all_evaluate_and_each_example_counts_once_where_both_hold_all(one_process, in_bucket, tmp_path):
    """On a mesh whose one part of the batch lies on the devices of both processes."""
    workdir, folder = in_bucket, tmp_path
    sizes = {"data": 1, "fsdp": 1, "tensor": 8, "slices": 1}  # tensor does not span slices
    changed = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
    command = ["main.py", "--mode=evaluate", "--checkpoint=latest", CONFIG, f"--workdir={workdir}", *FLAGS, *changed]
    assert statuses(folder / "evaluated", *command) == [0, 0], said(folder / "evaluated")
    report = json.loads((workdir / "evaluation" / "metrics.json").read_text())
    assert report["examples"] == SCENES
    (*_, last) = [line for line in scalars(one_process[0]) if "eval/depth/rmse" in line]
    for name, value in report["metrics"].items():
        np.testing.assert_allclose(value, last[f"eval/{name}"], rtol=1e-4, err_msg=name)
