"""`input_pipeline.prepare` with archive or data set in a bucket: complete or nothing, resumed, no overwriting."""

import errno
import os
import pathlib
import shutil
import tempfile
from types import SimpleNamespace

import nyud_layout
from preparing import build, contents
import pytest

from input_pipeline import nyud, prepare, records, sources
from taskexpert_jax import storage
from taskexpert_jax.errors import StoreError, UserError

FOLDER = nyud.Builder.folder()


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write(tmp_path / "NYUDv2", train=("0003", "0001"), val=("0004",))


@pytest.fixture(autouse=True)
def scratch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """TMPDIR of the test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def objects(address: str) -> dict[str, bytes]:
    """Relative name -> content of every object."""
    folder = storage.path(address)
    return {str(path).removeprefix(f"{address}/"): path.read_bytes() for path in folder.rglob("*")}


def error(capsys: pytest.CaptureFixture[str], archive: object, data_dir: str) -> str:
    """The line of the program, which must fail."""
    assert prepare.main(["nyud", f"--archive={archive}", f"--data_dir={data_dir}", "--allow-subset"]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_data_set_in_a_bucket_is_that_on_a_disk(layout, tmp_path, bucket, scratch, capsys) -> None:
    fingerprint = build(layout, tmp_path / "built")
    assert build(layout, storage.path(bucket)) == fingerprint
    before = objects(bucket)
    assert before == contents(tmp_path / "built")
    assert os.listdir(scratch) == []
    remedy = f"remove it to build it again: gcloud storage rm -r {bucket}/{FOLDER}"
    assert error(capsys, layout, bucket) == f"error: {bucket}/{FOLDER} exists already; {remedy}"
    assert objects(bucket) == before


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_in_a_bucket(layout, tmp_path, bucket, scratch, packed: bool) -> None:
    fingerprint = build(layout, tmp_path / "built")
    if packed:
        archive = storage.path(f"{bucket}/archives/NYUDv2.tar.gz")
        archive.write_bytes(nyud_layout.write_archive(layout, tmp_path / "NYUDv2.tar.gz").read_bytes())
    else:
        archive = storage.path(f"{bucket}/NYUDv2")
        storage.copy_tree(layout, archive)
    assert build(archive, tmp_path / "again") == fingerprint
    assert build(archive, storage.path(f"{bucket}/built")) == fingerprint
    assert os.listdir(tmp_path / "again") == ["nyud"] and os.listdir(scratch) == []


def test_an_interrupted_upload_is_no_data_set_and_is_resumed(layout, bucket, monkeypatch, capsys) -> None:
    from taskexpert_jax.storage import transfer

    upload = transfer._upload

    def failing(path, target, *arguments) -> None:
        if "val" in path.name:
            raise StoreError(errno.EIO, "the store cannot be reached; check the network", str(target))
        upload(path, target, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_upload", failing)
        line = error(capsys, layout, bucket)
    assert line.startswith(f"error: {bucket}/{FOLDER}/nyud-val.array_record")
    assert line.endswith("is incomplete; the same command builds it again and sends what is missing")
    there = storage.listed(storage.path(bucket))
    assert there and f"{FOLDER}/{records.COMPLETE}" not in there
    with pytest.raises(UserError, match=rf"^the data set at {bucket}/{FOLDER} is incomplete"):
        records.fingerprint(nyud.Builder, bucket)
    build(layout, storage.path(bucket))
    after = storage.listed(storage.path(bucket))
    assert {name: after[name] for name in there} == there  # the same generations: not sent again
    assert len(after) == 5


def test_the_file_that_makes_it_complete_is_written_last(layout, bucket) -> None:
    build(layout, storage.path(bucket))
    facts = storage.listed(storage.path(bucket))
    assert max(facts, key=lambda name: facts[name].generation) == f"{FOLDER}/{records.COMPLETE}"


@pytest.mark.parametrize("name", ["nyud-train.array_record-00000", "nyud-train.array_record-00007"])
def test_an_unfinished_upload_of_other_data_is_not_overwritten(layout, bucket, name: str, capsys) -> None:
    (storage.path(bucket) / FOLDER / name).write_bytes(b"other")
    line = error(capsys, layout, bucket)
    assert line == (
        f"error: {bucket}/{FOLDER}/{name}: it has another content than the file to send; another program wrote it: "
        f"remove the folder and start again; {bucket}/{FOLDER} is incomplete"
    )
    assert objects(bucket) == {f"{FOLDER}/{name}": b"other"}


def test_two_that_build_other_data_at_once_do_not_mix(layout, bucket, monkeypatch, capsys) -> None:
    """The other one writes after this one has seen an empty folder."""
    from taskexpert_jax.storage import transfer

    listed, other = transfer.listed, storage.path(bucket) / FOLDER / "nyud-val.array_record-00000"

    def just_before(folder):
        found = listed(folder)
        if not found:
            other.write_bytes(b"other")
        return found

    monkeypatch.setattr(transfer, "listed", just_before)
    assert "nyud-val.array_record-00000: it has another content" in error(capsys, layout, bucket)
    assert other.read_bytes() == b"other" and not (other.parent / records.COMPLETE).exists()


def test_what_cannot_be_right_is_refused_before_the_work(
    layout, bucket, tmp_path, scratch, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(prepare, "_build", None)
    assert error(capsys, layout, "gs://no-such-bucket/data") == (
        "error: results cannot be written to gs://no-such-bucket/data: the bucket does not exist; create it, or check "
        "its name; give another folder with --data_dir"
    )
    absent = (
        f"error: --archive={bucket}/NYUDv2.tar.gz does not exist; give NYUDv2.tar.gz or the folder extracted from it"
    )
    assert error(capsys, f"{bucket}/NYUDv2.tar.gz", bucket) == absent
    archive = storage.path(f"{bucket}/NYUDv2")
    storage.copy_tree(layout, archive)
    assert "lies inside of the archive folder" in error(capsys, archive, f"{archive}/built")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 10))
    line = error(capsys, archive, bucket)
    assert line.startswith(f"error: {archive}: 1 MiB do not fit on the disk of {scratch}/")
    assert line.endswith("0 MiB free; free space, or set TMPDIR for a --data_dir in a bucket")
    assert os.listdir(scratch) == [] and set(objects(bucket)) == {f"NYUDv2/{name}" for name in contents(layout)}


def test_a_full_scratch_disk_is_named(layout, tmp_path, bucket, monkeypatch, capsys) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/archive/x.png")

    monkeypatch.setattr(prepare.archives, "extract", full)
    archive = nyud_layout.write_archive(layout, tmp_path / "NYUDv2.tar.gz")
    assert error(capsys, archive, bucket) == (
        "error: /scratch/archive/x.png: No space left on device; nothing was built; "
        "set TMPDIR to a folder on a larger disk"
    )
    assert objects(bucket) == {}


def test_a_record_that_the_bucket_does_not_give_is_not_replaced_as_a_damaged_one(layout, bucket) -> None:
    build(layout, storage.path(bucket))
    source = nyud.source(SimpleNamespace(data_dir=bucket), "train")
    replacing = sources.ReplacingSource(source, "nyud train", limit=1)
    assert replacing.load(1)["id"] == source.load(1)["id"]
    source._records = [None, None]  # no read gives a record
    with pytest.raises(StoreError, match=rf"^{bucket}/{FOLDER}: record 0 cannot be read .*; start again"):
        replacing.load(0)
