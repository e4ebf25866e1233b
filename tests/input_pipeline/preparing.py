"""Helpers of the tests of `input_pipeline.prepare`: run it, and inspect what it writes and prints."""

import os
import pathlib

import pytest

from input_pipeline import nyud, prepare, records


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file, including hidden ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(archive: pathlib.Path, data_dir: pathlib.Path) -> str:
    """Builds a subset of NYUD; returns its fingerprint."""
    prepare.prepare("nyud", archive, data_dir, allow_subset=True)
    return records.fingerprint(nyud.Builder, str(data_dir))


def faults(
    capsys: pytest.CaptureFixture[str], archive: pathlib.Path, data_dir: pathlib.Path, *flags: str
) -> tuple[list[str], str]:
    """Runs the program, which must fail and write nothing; returns the lines of faults and the last line."""
    before = contents(data_dir)
    assert prepare.main(["nyud", f"--archive={archive}", f"--data_dir={data_dir}", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert contents(data_dir) == before
    assert not [name for name in os.listdir(data_dir) if name.startswith(".")]
    lines = err.splitlines()
    return lines[:-1], lines[-1]
