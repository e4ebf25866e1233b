"""`input_pipeline.prepare`: both forms of an archive, atomic builds, locking."""

import fcntl
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import nyud_layout
from preparing import build, contents, faults
import pytest
import tensorflow_datasets as tfds

from input_pipeline import file_lock, nyud, prepare, records
from taskexpert_jax.errors import UserError
from tests import clock

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSION = str(nyud.Builder.VERSION)


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write(tmp_path / "NYUDv2", train=("0003", "0001", "0002"), val=("0004",))


@pytest.fixture
def archive(layout: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write_archive(layout, layout.parent / "NYUDv2.tar.gz")


def test_folder_and_archive_build_the_same(layout: pathlib.Path, archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = contents(layout)
    plain = nyud_layout.write_archive(layout, tmp_path / "NYUDv2.tar", "w")
    extracted_in = tmp_path  # the parent of the extracted folder
    forms = {"a": archive, "b": layout, "c": extracted_in, "d": plain}
    fingerprints = {build(form, tmp_path / name) for name, form in forms.items()}
    assert len(fingerprints) == 1
    built = contents(tmp_path / "a")
    assert {os.path.dirname(path) for path in built} == {f"nyud/{VERSION}"}
    assert len([path for path in built if "array_record" in path]) == 2
    for name in "bcd":
        assert contents(tmp_path / name) == built
    assert contents(layout) == before
    assert os.listdir(tmp_path / "a") == ["nyud"]  # neither lock nor scratch folder


def test_examples_keep_their_order_over_several_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_SHARD", 40)
    ids = [f"{number:04d}" for number in np.random.default_rng(0).permutation(150)]
    layout = nyud_layout.write(tmp_path / "NYUDv2", train=ids[:149], val=ids[149:], height=4, width=4)
    build(layout, tmp_path / "built")
    assert len(list((tmp_path / "built" / "nyud" / VERSION).glob("nyud-train.array_record*"))) == 4
    source = nyud.source(SimpleNamespace(data_dir=str(tmp_path / "built")), "train")
    assert [source.load(index)["id"] for index in range(len(source))] == ids[:149]


def test_progress_is_a_line_now_and_then_and_none_if_it_is_not_wanted(
    layout: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "NYUDv2.tar").open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(4):  # of 1 MiB each, before the layout
            member = tarfile.TarInfo(f"NYUDv2/{number}.bin")
            member.size = 2**20
            tar.addfile(member, io.BytesIO(bytes(2**20)))
        tar.add(layout, "NYUDv2")
    command = ["nyud", f"--archive={tmp_path / 'NYUDv2.tar'}", "--allow-subset"]
    clock.each_look_takes(monkeypatch, 40)
    assert prepare.main([*command, f"--data_dir={tmp_path / 'a'}"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "extracting: 1 of 4 MiB" and "extracting: 3 of 4 MiB, 0.025/s, 00:40 left" in lines
    assert lines[-5:] == [
        "building train: 1 of 4 examples",
        "building train: 2 of 4 examples, 0.025/s, 01:20 left",
        "building train: 3 of 4 examples, 0.025/s, 00:40 left",
        "summarising train: 1 of 3 examples",
        "summarising train: 2 of 3 examples, 0.025/s, 00:40 left",
    ]
    assert prepare.main([*command, f"--data_dir={tmp_path / 'b'}", "--verbosity=-1"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("published", "count"), [({"train": 3, "val": 1}, 0), ({"train": 2, "val": 2}, 2)])
def test_other_counts_than_the_published_ones_need_the_flag(
    layout: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    published: dict[str, int],
    count: int,
) -> None:
    monkeypatch.setattr(nyud, "PUBLISHED_COUNTS", published)
    (tmp_path / "built").mkdir()
    if count:
        lines, error = faults(capsys, layout, tmp_path / "built")
        for line, (split, has) in zip(lines, (("train", 3), ("val", 1)), strict=True):
            assert re.match(rf"gt_sets/{split}.txt .*{has} ids.* 2 .*--allow-subset", line), line
        assert error == f"error: {layout}: 2 faults, see above; nothing was built"
        build(layout, tmp_path / "built")
    else:
        prepare.prepare("nyud", layout, tmp_path / "built")
    record = json.loads((tmp_path / "built" / "nyud" / VERSION / "prepared.json").read_text())
    assert record["subset"] is (count > 0)


def test_a_subset_is_built_without_the_ids_that_have_no_image(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for path in layout.glob("*/0001.*"):
        path.unlink()
    (layout / "gt_sets" / "train.txt").write_text("0003\n0001\n0777\n0002\n")
    lines = prepare.prepare("nyud", layout, tmp_path / "built", allow_subset=True)
    (omitted,) = [line.split() for line in lines if line.startswith("left out")]
    assert omitted == ["left", "out", "2", "0"]
    source = nyud.source(SimpleNamespace(data_dir=str(tmp_path / "built")), "train")
    assert [source.load(index)["id"] for index in range(len(source))] == ["0003", "0002"]


def test_a_subset_needs_an_image_in_every_split_and_all_labels(
    layout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "built").mkdir()
    (layout / "depth" / "0001.npy").unlink()
    lines, _ = faults(capsys, layout, tmp_path / "built", "--allow-subset")
    (line,) = lines
    assert re.match(r"depth/0001.npy is missing.* gt_sets/train.txt .*0001", line), line
    (layout / "images" / "0004.png").unlink()
    lines, _ = faults(capsys, layout, tmp_path / "built", "--allow-subset")
    (line,) = lines
    assert re.match(r"none of the ids in gt_sets/val.txt has an image", line), line


def test_arguments_that_cannot_be_right(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"^--archive=.*/absent.tar.gz.*NYUDv2.tar.gz"):
        prepare.prepare("nyud", tmp_path / "absent.tar.gz", tmp_path / "built")
    with pytest.raises(UserError, match=r"^--data_dir=.*/NYUDv2/tfds"):
        prepare.prepare("nyud", layout, layout / "tfds")
    with pytest.raises(UserError, match=r"'nyudd'.*input_pipeline/nyudd.py"):
        prepare.prepare("nyudd", layout, tmp_path / "built")
    with pytest.raises(UserError, match=r"'transforms'.*`source`"):
        prepare.prepare("transforms", layout, tmp_path / "built")
    with pytest.raises(UserError, match=r"'scenes'"):
        prepare.prepare("scenes", layout, tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_a_built_data_set_is_not_overwritten(
    layout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(layout, tmp_path / "built")
    lines, error = faults(capsys, layout, tmp_path / "built", "--allow-subset")
    assert lines == []
    assert re.match(rf"error: {tmp_path}/built/nyud/{VERSION} .*delete it", error), error


def test_a_place_that_cannot_hold_data_is_named(
    layout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert prepare.main(["nyud", f"--archive={layout}", f"--data_dir={tmp_path}/file/built"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file/built: Not a directory; nothing was built\n"


def test_a_full_disk_is_told_in_one_line(
    layout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_) -> None:
        raise RuntimeError("write() failed: No space left on device;\nCould not submit chunk: 30")  # ArrayRecord's

    monkeypatch.setattr(tfds.core.SequentialWriter, "add_examples", full)
    (tmp_path / "built").mkdir()
    lines, error = faults(capsys, layout, tmp_path / "built", "--allow-subset")
    assert lines == []
    assert error == "error: the records cannot be written: No space left on device; nothing was built"


# Interruption and concurrency

SLOW = """
import runpy, sys, time
from input_pipeline import nyud
read = nyud.read_example
def slowly(root, example_id):
    time.sleep(0.3)
    return read(root, example_id)
nyud.read_example = slowly
runpy.run_module("input_pipeline.prepare", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def under_way(tmp_path: pathlib.Path):
    """A slow build in another process that has started to write; yields the process, its layout and target folder."""
    layout = nyud_layout.write(tmp_path / "NYUDv2", train=[f"{number:04d}" for number in range(200)], val=["0999"])
    built = tmp_path / "built"
    command = [sys.executable, "-c", SLOW, "nyud", f"--archive={layout}", f"--data_dir={built}", "--allow-subset"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((built / ".nyud-incomplete").rglob("*array_record*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    yield process, layout, built
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_build_leaves_nothing(under_way, number: signal.Signals, status: int) -> None:
    process, _, built = under_way
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert list(built.iterdir()) == []


@pytest.mark.slow
def test_a_second_build_is_refused_and_a_killed_one_is_cleared_away(under_way) -> None:
    process, layout, built = under_way
    with pytest.raises(UserError, match=rf"^{built}/nyud/{VERSION} .*another process"):
        build(layout, built)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(os.listdir(built)) == [".nyud-incomplete", ".nyud-lock"]
    build(layout, built)
    assert os.listdir(built) == ["nyud"]


def test_a_lock_file_that_was_removed_in_between_keeps_nobody_out(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder may remove the file after another process has opened it but before it is locked."""
    path, flock, removed = tmp_path / "lock", fcntl.flock, []

    def flock_after_removal(file, operation):
        if not removed:
            path.unlink()
            removed.append(True)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with file_lock.held(path), path.open() as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not path.exists()
