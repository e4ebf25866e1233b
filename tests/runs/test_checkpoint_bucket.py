"""Checkpoints of a run in a bucket: the promises of those on a disk, by the store's means."""

import json
import shutil

import pytest

from taskexpert_jax import storage
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.runs import crc32c, sealing
from taskexpert_jax.runs.checkpoints import saved_steps
from tests.runs.checkpoint_trees import abstract, alter, opened, opened_newest, same, save, state, unseal


@pytest.fixture
def workdir(bucket):
    return storage.path(bucket) / "run"


def largest(folder):
    found = storage.listed(folder)
    return folder / max(found, key=lambda name: found[name].size)


def test_the_newest_is_restored_bit_for_bit_and_nothing_is_read_to_seal_it(workdir, monkeypatch):
    monkeypatch.setattr(sealing, "_sum", None)
    save(workdir, [2, 4, 6], {4: 30.0})
    assert saved_steps(workdir) == [4, 6]  # the latest two, one of them the best
    manifest = json.loads((workdir / "checkpoints/6" / sealing.MANIFEST).read_text())
    there = storage.listed(workdir / "checkpoints/6")
    assert manifest == {
        name: {"size": facts.size, "crc32c": facts.crc32c} for name, facts in there.items() if name != sealing.MANIFEST
    }
    restored = opened_newest(workdir)
    assert restored.step == 6 and same(restored.items, state(6).to_items())
    with opened(workdir, read_only=True) as checkpoints:
        assert checkpoints.select("best") == 4
        assert same(checkpoints.restore_variables(4, abstract().variables()), state(4).variables())


DAMAGES = {
    "deleted": (lambda path: path.unlink(), "is missing"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"has \d+ of \d+ bytes"),
    "altered": (alter, "checksum"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_object_is_named_and_the_checkpoint_before_it_taken(how, workdir, capsys):
    save(workdir, [2, 4])
    damage, what = DAMAGES[how]
    damage(largest(workdir / "checkpoints/4/params"))
    with (
        opened(workdir, read_only=True) as checkpoints,
        pytest.raises(UserError, match=rf"/4 .*params.* {what}.*\[2\]"),
    ):
        checkpoints.restore_variables(4, abstract().variables())
    capsys.readouterr()
    assert opened_newest(workdir).step == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: checkpoint 4 is damaged: params/") and line.endswith("falls back to step 2")
    assert storage.listed(workdir / "damaged/4") and saved_steps(workdir) == [2]


def test_what_a_killed_run_left_is_removed(workdir, capsys):
    save(workdir, [2, 4])
    folder = workdir / "checkpoints/6"
    (folder / "params/d/1").write_bytes(b"x")  # neither commit file nor manifest
    (workdir / "checkpoints/4/metrics/metrics").write_text("{}")  # written before the manifest that lists it
    with opened(workdir) as checkpoints:
        assert checkpoints.latest == 4
    assert "the evaluation of step 4 was being written when the run ended: removed" in capsys.readouterr().err
    assert not folder.exists() and sealing.unlisted(workdir / "checkpoints/4") == []


def test_a_complete_checkpoint_without_a_seal_is_not_trusted(workdir, capsys):
    save(workdir, [2, 4])
    unseal(workdir, 4)
    assert opened_newest(workdir).step == 2
    assert "checkpoint 4 had not been sealed when the run ended" in capsys.readouterr().err


def test_a_removal_that_is_cut_short_leaves_no_half_checkpoint(workdir, monkeypatch):
    save(workdir, [2, 4])
    removed = []

    def unlink(self, missing_ok=False):
        removed.append(self.name)
        if len(removed) > 6:
            raise KeyboardInterrupt
        delete(self, missing_ok)

    folder = workdir / "checkpoints/2"
    delete = type(folder).unlink
    monkeypatch.setattr(type(folder), "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        storage.remove(folder)
    monkeypatch.undo()
    assert saved_steps(workdir) == [4] and storage.listed(folder)
    opened_newest(workdir)
    assert not storage.listed(folder)


def test_a_run_may_be_copied_to_a_bucket_and_back(workdir, tmp_path):
    here, back = tmp_path / "here", tmp_path / "back"
    save(here, [2, 4])
    storage.copy_tree(here, workdir)  # no commit files, and other checksums than the store's
    assert saved_steps(workdir) == [2, 4]
    with opened(workdir, read_only=True) as checkpoints:
        assert same(checkpoints.restore_variables(2, abstract().variables()), state(2).variables())
    restored = opened_newest(workdir)
    assert restored.step == 4 and same(restored.items, state(4).to_items())
    save(workdir, [6])
    with storage.local_copy(workdir) as copy:
        shutil.copytree(copy, back)
    assert same(opened_newest(back).items, state(6).to_items())
    victim = max(sealing.contents(back / "checkpoints/6"), key=lambda path: path.stat().st_size)
    alter(victim)
    assert str(sealing.problem(back / "checkpoints/6")).endswith("another checksum than when it was written")


def test_a_run_without_seals_may_be_copied_to_a_bucket(workdir, tmp_path, capsys):
    here = tmp_path / "here"
    save(here, [2, 4])
    for step in (2, 4):  # of a version without seals
        unseal(here, step)
    storage.copy_tree(here, workdir)
    (workdir / "checkpoints/6/params/d/1").write_bytes(b"x")  # not complete
    assert saved_steps(workdir) == [2, 4]
    restored = opened_newest(workdir)
    assert restored.step == 4 and same(restored.items, state(4).to_items())
    assert "removed" in capsys.readouterr().err and saved_steps(workdir) == [2, 4]


def test_a_store_that_does_not_answer_is_no_damage(workdir, monkeypatch):
    save(workdir, [2, 4])

    def read_bytes(self):
        raise StoreError(5, "the store cannot be reached", str(self))

    monkeypatch.setattr(type(workdir), "read_bytes", read_bytes)
    with pytest.raises(StoreError, match="the store cannot be reached"):
        opened_newest(workdir)
    monkeypatch.undo()
    assert not (workdir / "damaged").exists() and saved_steps(workdir) == [2, 4]


@pytest.mark.parametrize("method", ["restore", "item_metadata"])
def test_arrays_that_the_store_does_not_give_are_no_damage(workdir, monkeypatch, method):
    save(workdir, [2, 4])
    for step in (2, 4):
        unseal(workdir, step)

    def unavailable(*args, **kwargs):
        raise ValueError("UNAVAILABLE: CURL error while reading gs://bucket/run/checkpoints/4/params/d/1")

    with opened(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, method, unavailable)
        with pytest.raises(StoreError, match=r"/checkpoints: the store refused it \(UNAVAILABLE\)"):
            checkpoints.restore_newest(abstract().to_items())
    assert not (workdir / "damaged").exists() and saved_steps(workdir) == [2, 4]


def test_crc32c_of_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    assert crc32c.of_file(path) == 0xE3069283  # the check value of CRC-32C
    path.write_bytes(b"")
    assert crc32c.of_file(path) == 0


def test_a_save_that_the_store_refuses_removes_nothing_there(workdir, monkeypatch):
    save(workdir, [2])
    anothers = workdir / "checkpoints/9/params/d/1"

    def refuse(*args, **kwargs):
        anothers.write_bytes(b"x")  # of a run that has taken the workdir over meanwhile
        raise StoreError(5, "the store is full", str(workdir))

    with opened(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", refuse)
        with pytest.raises(UserError, match=r"^a checkpoint cannot be written to .*: the store is full; start again"):
            checkpoints.save(4, state(4).to_items(), {"seed": 0}, None)
    assert anothers.is_file()
