"""Result files: complete or not at all, and folders that cannot be written."""

import contextlib
import errno
import os
import pathlib

import numpy as np
from PIL import Image
import pytest

from taskexpert_jax import files
from taskexpert_jax.errors import UserError


@pytest.fixture
def full(monkeypatch):
    """Makes the disk refuse what is longer than some bytes, for every file that is opened."""

    def fill(room):
        class Limited(files.io.FileIO):
            def write(self, data):
                if len(data) > room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        monkeypatch.setattr(files.io, "FileIO", Limited)

    return fill


def test_a_full_disk_leaves_the_file_of_before_and_names_file_and_reason(tmp_path, full):
    path, other = tmp_path / "metrics.json", tmp_path / "report.html"
    files.write({path: "old\n", other: "old\n"})
    full(100)
    with pytest.raises(UserError, match=r"report.html cannot be written: No space left on device; free space"):
        files.write({path: "new\n", other: "new\n" * 100})
    assert (path.read_text(), other.read_text()) == ("old\n", "old\n")
    assert sorted(tmp_path.iterdir()) == [path, other]


@pytest.mark.parametrize(
    "save",
    [
        lambda file: np.save(file, np.zeros(100_000)),
        lambda file: np.savez_compressed(file, a=np.random.default_rng(0).random(100_000)),
        lambda file: Image.effect_noise((300, 300), 90).save(file, "PNG"),
    ],
    ids=["npy", "npz", "png"],
)
def test_arrays_and_images_on_a_full_disk_are_named_with_the_reason(tmp_path, full, save):
    full(1000)
    refused = pytest.raises(UserError, match=r"/file cannot be written: No space left on device")
    with refused, files.replacing(tmp_path / "file") as file:
        save(file)
    assert list(tmp_path.iterdir()) == []


def test_arrays_and_images_are_written_whole(tmp_path):
    numbers = np.arange(100_000.0)
    with files.replacing(tmp_path / "a.npy") as file:
        np.save(file, numbers)
    with files.replacing(tmp_path / "a.png") as file:
        Image.new("RGB", (30, 20)).save(file, "PNG")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), numbers)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (30, 20)


def test_names_that_are_not_utf8_are_escaped_in_texts(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    files.write({tmp_path / "a.html": f"Küche {name}"})
    assert (tmp_path / "a.html").read_bytes() == "Küche caf\\udce9".encode()


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(UserError, match=r"a.json cannot be written: its folder has been deleted"):
        files.write({tmp_path / "gone" / "a.json": ""})
    assert not (tmp_path / "gone").exists()


def test_a_file_that_is_a_folder_is_said(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a.json cannot be written: Is a directory"):
        files.write({tmp_path / "a.json": ""})


def test_a_folder_for_results_is_made_and_left_empty(tmp_path):
    folder = files.folder_for_results(tmp_path / "a" / "b")
    assert folder.is_dir() and list(folder.iterdir()) == []


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_where_the_folder_should_be_is_said(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*/file.*is a file; give another folder with"):
        files.folder_for_results(tmp_path / "file" / below)


# Permissions do not stop root, and tests may run as root: a disk that is read-only or full refuses the trial.
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_takes_no_files_is_found_before_the_work(tmp_path, monkeypatch, code):
    def refuse(*_, **options):
        raise OSError(code, os.strerror(code), str(options["dir"]))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"results cannot be written to {tmp_path}: {os.strerror(code)}; give another"):
        files.folder_for_results(pathlib.Path(tmp_path))


def test_a_new_folder_has_all_or_nothing(tmp_path):
    """Also where it exists and is empty, as a mounted one; what a killed program left in it is no hindrance."""
    path = tmp_path / "out"
    with contextlib.suppress(RuntimeError), files.new_folder(path, last="b") as folder:
        (folder / "a").write_text("half")
        assert [item.suffix for item in path.iterdir()] == [".partial"]
        raise RuntimeError
    assert not path.exists()
    (path / ".0f.partial").mkdir(parents=True)
    with files.new_folder(path, last="a") as folder:
        (folder / "a").write_text("last")
        (folder / "b").mkdir()
    assert sorted(item.name for item in path.iterdir()) == [".0f.partial", "a", "b"]
    with pytest.raises(UserError, match=r"already has (a|b): nothing is overwritten; give a new folder with --to"):
        files.new_folder(path, last="a", flag="--to").__enter__()


def test_the_last_file_of_a_new_folder_appears_last(tmp_path, monkeypatch):
    moved, rename = [], pathlib.Path.rename
    monkeypatch.setattr(pathlib.Path, "rename", lambda self, to: (moved.append(to.name), rename(self, to))[1])
    with files.new_folder(tmp_path / "out", last="a") as folder:
        for name in "cab":
            (folder / name).touch()
    assert len(moved) == 3 and moved[-1] == "a"
