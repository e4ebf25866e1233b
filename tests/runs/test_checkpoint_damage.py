"""Checkpoints of small trees: damage, interrupted writes, and full disks."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys

from checkpoint_trees import abstract, alter, largest, opened, opened_newest, same, save, state, unseal
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import saving as saving_module
from taskexpert_jax.runs import sealing
from taskexpert_jax.runs.checkpoints import saved_steps
from taskexpert_jax.runs.presence import Presence
from taskexpert_jax.runs.sealing import METRICS
from tests import xla

DAMAGES = {
    "deleted": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), r"has \d+ of \d+ bytes"),
    "altered": (alter, "checksum"),
}


@pytest.mark.parametrize(
    ("which", "how"),
    [("params", "deleted"), ("params", "altered"), ("train", "truncated"), ("_CHECKPOINT_METADATA", "altered")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(which, how, tmp_path, capsys):
    save(tmp_path, [2, 4])
    damage, what = DAMAGES[how]
    path = tmp_path / "checkpoints" / "4" / which
    damage(largest(path) if path.is_dir() else path)
    with opened(tmp_path, read_only=True) as checkpoints:
        refused = rf"checkpoints/4 .*{which}.* {what}.*\[2\]"
        evaluation_reads_it = which != "train"
        with pytest.raises(UserError, match=refused) if evaluation_reads_it else contextlib.nullcontext():
            checkpoints.restore_variables(4, abstract().variables())
    capsys.readouterr()
    restored = opened_newest(tmp_path)
    assert restored.step == 2 and same(restored.items, state(2).to_items())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: checkpoint 4 is damaged: {which}") and line.endswith("falls back to step 2")
    assert (tmp_path / "damaged" / "4").is_dir()  # nothing is thrown away
    save(tmp_path, [4])  # the run comes to this step again
    assert opened_newest(tmp_path).step == 4
    assert capsys.readouterr().err == ""


def test_a_damaged_manifest_is_damage(tmp_path, capsys):
    save(tmp_path, [2, 4])
    manifest = tmp_path / "checkpoints" / "4" / sealing.MANIFEST
    deep, long = "[" * 100_000, "a" * 400
    bad = (
        *("", "[]", "null", "{}", deep, "\xff", "NaN"),
        *(f'{{"a": {of}}}' for of in ("1", "[1]", "[1, 1e999]", "[1, true]")),
    )
    for text in (*bad, '{"": [1, 1]}', '{"a\\u0000": [1, 1]}', '{"a": [1, 1], "a": [1, 1]}'):
        manifest.write_bytes(text.encode("latin-1"))
        assert str(sealing.problem(manifest.parent)).startswith("manifest.json ")
    manifest.write_text(f'{{"{long}": [1, 1]}}')
    assert str(sealing.problem(manifest.parent)) == f"{long} cannot be read: File name too long"
    manifest.write_text("[]")
    assert opened_newest(tmp_path).step == 2
    assert capsys.readouterr().err.startswith("warning: checkpoint 4 is damaged: manifest.json ")


@pytest.mark.parametrize("text", ["", '{"semseg/mIoU": 0.9}', "[1]", '{"semseg/mIoU": "0.9"}', "[" * 100_000])
def test_metrics_that_were_altered_decide_nothing(text, tmp_path, capsys):
    save(tmp_path, [2, 4, 6], {2: 0.5, 4: 0.4})
    (tmp_path / "checkpoints" / "4" / "metrics" / "metrics").write_text(text)
    with opened(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints/4 .*metrics/metrics .*\[2, 4, 6\]"):
            checkpoints.select("best")
        assert checkpoints.select("latest") == 6
    capsys.readouterr()
    assert opened_newest(tmp_path).step == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: checkpoint 4 is damaged: metrics/metrics ") and line.endswith("damaged/4")
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 2


@pytest.mark.parametrize("text", ['{"semseg/mIoU": 0.9}', "no JSON"])
def test_metrics_that_no_manifest_lists_decide_nothing(text, tmp_path, capsys):
    save(tmp_path, [2, 4], {2: 0.5})
    path = tmp_path / "checkpoints" / "4" / METRICS
    path.parent.mkdir()
    path.write_text(text)
    refused = r"checkpoints/4 is damaged: metrics/metrics is not in manifest.json;"
    with opened(tmp_path, read_only=True) as checkpoints, pytest.raises(UserError, match=refused):
        checkpoints.select("best")
    capsys.readouterr()
    assert opened_newest(tmp_path).step == 4
    assert capsys.readouterr().err == "the evaluation of step 4 was being written when the run ended: removed\n"
    with opened(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 2


def test_a_file_that_no_manifest_lists_is_named(tmp_path, capsys):
    save(tmp_path, [2])
    (tmp_path / "checkpoints" / "2" / "params" / "added").touch()
    assert opened_newest(tmp_path).step == 2
    assert capsys.readouterr().err == "warning: checkpoint 2 was not written with params/added: not in manifest.json\n"


@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoint_that_was_copied_to_another_step_is_not_of_that_step(sealed, tmp_path, capsys):
    save(tmp_path, [2])
    shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "9")
    if not sealed:
        unseal(tmp_path, 2)
        unseal(tmp_path, 9)
    refused = r"checkpoints/9 is damaged: it is of step 2, copied or renamed; .*\[2\]"
    with opened(tmp_path, read_only=True) as checkpoints, pytest.raises(UserError, match=refused):
        checkpoints.restore_variables(9, abstract().variables())
    capsys.readouterr()
    assert opened_newest(tmp_path).step == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it is of step 2, copied or renamed" in line and line.endswith("falls back to step 2")


def test_without_a_good_checkpoint_a_run_does_not_start_anew(tmp_path):
    save(tmp_path, [2, 4])
    for step in (2, 4):
        os.truncate(largest(tmp_path / "checkpoints" / str(step)), 10)
    for _ in range(2):  # also at the second try
        with pytest.raises(UserError, match=r"\(4 is damaged: .*; 2 is damaged: "):
            opened_newest(tmp_path)
    assert saved_steps(tmp_path) == [2, 4]


def test_one_that_was_not_sealed_is_not_used(tmp_path, capsys):
    save(tmp_path, [2, 4])
    unseal(tmp_path, 4)
    assert opened_newest(tmp_path).step == 2
    (line,) = capsys.readouterr().err.splitlines()
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
    assert capsys.readouterr().err.count("warning: checkpoint 4 cannot be read: ") == bool(damaged)
    assert sealing.sealed(tmp_path / "checkpoints" / str(step))


KILLED = """
import os, pathlib, sys, threading, time
from tests.runs import checkpoint_trees as made
with made.opened(pathlib.Path(sys.argv[1])) as checkpoints:
    checkpoints.save(2, made.state(2).to_items(), {}, None)
    checkpoints.wait()
    checkpoints.save(4, made.state(4, 1 << 24).to_items(), {}, None)
    while not list(checkpoints.path.glob("4.*/*/*")):
        time.sleep(0.001)
    os.kill(os.getpid(), 9)
"""


def test_a_write_cut_in_the_middle_is_said_and_left_out(tmp_path, capsys):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=xla.environment(), check=False)
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "checkpoints").glob("4*")] == ["4.orbax-checkpoint-tmp"]
    assert opened_newest(tmp_path).step == 2
    assert capsys.readouterr().err == "step 4 was being written when the run ended: removed\n"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


ADDING = """
import os, pathlib, sys
from taskexpert_jax.runs import sealing
from tests.runs import checkpoint_trees as made
setattr(sealing, sys.argv[2], lambda *_: os.kill(os.getpid(), 9))
made.save(pathlib.Path(sys.argv[1]), [3], {3: 0.5})
"""


@pytest.mark.parametrize("moment", ["_write", "_write_manifest"])
def test_a_kill_while_metrics_are_added_loses_nothing(moment, tmp_path, capsys):
    save(tmp_path, [3])
    done = subprocess.run([sys.executable, "-c", ADDING, str(tmp_path), moment], check=False)
    assert done.returncode == -9
    assert (tmp_path / "checkpoints" / "3" / METRICS).exists() == (moment == "_write_manifest")
    restored = opened_newest(tmp_path)
    assert (restored.step, restored.evaluated) == (3, False)  # so the evaluation is repeated
    assert same(restored.items, state(3).to_items())
    said = "the evaluation of step 3 was being written when the run ended: removed\n"
    assert capsys.readouterr().err == (said if moment == "_write_manifest" else "")
    save(tmp_path, [3], {3: 0.5})
    assert opened_newest(tmp_path).evaluated


def test_what_an_earlier_version_put_by_is_not_passed_over(tmp_path):
    save(tmp_path, [1, 3])
    (tmp_path / "replaced").mkdir()
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "replaced" / "3")
    with pytest.raises(UserError, match="replaced/3 "):
        opened_newest(tmp_path)
    (tmp_path / "replaced" / "3").rename(tmp_path / "checkpoints" / "3")
    assert opened_newest(tmp_path).step == 3


# --- disks ---

REFUSED = """
import pathlib, resource, sys
from taskexpert_jax.errors import UserError
from tests.runs import checkpoint_trees as made
workdir = pathlib.Path(sys.argv[1])
made.save(workdir, [2])
if sys.argv[2] == "File too large":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
state = made.state(4, 1 << 20)
many = {str(i): state.opt_state["mu"] + i for i in range(12)}  # that are written at once
try:
    with made.opened(workdir) as checkpoints:
        checkpoints.save(4, state.replace(opt_state=many).to_items(), {}, None)
except UserError as error:
    print(error)
"""


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


@pytest.mark.parametrize("reason", ["No space left on device", "File too large"])
def test_a_refused_write_is_one_line_and_what_was_good_stays(reason, tmp_path, request):
    full = reason.startswith("No space")
    workdir = (request.getfixturevalue("small_disk") if full else tmp_path) / "run"
    command = [sys.executable, "-c", REFUSED, str(workdir), reason]
    done = subprocess.run(command, env=xla.environment(), capture_output=True, text=True, check=False)
    assert re.search(rf"^.*{workdir}/checkpoints: {reason}.* step 2$", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")  # no traceback of any thread
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert opened_newest(workdir).step == 2
    save(workdir, [4])
    assert opened_newest(workdir).step == 4


@pytest.mark.parametrize("adding", [False, True])
def test_what_cannot_be_sealed_is_refused(adding, tmp_path, monkeypatch, capsys):
    steps = [2, 4] if adding else [2]
    save(tmp_path, steps)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"No space left on device; .* step {steps[-1]}$"):
        save(tmp_path, [4], {4: 0.5})
    monkeypatch.undo()
    restored = opened_newest(tmp_path)
    assert (restored.step, restored.evaluated) == (steps[-1], False)
    assert same(restored.items, state(steps[-1]).to_items())
    assert ("checkpoint 4 had not been sealed" in capsys.readouterr().err) != adding


def test_other_errors_keep_their_trace(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("not a disk's")

    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", broken)
        with pytest.raises(ValueError, match="not a disk's"):
            checkpoints.save(1, state(1).to_items(), {}, None)


def test_a_folder_that_is_deleted_during_a_run_is_one_line_and_not_made_again(tmp_path):
    workdir = tmp_path / "run"
    gone = pytest.raises(UserError, match="checkpoints has been deleted or replaced during the run, which ends here")
    with gone, opened(workdir) as checkpoints:
        shutil.rmtree(workdir)
        checkpoints.save(2, state(2).to_items(), {}, None)
    assert not workdir.exists()


@pytest.mark.parametrize("other", [(), ("8",)], ids=["nothing else", "another run's"])
def test_what_was_being_saved_into_a_deleted_folder_is_removed_and_nothing_else(other, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with contextlib.closing(Presence(folder)) as presence:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="deleted or replaced"), presence.needed():
            pass
        for name in ("20", "20.orbax-checkpoint-tmp", *other):  # as Orbax does
            (folder / name / "params").mkdir(parents=True)
        presence.remove_remade("20")
    assert sorted(path.name for path in folder.glob("*")) == list(other)
    assert (tmp_path / "run").exists() == bool(other)


def test_a_copy_that_is_put_in_place_of_the_folder_is_left_alone(tmp_path):
    folder, copy = tmp_path / "checkpoints", tmp_path / "copy"
    refused = pytest.raises(UserError, match="deleted or replaced")
    with refused, opened(tmp_path) as checkpoints:
        checkpoints.save(2, state(2).to_items(), {}, None)
        checkpoints.wait()
        shutil.copytree(folder, copy)  # such as to a larger disk
        shutil.rmtree(folder)
        copy.rename(folder)
        checkpoints.save(4, state(4).to_items(), {}, None)
    assert sealing.sealed(folder / "2") and sealing.problem(folder / "2") is None


def replaced_by_a_copy(folder):
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


def test_reading_removes_nothing_from_a_folder_that_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(saving_module, "_CLEAR_SECONDS", 0.1)
    save(tmp_path, [2])
    refused = pytest.raises(UserError, match="deleted or replaced")
    with refused, opened(tmp_path, read_only=True):
        replaced_by_a_copy(tmp_path / "checkpoints")
        saving = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp-1"  # by a run that trains there
        saving.mkdir()
    assert saving.is_dir()


def test_a_sealed_checkpoint_of_the_step_that_was_being_saved_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(saving_module, "_CLEAR_SECONDS", 0.1)
    save(tmp_path, [2])
    refused = pytest.raises(UserError, match="deleted or replaced")
    with refused, opened(tmp_path) as checkpoints:
        checkpoints._saver._incomplete = 2
        replaced_by_a_copy(tmp_path / "checkpoints")
    assert sealing.sealed(tmp_path / "checkpoints" / "2")
