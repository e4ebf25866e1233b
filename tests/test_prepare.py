"""The program that builds a data set: both forms of an archive, nothing written elsewhere, one line for each fault."""

import gzip
import io
import os
import pathlib
import tarfile

import nyud_layout
import pytest

from input_pipeline import prepare
from taskexpert_jax.errors import UserError


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write(tmp_path / "NYUDv2", train=["0001", "0002", "0003"], val=["0004"])


@pytest.fixture
def archive(layout: pathlib.Path) -> pathlib.Path:
    path = layout.parent / "NYUDv2.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(layout, "NYUDv2")
    return path


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(capsys: pytest.CaptureFixture[str], archive: pathlib.Path, data_dir: pathlib.Path) -> tuple[int, str, str]:
    """Exit status, standard output, and the last line of standard error, of the program."""
    status = prepare.main(["nyud", f"--archive={archive}", f"--data_dir={data_dir}"])
    out, err = capsys.readouterr()
    return status, out, err.rstrip("\n").rpartition("\n")[2]


def test_folder_and_archive_build_the_same(layout: pathlib.Path, archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = contents(layout)
    prepare.prepare("nyud", archive, tmp_path / "a")
    prepare.prepare("nyud", layout, tmp_path / "b")
    prepare.prepare("nyud", tmp_path, tmp_path / "c")  # the folder that the archive was extracted in
    built = contents(tmp_path / "a")
    assert {os.path.dirname(path) for path in built} == {"nyud/1.0.0"}
    assert len([path for path in built if "array_record" in path]) == 2
    assert built == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert contents(layout) == before
    assert sorted(os.listdir(tmp_path / "a")) == ["nyud"]  # no temporary folder stays


def test_summary_puts_the_published_counts_beside(
    layout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, layout, tmp_path / "built")
    assert status == 0
    lines = out.splitlines()
    assert lines[:2] == ["train: 3 examples (published: 795)", "val: 1 examples (published: 654)"]
    assert lines[2].startswith(f"built {tmp_path}/built/nyud/1.0.0: ") and len(lines) == 3


def test_a_built_data_set_is_not_overwritten(
    layout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, layout, tmp_path / "built")[0] == 0
    before = contents(tmp_path / "built")
    status, out, error = run(capsys, layout, tmp_path / "built")
    assert (status, out) == (2, "")
    assert error == f"error: {tmp_path}/built/nyud/1.0.0 is there already; delete it to build it again"
    assert contents(tmp_path / "built") == before


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _replace(path: pathlib.Path) -> None:
    path.write_text("<html>not found</html>\n" * 1000)


def _truncate_plain(path: pathlib.Path) -> None:
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(content[: len(content) // 2 + 100])


def _wrong_checksum(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the uncompressed data: what a changed bit in a stored block leads to
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _replace, _truncate_plain, _wrong_checksum])
def test_a_damaged_archive_ends_in_one_line(
    archive: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], damage
) -> None:
    damage(archive)
    status, out, error = run(capsys, archive, tmp_path / "built")
    assert (status, out) == (2, "")
    assert error == f"error: {archive}: it is not a tar file, or it is truncated or corrupt; get the archive again"
    assert os.listdir(tmp_path / "built") == []


def test_an_archive_without_a_member_names_it(
    layout: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (layout / "images" / "0002.png").unlink()
    archive = tmp_path / "NYUDv2.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout, "NYUDv2")
    status, out, error = run(capsys, archive, tmp_path / "built")
    assert (status, out) == (2, "")
    assert error == (
        f"error: {archive}: images/0002.png is missing, though gt_sets/train.txt names 0002; get the archive again"
    )
    assert os.listdir(tmp_path / "built") == []


def _outside(info: tarfile.TarInfo) -> None:
    info.name = "NYUDv2/../../../evil.txt"


def _link(info: tarfile.TarInfo) -> None:
    info.name, info.type, info.linkname, info.size = "NYUDv2/evil", tarfile.SYMTYPE, "/etc", 0


@pytest.mark.parametrize("disguise", [_outside, _link])
def test_an_unsafe_member_is_refused(archive: pathlib.Path, tmp_path: pathlib.Path, disguise) -> None:
    info = tarfile.TarInfo("NYUDv2/harmless.txt")
    info.size = 4
    disguise(info)
    unsafe = tmp_path / "unsafe.tar"
    with tarfile.open(unsafe, "w") as tar:
        tar.addfile(info, io.BytesIO(b"evil"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"refused, as a member is unsafe to extract: .*evil"):
        prepare.prepare("nyud", unsafe, tmp_path / "built")
    assert contents(tmp_path) == before


def test_arguments_that_cannot_be_right(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        UserError, match=r"^--archive=.*/absent.tar.gz does not exist; give NYUDv2.tar.gz or the folder"
    ):
        prepare.prepare("nyud", tmp_path / "absent.tar.gz", tmp_path / "built")
    with pytest.raises(UserError, match=r"^--data_dir=.*/NYUDv2/tfds lies inside of the archive folder"):
        prepare.prepare("nyud", layout, layout / "tfds")
    with pytest.raises(UserError, match=r"^unknown data set 'nyudd': no file input_pipeline/nyudd.py"):
        prepare.prepare("nyudd", layout, tmp_path / "built")
    with pytest.raises(UserError, match=r"^unknown data set 'transforms': no file .* with a function `source`"):
        prepare.prepare("transforms", layout, tmp_path / "built")
    with pytest.raises(UserError, match=r"^data set 'scenes' is not built from an archive"):
        prepare.prepare("scenes", layout, tmp_path / "built")
    assert not (tmp_path / "built").exists()
