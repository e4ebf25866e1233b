"""Two real processes end together, whichever of them fails, is killed or differs."""

import re
import time

import jax
import pytest

from taskexpert_jax import installation
from taskexpert_jax.parallel import agreement, connection
from tests.parallel.two_processes import said, statuses

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
