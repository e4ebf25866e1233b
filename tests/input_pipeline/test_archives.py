"""Faults of an archive, as tar file or folder: all are reported, one line each, and nothing is built."""

from collections.abc import Callable
import gzip
import io
import pathlib
import re
import shutil
import tarfile
from types import ModuleType, SimpleNamespace

import numpy as np
import nyud_layout
from PIL import Image
from preparing import contents, faults
import pytest

from input_pipeline import archives, arrays, nyud, pascal_archive, prepare
from taskexpert_jax.errors import UserError


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write(tmp_path / "NYUDv2", train=("0003", "0001", "0002"), val=("0004",))


@pytest.fixture
def archive(layout: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write_archive(layout, layout.parent / "NYUDv2.tar.gz")


def _ids(split: str, content: str | bytes | None) -> Callable[[pathlib.Path], None]:
    def write(layout: pathlib.Path) -> None:
        path = layout / "gt_sets" / f"{split}.txt"
        path.unlink()
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def _remove(*members: str) -> Callable[[pathlib.Path], None]:
    def remove(layout: pathlib.Path) -> None:
        for member in members:
            (layout / member).unlink()

    return remove


def _spoil(*members: str) -> Callable[[pathlib.Path], None]:
    def spoil(layout: pathlib.Path) -> None:
        for member in members:
            (layout / member).write_text("<html>not found</html>")

    return spoil


def _all_of_them(layout: pathlib.Path) -> None:
    _remove("edge/0001.png", "images/0004.png")(layout)
    _spoil("normals/0003.png", "normals/0002.png", "images/0001.png")(layout)


FAULTS: list[tuple[Callable[[pathlib.Path], None], list[str]]] = [  # damage, and a pattern for each line
    (_ids("val", None), [r"gt_sets/val.txt is missing"]),
    (_ids("val", "\n"), [r"gt_sets/val.txt .*no id"]),
    (_ids("val", b"\xff\xfe0\x00"), [r"gt_sets/val.txt .*corrupt.*not text"]),
    (_ids("train", "0003\n0001\n0003\n"), [r"gt_sets/train.txt .*0003 more than once"]),
    (_ids("val", "0002\n"), [r"gt_sets/val.txt .*0002.* gt_sets/train.txt"]),
    (_ids("val", "../x\n"), [r"gt_sets/val.txt .*'\.\./x'.*outside"]),
    (
        lambda layout: (_ids("train", "")(layout), _ids("val", "0004\n0004\n")(layout)),
        [r"gt_sets/train.txt .*no id", r"gt_sets/val.txt .*0004 more than once"],
    ),
    (
        _remove("images/0002.png", "depth/0004.npy"),
        [
            r"images/0002.png is missing.* gt_sets/train.txt .*0002",
            r"depth/0004.npy is missing.* gt_sets/val.txt .*0004",
        ],
    ),
    (
        _all_of_them,
        [
            r"edge/0001.png is missing.* gt_sets/train.txt .*0001",
            r"images/0004.png is missing.* gt_sets/val.txt .*0004",
            r"normals/0003.png is corrupt.*decode",
            r"normals/0002.png is corrupt.*decode",
        ],
    ),
    (
        _spoil("images/0003.png", "depth/0003.npy", "edge/0004.png"),  # of the first example and of the other split
        [
            r"images/0003.png is corrupt.*decode",
            r"depth/0003.npy is corrupt.*load",
            r"edge/0004.png is corrupt.*decode",
        ],
    ),
]


def test_a_byte_order_mark_leaves_no_example_out(layout: pathlib.Path) -> None:
    _ids("train", "\ufeff0003\r\n0001\r\n")(layout)
    listing = archives.list_examples(layout, nyud, allow_subset=True)
    assert listing.ids["train"] == ["0003", "0001"] and listing.left_out["train"] == 0


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize(("damage", "expected"), FAULTS)
def test_all_faults_are_named(
    layout: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
    damage: Callable[[pathlib.Path], None],
    expected: list[str],
) -> None:
    monkeypatch.setattr(nyud, "PUBLISHED_COUNTS", {"train": 3, "val": 1})
    damage(layout)
    (tmp_path / "built").mkdir()
    archive = nyud_layout.write_archive(layout, tmp_path / "NYUDv2.tar", "w") if packed else layout
    before = contents(layout)
    lines, error = faults(capsys, archive, tmp_path / "built")
    found = [line for line in lines if "names 2 ids" not in line]
    for line, pattern in zip(found, expected, strict=True):
        assert re.match(rf"{pattern}.*; \w+ the archive", line), line
    count = f"{len(lines)} faults" if len(lines) > 1 else "1 fault"
    assert error == f"error: {archive}: {count}, see above; nothing was built"
    assert contents(layout) == before


def test_of_many_faults_the_first_are_shown_and_all_are_counted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"{number:04d}" for number in range(50)]
    layout = nyud_layout.write(tmp_path / "NYUDv2", train=ids[:40], val=ids[40:], height=2, width=3)
    _spoil(*(f"edge/{example_id}.png" for example_id in ids[5:]))(layout)
    (tmp_path / "built").mkdir()
    lines, error = faults(capsys, layout, tmp_path / "built", "--allow-subset")
    assert [line.split()[0] for line in lines[:-1]] == [f"edge/{example_id}.png" for example_id in ids[5:25]]
    assert lines[-1] == "... and 25 more"
    assert error == f"error: {layout}: 45 faults, see above; nothing was built"


def test_a_label_may_have_one_of_several_files(layout: pathlib.Path) -> None:
    """The first existing file is used, as for PASCAL-Context's classes; the fault names both."""
    module = SimpleNamespace(
        ID_FILES={"val": "gt_sets/val.txt"},
        PUBLISHED_COUNTS={"val": 1},
        members=lambda example_id: {"semseg": (f"other/{example_id}.png", f"segmentation/{example_id}.png")},
    )
    listing = archives.list_examples(layout, module, allow_subset=False)  # pyright: ignore[reportArgumentType]
    assert (listing.ids, listing.missing) == ({"val": ["0004"]}, {})
    shutil.rmtree(layout / "segmentation")
    listing = archives.list_examples(layout, module, allow_subset=False)  # pyright: ignore[reportArgumentType]
    ((example_id, (fault,)),) = listing.missing.items()
    assert example_id == "0004"
    assert re.match(r"other/0004.png or segmentation/0004.png is missing.* gt_sets/val.txt .*0004", fault), fault


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _replace(path: pathlib.Path) -> None:
    path.write_text("<html>not found</html>\n" * 1000)


def _truncate_plain(path: pathlib.Path) -> None:
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(content[: len(content) // 2 + 100])


def _wrong_checksum(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # checksum of the uncompressed data, as if a bit of a stored block were flipped
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _replace, _truncate_plain, _wrong_checksum])
def test_a_damaged_archive_ends_in_one_line(
    archive: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], damage
) -> None:
    damage(archive)
    (tmp_path / "built").mkdir()
    lines, error = faults(capsys, archive, tmp_path / "built")
    assert lines == []
    assert error == f"error: {archive}: it is not a tar file, or it is truncated or corrupt; get the archive again"


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
    with pytest.raises(UserError, match=rf"^{unsafe}.*evil"):
        prepare.prepare("nyud", unsafe, tmp_path / "built")
    assert contents(tmp_path) == before


def test_few_bits_of_grey_are_ids_of_classes_and_brightness_elsewhere(tmp_path: pathlib.Path) -> None:
    for bits in (1, 2, 4):
        ids = np.uint8([[0, 1, 2**bits - 1]])
        Image.fromarray(ids).save(tmp_path / "a.png", bits=bits)
        np.testing.assert_array_equal(archives.read_picture(tmp_path, "a.png", 1, ids=True)[..., 0], ids)
        brightness = ids.astype(int) * 255 // (2**bits - 1)
        np.testing.assert_array_equal(archives.read_picture(tmp_path, "a.png", 1)[..., 0], brightness)


@pytest.mark.parametrize("module", [nyud, pascal_archive])
def test_classes_are_read_as_ids(tmp_path: pathlib.Path, module: ModuleType) -> None:
    """A class of 1 in a PNG of 1 bit is not 255, which is void."""
    Image.fromarray(np.uint8([[1, 1]])).save(tmp_path / "a.png", bits=1)
    assert module._read_classes(tmp_path, "a.png").ravel().tolist() == ([0, 0] if module is nyud else [1, 1])


@pytest.mark.parametrize("content", [b"PK\3\4 no archive", b"\x93NUMPY\1\0v\0{'descr': '<f4'" + b"(" * 100])
def test_a_depth_that_makes_numpy_raise_something_else_is_a_fault(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(archives.Problems, match=r"a\.npy is corrupt, it does not load"):
        arrays.read_depth(tmp_path, "a.npy")
