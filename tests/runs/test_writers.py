"""metrics.jsonl of a run, and a full disk."""

import errno
import json
import logging
import math
import os
import pathlib
import threading

from ml_collections import ConfigDict
import pytest

from taskexpert_jax import storage
from taskexpert_jax.errors import UserError, disk_refusal
from taskexpert_jax.runs import manager
from taskexpert_jax.runs import writer as writers
from taskexpert_jax.runs.workdir import Locked

CONFIG = ConfigDict({"log": {"wandb": ""}})


def test_a_resumed_run_drops_the_lines_of_steps_that_it_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "cut in t')
    writer = writers.RunWriter(CONFIG, tmp_path, 2)
    writer.scalars(3, {"loss": 0.5, "eval/semseg/mIoU": math.nan})
    writer.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert (lines[-1]["loss"], lines[-1]["eval/semseg/mIoU"]) == (0.5, None)


def test_a_resumed_run_writes_no_line_twice(tmp_path):
    writer = writers.RunWriter(CONFIG, tmp_path, 0)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    writer = writers.RunWriter(CONFIG, tmp_path, 2)
    writer.scalars(3, {"loss": 30.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_lines_that_are_no_scalars_are_kept_elsewhere_and_stop_no_resume(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "loss": NaN}', b'{"step": 2}\r', b'{"step": 2, "x": 1e999}']
    bad = [b"text", b"\xff\xfe", b"\0\0\0", b'{"loss": 1}', b'{"step": "2"}', b'{"step": true}', b"[1]", b"[" * 100_000]
    path.write_bytes(b"\n".join([good[0], b"", *bad, *good[1:], b'{"step": 3}', b"no line of ours"]))
    writers.RunWriter(CONFIG, tmp_path, 2).close()
    assert path.read_bytes() == b"".join(line + b"\n" for line in good)
    aside = tmp_path / "damaged" / "metrics.jsonl"
    assert aside.read_bytes() == b"".join(line + b"\n" for line in [*bad, b"no line of ours"])
    start = f"warning: {path}: 9 damaged lines moved to {aside}, such as line 3: "
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(start)
    writers.RunWriter(CONFIG, tmp_path, 2).close()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_one_line_and_closing_says_no_more(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    full = pathlib.Path("/dev/full").open("w")  # noqa: SIM115 (the writer closes it)
    monkeypatch.setattr(writers, "_open_lines", lambda *_: full)
    writer = writers.RunWriter(CONFIG, tmp_path, 0)
    with pytest.raises(UserError, match=r"metrics.jsonl .*No space left on device"):
        writer.scalars(1, {"loss": 0.5})
    writer.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "No space left on device"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: a/b; No space left on\n\tFailed to flush 10 events"),
            "No space left on device",
        ),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (ValueError("NOT_FOUND: a/b"), None),
    ],
)
def test_only_what_a_disk_refuses_is_taken_for_that(error, reason):
    assert disk_refusal(error) == reason
    with pytest.raises(type(error) if reason is None else UserError), writers.writing(os.devnull):
        raise error


def test_what_libraries_log_of_a_refused_write_is_hidden_and_their_other_errors_are_not(tmp_path):
    def shown(error):
        record = logging.LogRecord("asyncio", logging.ERROR, "", 1, "never retrieved", (), (type(error), error, None))
        return bool(logging.getLogger("asyncio").filter(record))

    manager.for_listing(tmp_path).close()  # a manager installs the filter
    assert not shown(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert shown(ValueError("another"))


def test_lines_are_not_written_to_a_file_that_is_gone(tmp_path):
    writer = writers.RunWriter(CONFIG, tmp_path, 0)
    writer.scalars(1, {"loss": 0.5})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"metrics.jsonl has been deleted or replaced during the run, which ends here"):
        writer.scalars(2, {"loss": 0.5})
    writer.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_that_has_lost_its_workdir_reports_nothing_more(tmp_path, monkeypatch):
    def lost(self):
        raise UserError("run has been taken over")

    writer = writers.RunWriter(CONFIG, tmp_path, 0, hold=Locked())
    writer.scalars(1, {"loss": 1.0})
    monkeypatch.setattr(Locked, "check", lost)
    with pytest.raises(UserError, match="taken over"):
        writer.scalars(2, {"loss": 1.0})
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_lines_of_another_program_in_a_bucket_are_never_replaced(bucket):
    workdir = storage.path(bucket)
    path = workdir / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    writer = writers.RunWriter(CONFIG, workdir, 1)
    writer.scalars(2, {"loss": 1.0})
    writer.wait()
    assert [json.loads(line).get("loss") for line in path.read_text().splitlines()] == [None, 1.0]
    path.write_text("another's")
    refused = pytest.raises(UserError, match=r"^gs://.*/metrics.jsonl has been deleted or replaced during the run")
    with refused:
        writer.scalars(3, {"loss": 1.0})
        writer.wait()
    writer.close()
    assert path.read_text() == "another's"


def test_a_run_that_has_lost_its_bucket_sends_nothing_more(bucket):
    class Lost(Locked):
        def check(self):
            if threading.current_thread() is not threading.main_thread():  # found after the report was written
                raise UserError("run has been taken over")

    workdir = storage.path(bucket)
    writer = writers.RunWriter(CONFIG, workdir, 0, hold=Lost())
    writer.scalars(1, {"loss": 1.0})
    with pytest.raises(UserError, match="taken over"):
        writer.wait()
    writer.close()
    assert list(workdir.iterdir()) == []


def test_an_unexpected_error_of_the_sending_thread_is_raised_and_not_waited_for(bucket, monkeypatch):
    from taskexpert_jax.storage import mirror

    def send(self):
        raise RuntimeError("unexpected")

    monkeypatch.setattr(mirror.Mirror, "_send", send)
    writer = writers.RunWriter(CONFIG, storage.path(bucket), 0)
    for method in (writer.wait, writer.close):
        with pytest.raises(RuntimeError, match="unexpected"):
            method()
