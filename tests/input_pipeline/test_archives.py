"""Faults of an archive, packed or as a folder: all are named, each in one line, and nothing is built."""

from collections.abc import Callable
import gzip
import io
import pathlib
import shutil
import tarfile
from types import SimpleNamespace

import nyud_layout
from preparing import contents, faults
import pytest

from input_pipeline import archives, nyud, prepare
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


AGAIN = "get the archive again"
FAULTS: list[tuple[Callable[[pathlib.Path], None], list[str]]] = [
    (_ids("val", None), ["gt_sets/val.txt is missing; give the archive, or the folder extracted from it"]),
    (_ids("val", "\n"), [f"gt_sets/val.txt names no id; {AGAIN}"]),
    (_ids("val", b"\xff\xfe0\x00"), [f"gt_sets/val.txt is corrupt, it is not text; {AGAIN}"]),
    (_ids("train", "0003\n0001\n0003\n"), [f"gt_sets/train.txt names 0003 more than once; {AGAIN}"]),
    (_ids("val", "0002\n"), [f"gt_sets/val.txt names 0002, and so does gt_sets/train.txt; {AGAIN}"]),
    (_ids("val", "../x\n"), [f"gt_sets/val.txt names '../x', which would lie outside of its folder; {AGAIN}"]),
    (
        lambda layout: (_ids("train", "")(layout), _ids("val", "0004\n0004\n")(layout)),
        [f"gt_sets/train.txt names no id; {AGAIN}", f"gt_sets/val.txt names 0004 more than once; {AGAIN}"],
    ),
    (
        _remove("images/0002.png", "depth/0004.npy"),
        [
            f"images/0002.png is missing, though gt_sets/train.txt names 0002; {AGAIN}",
            f"depth/0004.npy is missing, though gt_sets/val.txt names 0004; {AGAIN}",
        ],
    ),
    (
        _all_of_them,
        [
            f"edge/0001.png is missing, though gt_sets/train.txt names 0001; {AGAIN}",
            f"images/0004.png is missing, though gt_sets/val.txt names 0004; {AGAIN}",
            f"normals/0003.png is corrupt, it does not decode as a picture; {AGAIN}",
            f"normals/0002.png is corrupt, it does not decode as a picture; {AGAIN}",
        ],
    ),
    (
        _spoil("images/0003.png", "depth/0003.npy", "edge/0004.png"),  # of the first frame, and of the other split
        [
            f"images/0003.png is corrupt, it does not decode as a picture; {AGAIN}",
            f"depth/0003.npy is corrupt, it does not load as an array of numbers; {AGAIN}",
            f"edge/0004.png is corrupt, it does not decode as a picture; {AGAIN}",
        ],
    ),
]


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
    assert [line for line in lines if "names 2 ids" not in line] == expected
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
    """As PASCAL-Context's classes: the fault names the alternatives."""
    module = SimpleNamespace(
        ID_FILES={"val": "gt_sets/val.txt"},
        PUBLISHED_COUNTS={"val": 1},
        members=lambda example_id: {"semseg": (f"other/{example_id}.png", f"segmentation/{example_id}.png")},
    )
    listing = archives.list_examples(layout, module, allow_subset=False)  # pyright: ignore[reportArgumentType]
    assert (listing.ids, listing.missing) == ({"val": ["0004"]}, {})
    shutil.rmtree(layout / "segmentation")
    listing = archives.list_examples(layout, module, allow_subset=False)  # pyright: ignore[reportArgumentType]
    assert listing.missing == {
        "0004": [f"other/0004.png or segmentation/0004.png is missing, though gt_sets/val.txt names 0004; {AGAIN}"]
    }


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
