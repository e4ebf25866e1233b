"""Paths in a bucket: what methods of `pathlib.Path` do there, and what they refuse."""

import contextlib
import errno
import io
import pathlib

from etils import epath
import numpy as np
from PIL import Image
import pytest

from taskexpert_jax import files, storage
from taskexpert_jax.errors import StoreError, UserError


@pytest.fixture
def folder(bucket):
    return storage.path(bucket)


def names(found):
    return sorted(path.name for path in found)


def test_a_path_is_one_for_pathlib_and_for_etils_and_keeps_its_text(folder):
    path = folder / "a b" / "x.tar.gz"
    assert isinstance(path, pathlib.Path) and isinstance(path, epath.Path)
    assert str(path) == f"{folder}/a b/x.tar.gz" and storage.path(str(path)) == path
    assert (path.name, path.suffix, path.parent.name) == ("x.tar.gz", ".gz", "a b")
    assert path.relative_to(folder) == pathlib.PurePosixPath("a b/x.tar.gz")
    assert type(epath.Path(str(path))) is type(path)  # those that Orbax makes from text too
    assert path.absolute() == path.resolve() == path and path.is_absolute()
    assert storage.is_bucket(path) and not storage.is_bucket(pathlib.Path("gs:/b"))


def test_a_folder_exists_while_it_has_an_object(folder):
    assert not folder.exists() and list(folder.iterdir()) == []
    folder.mkdir(parents=True)
    assert not folder.exists()
    (folder / "inner" / "object").write_text("x")
    assert folder.is_dir() and (folder / "inner").is_dir() and not (folder / "inner").is_file()
    assert (folder / "inner" / "object").is_file() and not (folder / "inner" / "object").is_dir()
    assert not (folder / "inn").exists()  # the beginning of a name is no folder
    (folder / "inner" / "object").unlink()
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        (folder / "inner" / "object").unlink()
    (folder / "inner" / "object").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        folder.rmtree()


def test_listings_are_those_of_a_disk(folder, tmp_path):
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.bin", "1/x", "22/x"):
        for root in (folder, tmp_path):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
    for list_of in (
        lambda root: root.iterdir(),
        lambda root: (root / "b").iterdir(),
        lambda root: root.glob("*"),
        lambda root: root.glob("[0-9]*/x"),
        lambda root: root.glob("b/d/*.bin"),
        lambda root: root.glob("no*"),
        lambda root: root.glob("a.txt"),
        lambda root: root.rglob("*.txt"),
        lambda root: storage.files_in(root),
        lambda root: storage.files_in(root / "b"),
    ):
        found, expected = (sorted(str(path.relative_to(root)) for path in list_of(root)) for root in (folder, tmp_path))
        assert found == expected
    assert list(folder.iterdir()) == sorted(folder.iterdir())
    with pytest.raises(io.UnsupportedOperation, match=r"use rglob"):
        list(folder.glob("**/*.txt"))
    assert names(folder.rglob("*")) == ["a.txt", "c.txt", "e.txt", "f.bin", "x", "x"]  # objects alone


def test_files_are_read_and_written_as_text_and_bytes(folder):
    path = folder / "object"
    with path.open("w") as file:
        file.write("Küche\r\n")
        assert not path.exists()
    assert path.read_bytes() == "Küche\r\n".encode() and path.read_text() == "Küche\r\n"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * 300)
    with path.open("rb") as file:
        file.seek(-2, io.SEEK_END)
        assert file.read() == b"\xfe\xff"
    assert storage.beginning(path, 3) == b"\x00\x01\x02" and storage.beginning(path, 10**6) == path.read_bytes()
    assert path.stat().st_size == 256 * 300 and path.stat().st_mtime > 1.7e9
    path.write_bytes(b"")
    assert path.stat().st_size == 0 and path.read_text() == ""
    for mode in ("a", "r+", "x", "ab"):
        with pytest.raises(io.UnsupportedOperation):
            path.open(mode)


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_nothing_is_sent_after_an_exception(folder, mode):
    path = folder / "object"
    path.write_text("before")
    with contextlib.suppress(RuntimeError), path.open(mode) as file:
        file.write("half" if mode == "w" else b"half")
        raise RuntimeError
    unclosed = path.open("wb")
    unclosed.write(b"half")
    del unclosed
    assert path.read_text() == "before"


def test_result_files_are_whole_or_absent(folder):
    numbers = np.arange(1000.0)
    with files.replacing(folder / "a.npy") as file:
        np.save(file, numbers)
    with files.replacing(folder / "a.png") as file:
        Image.new("RGB", (30, 20)).save(file, "PNG")
    with (folder / "a.npy").open("rb") as file:
        np.testing.assert_array_equal(np.load(file), numbers)
    with (folder / "a.png").open("rb") as file:
        assert Image.open(file).size == (30, 20)
    with contextlib.suppress(RuntimeError), files.replacing(folder / "b.npy") as file:
        np.save(file, numbers)
        raise RuntimeError
    files.write({folder / "c.json": "{}\n", folder / "d.html": "ä"})
    assert names(folder.iterdir()) == ["a.npy", "a.png", "c.json", "d.html"]
    files.append(folder / "c.json", "more\n")
    assert (folder / "c.json").read_text() == "{}\nmore\n"


def test_a_disk_that_is_full_is_not_the_buckets(folder):
    refused = pytest.raises(UserError, match=r"No space left .*; .*temporary folder first; set TMPDIR to another")
    with refused, files.writing(folder / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_folders_for_results_are_tried_and_not_overwritten(folder):
    assert files.folder_for_results(folder / "out") == folder / "out"
    assert not folder.exists()  # the trial left nothing
    with files.new_folder(folder / "new", last="b") as scratch:
        (scratch / "b").write_text("last")
        (scratch / "inner").mkdir()
        (scratch / "inner" / "a").write_text("a")
        assert not folder.exists()
    assert sorted(storage.listed(folder / "new")) == ["b", "inner/a"]
    with pytest.raises(UserError, match=r"already has b: nothing is overwritten; give a new folder with --output"):
        files.new_folder(folder / "new", last="b").__enter__()
    with pytest.raises(UserError, match=r"/new/b: it, or a folder above it, is a file; give another folder"):
        files.folder_for_results(folder / "new" / "b")
    with contextlib.suppress(RuntimeError), files.new_folder(folder / "other", last="b") as scratch:
        (scratch / "a").write_text("half")
        raise RuntimeError
    assert not (folder / "other").exists()


def test_the_trial_of_a_killed_program_does_not_make_a_folder_another_ones(folder):
    (folder / ".0123abcd.partial").write_bytes(b"")
    with files.new_folder(folder, last="b") as scratch:
        (scratch / "b").write_text("ours")
    assert (folder / "b").read_text() == "ours"


def test_a_new_folder_that_another_program_writes_to_meanwhile_is_not_mixed_with_it(folder):
    refused = pytest.raises(StoreError, match="another program wrote it")
    with refused, files.new_folder(folder, last="b") as scratch:
        for name in ("a", "b"):
            (scratch / name).write_text("ours")
        (folder / "a").write_text("another's")
    assert (folder / "a").read_text() == "another's" and not (folder / "b").exists()


def test_a_new_folder_that_cannot_be_written_to_is_refused_before_the_work(folder, monkeypatch):
    def refuse(self, data):
        raise StoreError(errno.EACCES, "no permission (HTTP 403)", str(self))

    monkeypatch.setattr(type(folder), "write_bytes", refuse)
    with pytest.raises(UserError, match=r"no permission .*; give another folder with --output"):
        files.new_folder(folder, last="b").__enter__()


def test_moves_copy_objects_and_whole_folders(folder):
    (folder / "a" / "x").write_text("1")
    (folder / "a" / "y" / "z").write_text("2")
    assert (folder / "a").rename(folder / "b") == folder / "b"
    assert sorted(storage.listed(folder)) == ["b/x", "b/y/z"]
    (folder / "b" / "x").replace(folder / "c")
    assert sorted(storage.listed(folder)) == ["b/y/z", "c"] and (folder / "c").read_text() == "1"
    with pytest.raises(FileNotFoundError):
        (folder / "nothing").rename(folder / "d")


def test_a_removal_begins_with_what_tells_that_a_checkpoint_is_complete(folder, monkeypatch):
    for name in ("5/params/a", "5/manifest.json", "5/commit_success.txt", "6/x", "50"):
        (folder / name).write_text(name)
    removed, unlink = [], type(folder).unlink
    monkeypatch.setattr(type(folder), "unlink", lambda self, **to: (removed.append(self.name), unlink(self, **to))[1])
    storage.remove(folder / "5")
    assert set(removed[:2]) == {"manifest.json", "commit_success.txt"} and removed[2:] == ["a"]
    assert sorted(storage.listed(folder)) == ["50", "6/x"]
    storage.remove(folder / "5")  # nothing is there: nothing happens


def test_a_removal_takes_the_markers_of_folders_too(folder):
    folder = folder / "5"
    for name in ("", "params/"):
        folder.bucket.blob(f"{folder.key}/{name}").upload_from_string(b"")
    assert folder.is_dir()
    folder.rmtree()
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder.rmtree()


def test_what_only_a_disk_has_is_refused(folder):
    for call in (
        lambda: folder.symlink_to("/tmp/x"),
        lambda: folder.hardlink_to("/tmp/x"),
        lambda: folder.chmod(0o600),
        lambda: folder.lstat(),
        lambda: folder.readlink(),
        lambda: list(folder.walk()),  # of etils, with another client
        lambda: folder.copy("/tmp/x"),
    ):
        with pytest.raises(io.UnsupportedOperation, match=r"a bucket has no"):
            call()
    assert not folder.is_symlink()


def test_no_bucket_is_one_line_that_says_so(folder):
    nowhere = storage.path("gs://no-such-bucket/run")
    for call in (
        lambda: nowhere.write_text("x"),
        lambda: list(nowhere.iterdir()),
        lambda: storage.listed(nowhere),
        lambda: nowhere.is_dir(),
    ):
        with pytest.raises(
            StoreError, match=r"^gs://no-such-bucket/run: the bucket does not exist; create it"
        ) as found:
            call()
        assert found.value.errno == errno.ENOENT and isinstance(found.value, OSError | UserError)
    with pytest.raises(UserError, match=r"cannot be written to gs://no-such-bucket/run: the bucket does not exist"):
        files.folder_for_results(nowhere)
