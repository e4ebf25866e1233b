"""Two real processes, four simulated devices each: they compute what one computes, resume, and end together."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import demo
from input_pipeline import pipeline
from taskexpert_jax import installation, storage, train
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import agreement, connection, distributed
from taskexpert_jax.runs import sealing
from taskexpert_jax.tasks import from_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
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


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def two_processes(folder, *command):
    """Starts `python *command` as both processes of a group; whatever happens, neither outlives the body."""
    folder.mkdir(parents=True, exist_ok=True)
    # Compiled in half the time; what is computed stays the same.
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {fast}", "PYTHONPATH": str(ROOT)}
    group = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    with contextlib.ExitStack() as stack:
        started = []
        for index in range(2):
            out, err = (stack.enter_context((folder / f"{index}.{end}").open("w")) for end in ("out", "err"))
            own = [part.replace("INDEX", str(index)) for part in command]
            arguments = [sys.executable, *own, *group, f"--process_id={index}"]
            started.append(subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=out, stderr=err))
        try:
            yield started
        finally:
            for process in started:
                process.kill()
                process.wait()


def statuses(folder, *command):
    """Exit statuses of both processes; what they said lies in the folder."""
    with two_processes(folder, *command) as started:
        return [process.wait(timeout=280) for process in started]


def said(folder, end="err"):
    """Output of each process."""
    return [(folder / f"{index}.{end}").read_text().rstrip("\n") for index in range(2)]


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


def same_logs(found, expected):
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
    same_logs(scalars(resumed[0]), scalars(one_process[0]))


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_processes_killed_and_resumed_in_a_bucket_log_what_one_logs(one_process, in_bucket):
    same_logs(scalars(in_bucket), scalars(one_process[0]))
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


# --- how a group is found ---


@pytest.mark.parametrize(
    ("env", "flags", "expected"),
    [
        ({}, (None, None, None), None),
        ({}, ("a:1", 2, 0), ("a:1", 2, 0)),
        (
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            (None, None, None),
            ("b:2", 3, 2),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "b:2"}, ("a:1", 2, 1), ("a:1", 2, 1)),
    ],
)
def test_flags_come_before_the_environment(env, flags, expected):
    assert distributed.named_group(env, distributed.Wanted(*flags)) == expected


@pytest.mark.parametrize(
    ("env", "flags", "message"),
    [
        ({}, ("a:1", None, 0), r"--num_processes is missing"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, (None,) * 3, r"JAX_NUM_PROCESSES, JAX_PROCESS_ID is missing"),
        ({}, ("a", 2, 0), r"--coordinator=a\b.*HOST:PORT"),
        ({}, ("a:1", 2, 2), r"--process_id=2\b.*\b1$"),
    ],
)
def test_what_is_incomplete_is_named(env, flags, message):
    with pytest.raises(UserError, match=message):
        distributed.named_group(env, distributed.Wanted(*flags))


def test_srun_is_told_from_the_batch_script_around_it():
    assert distributed.is_slurm_step({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"})
    assert not distributed.is_slurm_step({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"})


@pytest.fixture
def start_with(monkeypatch):
    """Calls `start` with flags and JAX's part replaced by a function."""

    def start(initialize, coordinator=None, count=None, index=None, seconds=7):
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        monkeypatch.setattr(distributed.connection, "watched", contextlib.nullcontext)
        return distributed.start(distributed.Wanted(coordinator, count, index, seconds))

    return start


@pytest.mark.parametrize(
    ("index", "reason", "line"),
    [
        (0, "std::bad_cast", "not all of 2 processes came to process 0 at 127.0.0.1:9 within --connect_timeout=7 s: "),
        (1, "std::bad_cast", "process 1 did not find process 0 and all others at 127.0.0.1:9 within "),
        (0, "Failed to start RPC server", "process 0 cannot listen at 127.0.0.1:9: another program does already; "),
    ],
)
def test_processes_that_do_not_find_each_other_say_what_to_check(index, reason, line, start_with, monkeypatch, capsys):
    def initialize(*arguments, **options):
        assert options["initialization_timeout"] == 7
        raise RuntimeError(reason)

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="2"):
        start_with(initialize, "127.0.0.1:9", 2, index)
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_an_unknown_host_is_named_at_once(start_with):
    with pytest.raises(UserError, match=r"^the host of process 0, 'no\.such\.host\.invalid', is not known here: "):
        start_with(None, "no.such.host.invalid:1", 2, 1)
    with pytest.raises(UserError, match=r"^the host of process 0, 'two\.\.dots', is not known here: this is no name"):
        start_with(None, "two..dots:1", 2, 1)


def test_an_address_of_ipv6_in_brackets_is_known(start_with):
    calls = []
    start_with(lambda **named: calls.append(named), "[::1]:1234", 2, 1)
    assert [named["coordinator_address"] for named in calls] == ["[::1]:1234"]


def test_under_srun_jax_finds_the_group(start_with, monkeypatch):
    calls = []
    for name, value in {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    start_with(lambda *args, **named: calls.append((args, named)))
    assert calls == [((), {"initialization_timeout": 7})]
    with pytest.raises(UserError, match=r"^--mode=predict runs in one process"):
        distributed.refuse_several("predict", distributed.Wanted())


# --- how it ends ---

FAILING = """
import os, pathlib, sys
from absl import app, flags
import jax
from configs import demo
from taskexpert_jax import command_line, storage
from taskexpert_jax.parallel import agreement, distributed, processes
from taskexpert_jax.errors import UserError

flags.DEFINE_string("coordinator", None, "")
flags.DEFINE_integer("num_processes", None, "")
flags.DEFINE_integer("process_id", None, "")

def main(argv):
    how, workdir = argv[1:]
    command_line.configure_logging()
    given = flags.FLAGS
    with distributed.joined(distributed.Wanted(given.coordinator, given.num_processes, given.process_id)):
        print("started")
        if how == "different":
            config = demo.get_config("tiny")
            config.batch_size += jax.process_index()
            config.dataset.data_dir = workdir + str(jax.process_index())  # hosts have disks of their own
            agreement.refuse_other_programs(config, 100, mode="train", checkpoint=f"{jax.process_index()}")
        agreement.refuse_unshared(storage.path(workdir))
        if jax.process_index() == 1 and how == "user":
            raise UserError("frame 7 is broken")
        if jax.process_index() == 0 and how == "fault":
            raise ValueError("a fault")
        if how == f"killed {jax.process_index()}":
            processes.gather("the other is there")
            os.kill(os.getpid(), 9)
        for _ in range(2):
            processes.gather("waiting for the other")

app.run(main)
"""


def ending(folder, how, workdir):
    program = folder / "program.py"
    program.write_text(FAILING)
    started = time.monotonic()
    codes = statuses(folder, str(program), how, str(workdir))
    assert time.monotonic() - started < 100  # before JAX itself would notice
    return codes, said(folder), said(folder, "out")


@pytest.mark.slow
def test_one_process_that_fails_ends_the_others(tmp_path):
    codes, errors, spoken = ending(tmp_path, "user", tmp_path)
    assert codes == [2, 2]
    assert re.fullmatch(r"error: frame 7 is broken \(process 1 on .*\)", errors[0])
    assert errors[1] == "error: frame 7 is broken"
    assert (spoken[0].splitlines()[0], spoken[1]) == ("started", "")  # JAX's transport prints too


@pytest.mark.slow
def test_a_fault_ends_the_others_too(tmp_path):
    codes, errors, _ = ending(tmp_path, "fault", tmp_path)
    assert codes == [1, 1]
    assert "Traceback" in errors[0] and "ValueError: a fault" in errors[0]
    assert re.fullmatch(r"error: ValueError: a fault \(process 0 on .*\)", errors[1])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_process_that_is_killed_ends_the_other_with_a_line(killed, tmp_path):
    codes, errors, _ = ending(tmp_path, f"killed {killed}", tmp_path)
    assert (codes[killed], codes[1 - killed]) == (-9, 1)
    assert errors[1 - killed].splitlines()[-1] == f"error: {connection.LOST}"
    assert "stack trace" not in errors[1 - killed] and "Thread 0x" not in errors[1 - killed]


@pytest.mark.slow
def test_processes_of_different_commands_are_refused_by_all(tmp_path):
    codes, errors, _ = ending(tmp_path, "different", tmp_path)
    assert codes == [2, 2]
    for text in errors:
        assert re.fullmatch(
            "error: the processes are not one program: --checkpoint is '0' in process 0 and '1' in process 1 on .*; "
            "config.batch_size is 4 in process 0 and 5 in process 1 on .*; start all with the same .*",
            text,
        )


def test_differences_name_what_is_absent_or_of_another_type():
    facts = [{"a": 1, "b": [1, 2], "c": 1}, {"a": 1, "b": [1, 3], "d": None}, {"a": 1.0, "b": [1, 2], "c": 1}]
    assert list(agreement.differences([(f"host{index}", each) for index, each in enumerate(facts)])) == [
        "b is [1, 2] in process 0 and [1, 3] in process 1 on host1",
        "c is 1 in process 0 and absent in process 1 on host1",
        "d is absent in process 0 and None in process 1 on host1",
    ]


def test_the_code_of_both_packages_counts(tmp_path, monkeypatch):
    names = ("taskexpert_jax/a.py", "input_pipeline/b.py")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "taskexpert_jax")
    seen = {agreement.code()}
    for name in names:
        (tmp_path / name).write_text("2")
        seen.add(agreement.code())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer [::1]:1", connection.LOST),
        ("UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out", connection.LATE),
        ("RESOURCE_EXHAUSTED: out of memory", None),
    ],
)
def test_an_error_of_a_lost_process_is_told_from_others(text, line):
    assert connection.loss(jax.errors.JaxRuntimeError(text)) == line
    assert connection.loss(ValueError(text)) is None


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused_by_all(tmp_path):
    for index in range(2):
        (tmp_path / str(index)).mkdir()
    codes, errors, _ = ending(tmp_path, "none", tmp_path / "INDEX" / "run")
    assert codes == [2, 2]
    for text in errors:
        assert re.match(
            r"error: --workdir=.* is not shared: process 1 on \S+ does not see what process 0 writes there; ", text
        )
        assert len(text.splitlines()) == 1
    assert [list((tmp_path / str(index)).iterdir()) for index in range(2)] == [[], []]
