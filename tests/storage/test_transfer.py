"""Folders that are copied to and from a bucket, and a folder that is mirrored while it grows."""

import errno
import tempfile
import time

import pytest

from taskexpert_jax import storage
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.runs import crc32c


@pytest.fixture
def folder(bucket):
    return storage.path(bucket)


@pytest.fixture
def source(tmp_path):
    """A local folder with files at two depths."""
    root = tmp_path / "source"
    (root / "inner").mkdir(parents=True)
    for name, content in {"a": b"1" * 1000, "inner/b": b"2", "empty": b"", "last": b"3"}.items():
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def sent(monkeypatch):
    """Names of the files that are uploaded, in their order."""
    from google.cloud.storage import Blob

    found, upload = [], Blob.upload_from_filename
    monkeypatch.setattr(
        Blob, "upload_from_filename", lambda self, name, **to: (found.append(self.name), upload(self, name, **to))[1]
    )
    return found


def test_a_folder_is_listed_with_the_facts_of_the_store(folder, source):
    storage.copy_tree(source, folder)
    found = storage.listed(folder)
    assert sorted(found) == ["a", "empty", "inner/b", "last"]
    assert (found["a"].size, found["empty"].size) == (1000, 0)
    assert found["a"].crc32c == crc32c.of_file(source / "a")
    assert abs(found["a"].updated - time.time()) < 600


def test_a_copy_is_resumed_and_ends_with_its_last_file(folder, source, sent):
    (folder / "a").write_bytes(b"1" * 1000)  # as an earlier try left it
    (folder / "inner" / "b").write_bytes(b"other")
    storage.copy_tree(source, folder, last="last")
    sent = [name.partition("/")[2] for name in sent]
    assert sorted(sent) == ["empty", "inner/b", "last"] and sent[-1] == "last"
    assert (folder / "inner" / "b").read_bytes() == b"2"


def test_a_local_copy_is_whole_verified_and_removed(folder, source, tmp_path):
    storage.copy_tree(source, folder / "model")
    with storage.local_copy(folder / "model") as copy:
        assert copy.name == "model"
        assert {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == {
            path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()
        }
    assert not copy.exists()
    with storage.local_copy(folder / "model" / "a") as copy:
        assert copy.read_bytes() == b"1" * 1000
    with storage.local_copy(folder / "model", ["a", "missing"]) as copy:
        assert [path.name for path in copy.iterdir()] == ["a"]
    with storage.local_copy(source) as copy:
        assert copy is source
    with pytest.raises(FileNotFoundError), storage.local_copy(folder / "nothing"):
        pass


def test_a_copy_that_does_not_fit_on_the_disk_is_one_line(folder, source, monkeypatch, tmp_path):
    from taskexpert_jax.storage import transfer

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.copy_tree(source, folder)
    monkeypatch.setattr(transfer, "_fetch", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    line = rf"^{folder} cannot be copied to a temporary folder: No space left on device; set TMPDIR to another$"
    with pytest.raises(UserError, match=line), storage.local_copy(folder):
        pass
    with pytest.raises(FileNotFoundError), storage.local_copy(folder / "nothing"):
        pass
    assert list(tmp_path.glob("taskexpert_*")) == []


def test_a_copy_that_arrives_altered_is_refused(folder, source, monkeypatch):
    from taskexpert_jax.storage import transfer

    storage.copy_tree(source, folder)
    facts = transfer.facts
    monkeypatch.setattr(transfer, "facts", lambda blob: facts(blob)._replace(crc32c=1))
    with pytest.raises(StoreError, match=r"checksum"), storage.local_copy(folder):
        pass


@pytest.mark.parametrize("name", ["../outside", "a//b", "./c", "/etc", "/gs/other/x"])
def test_an_object_whose_name_leads_elsewhere_is_neither_copied_nor_removed(folder, tmp_path, name):
    blob = folder.bucket.blob(f"{folder.key}/{name}")
    blob.upload_from_string("x")
    requests = (
        lambda: storage.download(folder, tmp_path / "inside" / "copy"),
        lambda: storage.remove(folder),
        lambda: folder.rename(folder.parent / "other"),
    )
    for request in requests:
        with pytest.raises(StoreError, match=r"has no name of a file; remove or rename it"):
            request()
    assert not (tmp_path / "inside").exists() and blob.exists()


def test_a_mirror_sends_what_has_changed(folder, source):
    from taskexpert_jax.storage.mirror import Mirror

    mirror = Mirror(source, folder, {}, lambda: None)
    mirror.wait()
    assert sorted(storage.listed(folder)) == ["a", "empty", "inner/b", "last"]
    before = storage.listed(folder)["a"].generation
    (source / "inner" / "b").write_bytes(b"longer")
    mirror.close()
    assert (folder / "inner" / "b").read_bytes() == b"longer"
    assert storage.listed(folder)["a"].generation == before


def test_a_mirror_that_cannot_send_says_so_at_the_next_change(folder, failing_store, source):
    from taskexpert_jax.storage.mirror import Mirror

    failing_store.refuse(403)
    mirror = Mirror(source, folder, {}, lambda: None)
    for call in (mirror.wait, mirror.changed, mirror.close):
        with pytest.raises(StoreError, match=r"no permission \(HTTP 403\)"):
            call()
