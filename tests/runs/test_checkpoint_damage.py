"""Checkpoints of small trees: what is damaged, what a kill leaves behind, and disks that take no more."""

import contextlib
import errno
import gc
import os
import resource
import shutil
import subprocess
import sys
import warnings

from checkpoint_trees import abstract, largest, opened, opened_newest, same, save, state, unseal
import pytest

from taskexpert_jax.runs import manager, sealing
from taskexpert_jax.runs.checkpoints import saved_steps
from taskexpert_jax.errors import UserError

DAMAGES = {
    "deleted": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), r"has \d+ of \d+ bytes"),
    "altered": (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "has other bytes than were written"),
}


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """What Orbax leaves unfinished when a write is refused would be found, and told, in the middle of a later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("which", ["params", "train", "_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(how, which, tmp_path, capsys):
    save(tmp_path, [2, 4])
    damage, what = DAMAGES[how]
    path = tmp_path / "checkpoints" / "4" / which
    damage(largest(path) if path.is_dir() else path)
    with opened(tmp_path, read_only=True) as checkpoints:
        refused = rf"checkpoints/4 is damaged: {which}.* {what}; --checkpoint may be one of \[2\]"
        evaluation_reads_it = which != "train"
        with pytest.raises(UserError, match=refused) if evaluation_reads_it else contextlib.nullcontext():
            checkpoints.restore_variables(4, abstract())
    capsys.readouterr()
    restored = opened_newest(tmp_path)
    assert restored.step == 2 and same(restored.state, state(2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: checkpoint 4 is damaged: {which}") and line.endswith("falls back to step 2")
    assert (tmp_path / "damaged" / "4").is_dir()  # nothing is thrown away
    save(tmp_path, [4])  # the run comes to this step again
    assert opened_newest(tmp_path).step == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1}', '{"a": [1]}', "{}"])
def test_a_damaged_manifest_is_damage(text, tmp_path, capsys):
    save(tmp_path, [2, 4])
    (tmp_path / "checkpoints" / "4" / sealing.MANIFEST).write_text(text)
    assert opened_newest(tmp_path).step == 2
    assert capsys.readouterr().out.startswith("warning: checkpoint 4 is damaged: manifest.json ")


@pytest.mark.parametrize("text", ["", '{"semseg/mIoU": 0.9}', "[1]"])
def test_metrics_that_were_altered_decide_nothing(text, tmp_path, capsys):
    save(tmp_path, [2, 4, 6], {2: 0.5, 4: 0.4})
    (tmp_path / "checkpoints" / "4" / "metrics" / "metrics").write_text(text)
    with opened(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(
            UserError, match=r"checkpoints/4 is damaged: metrics/metrics .*which is the best is not known"
        ):
            checkpoints.select("best")
        assert checkpoints.select("latest") == 6
    capsys.readouterr()
    assert opened_newest(tmp_path).step == 6
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: checkpoint 4 is damaged: metrics/metrics ") and line.endswith("damaged/4")
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 2


def test_without_a_good_checkpoint_a_run_does_not_start_anew(tmp_path):
    save(tmp_path, [2, 4])
    for step in (2, 4):
        os.truncate(largest(tmp_path / "checkpoints" / str(step)), 10)
    for _ in range(2):  # it stays so
        with pytest.raises(
            UserError, match=r"none of the checkpoints in .* is good \(4 is .*; 2 is .*\); put the files back"
        ):
            opened_newest(tmp_path)
    assert saved_steps(tmp_path) == [2, 4]


def test_one_that_was_not_sealed_is_not_used(tmp_path, capsys):
    save(tmp_path, [2, 4])
    unseal(tmp_path, 4)
    assert opened_newest(tmp_path).step == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: checkpoint 4 had not been sealed when the run ended; it is now")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves reads unfinished
@pytest.mark.parametrize("damaged", ["", "largest", "config", "data", "train", "params/_METADATA", "metrics/metrics"])
def test_where_none_is_sealed_all_are_read_to_see_which_is_good(damaged, tmp_path, capsys):
    save(tmp_path, [2, 4], {4: 0.5})
    unseal(tmp_path, 2)
    unseal(tmp_path, 4)
    folder = tmp_path / "checkpoints" / "4"
    if damaged == "largest":
        os.truncate(largest(folder), largest(folder).stat().st_size // 2)
    elif damaged:
        shutil.rmtree(folder / damaged) if (folder / damaged).is_dir() else os.truncate(folder / damaged, 1)
    step = 2 if damaged else 4
    assert opened_newest(tmp_path).step == step
    assert capsys.readouterr().out.count("warning: checkpoint 4 cannot be read: ") == bool(damaged)
    assert sealing.sealed(tmp_path / "checkpoints" / str(step))


KILLED = """
import os, pathlib, sys, threading, time
from tests.runs import checkpoint_trees as made
with made.opened(pathlib.Path(sys.argv[1])) as checkpoints:
    checkpoints.save(made.state(2), {}, None)
    checkpoints.wait()
    checkpoints.save(made.state(4, 1 << 24), {}, None)
    while not list(checkpoints.path.glob("4.*/*/*")):
        time.sleep(0.001)
    os.kill(os.getpid(), 9)
"""


def test_a_write_cut_in_the_middle_is_said_and_left_out(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "XLA_FLAGS": ""}, check=False
    )
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "checkpoints").glob("4*")] == ["4.orbax-checkpoint-tmp"]
    assert opened_newest(tmp_path).step == 2
    assert capsys.readouterr().out == "step 4 was being written when the run ended: left out\n"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


REPLACING = """
import os, pathlib, sys
from taskexpert_jax.runs import sealing
from tests.runs import checkpoint_trees as made
def kill(*_, **__):
    os.kill(os.getpid(), 9)
checkpoints = made.Checkpoints(pathlib.Path(sys.argv[1]), made.BEST)
setattr(checkpoints._manager if sys.argv[2] == "save" else sealing, sys.argv[2], kill)
checkpoints.save(made.state(3), {}, {"semseg/mIoU": 0.5})
checkpoints.wait()
"""


@pytest.mark.parametrize("moment", ["save", "seal"])
def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(moment, tmp_path, capsys):
    save(tmp_path, [3])
    done = subprocess.run([sys.executable, "-c", REPLACING, str(tmp_path), moment], check=False)
    assert done.returncode == -9
    assert (tmp_path / "checkpoints" / "3").is_dir() == (moment == "seal")  # and yet:
    assert saved_steps(tmp_path) == [3]
    restored = opened_newest(tmp_path)
    assert (restored.step, restored.evaluated) == (3, False)
    assert same(restored.state, state(3))
    assert not (tmp_path / "replaced").exists()
    assert capsys.readouterr().out == ""


def test_what_was_replaced_goes_when_the_new_one_is_sealed(tmp_path):
    save(tmp_path, [3])
    shutil.copytree(tmp_path / "checkpoints" / "3", tmp_path / "replaced" / "3")  # killed just before it went
    save(tmp_path / "other", [3], {3: 0.5})
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    (tmp_path / "other" / "checkpoints" / "3").rename(tmp_path / "checkpoints" / "3")
    assert opened_newest(tmp_path).evaluated
    assert not (tmp_path / "replaced").exists()


# --- disks ---


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_what_was_good_stays(small_disk, capfd):
    workdir = small_disk / "run"
    save(workdir, [2])
    refused = r"cannot be written to .*/checkpoints: No space left on device; make room.*step 2"
    with pytest.raises(UserError, match=refused), opened(workdir) as checkpoints:
        checkpoints.save(state(4, 1 << 20), {}, None)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert "Traceback" not in capfd.readouterr().err
    assert opened_newest(workdir).step == 2
    save(workdir, [4])
    assert opened_newest(workdir).step == 4


@pytest.fixture
def small_files():
    """A limit of 1 MiB on every file that this process writes, which needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("replacing", [False, True])
def test_a_write_that_is_refused_in_the_background_is_one_line(replacing, small_files, tmp_path, capfd):
    steps = [2, 4] if replacing else [2]
    save(tmp_path, steps)
    refused = rf"cannot be written to .*/checkpoints: File too large; make room.*goes on from step {steps[-1]}$"
    with pytest.raises(UserError, match=refused), opened(tmp_path) as checkpoints:
        checkpoints.save(state(4, 1 << 20), {}, {"semseg/mIoU": 0.5})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [str(step) for step in steps]
    assert "Traceback" not in capfd.readouterr().err
    restored = opened_newest(tmp_path)
    assert (restored.step, restored.evaluated) == (steps[-1], False)
    assert same(restored.state, state(steps[-1]))


def test_writes_that_a_refused_one_keeps_from_beginning_are_not_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: said.append(str(args.exc_value)))

    async def write():
        pass

    with manager.quiet_refusals():
        write()  # never awaited, and gone at once: an error, for warnings are errors in tests
    assert not said
    write()
    assert len(said) == 1 and "never awaited" in said[0]


def test_a_checkpoint_that_cannot_be_sealed_is_not_said_to_be_saved(tmp_path, monkeypatch, capsys):
    save(tmp_path, [2])

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(4), {}, None)
        with pytest.raises(UserError, match=r"No space left on device; .* the run goes on from step 2$"):
            checkpoints.wait()
    monkeypatch.undo()
    assert opened_newest(tmp_path).step == 2
    assert "checkpoint 4 had not been sealed when the run ended" in capsys.readouterr().out


def test_other_errors_keep_their_trace(tmp_path):
    with opened(tmp_path) as checkpoints, pytest.raises((TypeError, ValueError), match="object"):
        checkpoints.save(state(1).replace(params={"a": object()}), {}, None)
