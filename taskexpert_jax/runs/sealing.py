"""The files of a checkpoint: whether all of them are there and as they were written.

Once a checkpoint is complete, `manifest.json` in its folder lists the size and checksum of every file.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import re
import shutil
import zlib

MANIFEST = "manifest.json"
_BLOCK = 1 << 22  # bytes read at a time


def files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files of a checkpoint but its manifest."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path


def size(folder: pathlib.Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in files(folder))


def seal(folder: pathlib.Path) -> None:
    """Writes the manifest of a checkpoint that is complete; all of it or nothing is there at any moment."""
    found = {str(path.relative_to(folder)): [path.stat().st_size, _checksum(path)] for path in files(folder)}
    partial = folder.parent / f".{folder.name}.{MANIFEST}"  # beside it, for the folder may go at any time
    try:
        with partial.open("w") as file:
            json.dump(found, file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)


def sealed(folder: pathlib.Path) -> bool:
    """Whether there is a manifest to hold the files against."""
    return (folder / MANIFEST).is_file()


def problem(folder: pathlib.Path, *parts: str) -> str | None:
    """What is wrong with the first file that differs from the manifest; None where all are as they were written.

    Where there is no manifest, for the program ended before it was written, nothing is found here.

    parts: names of the folders and files in `folder` that alone are read, such as `metrics`; none: all.
    """
    if not sealed(folder):
        return None
    try:
        listed = json.loads((folder / MANIFEST).read_text())
        expected = {str(name): (int(length), int(checksum)) for name, (length, checksum) in listed.items()}
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    if not expected:
        return f"{MANIFEST} lists nothing"
    for name, (length, checksum) in expected.items():
        wanted = not parts or pathlib.PurePath(name).parts[0] in parts
        if wanted and (found := _difference(folder / name, length, checksum)):
            return f"{name} {found}"
    return None


def _difference(path: pathlib.Path, length: int, checksum: int) -> str | None:
    if not path.is_file():
        return "is missing"
    try:
        if path.stat().st_size != length:
            return f"has {path.stat().st_size} of {length} bytes"
        return None if _checksum(path) == checksum else "has other bytes than were written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def set_aside(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Moves a checkpoint into another folder, under its own name or that with a number; returns where it is now."""
    to.mkdir(exist_ok=True)
    names = (folder.name if i == 0 else f"{folder.name}_{i}" for i in range(10_000))
    target = next(to / name for name in names if not (to / name).exists())
    return folder.rename(target)


def put_by(folder: pathlib.Path, to: pathlib.Path) -> None:
    """Moves a checkpoint out of the way of another of its step, which is about to be written."""
    to.mkdir(exist_ok=True)
    drop(to / folder.name)
    to.mkdir(exist_ok=True)
    folder.rename(to / folder.name)


def put_back(root: pathlib.Path, by: pathlib.Path) -> None:
    """Undoes `put_by` for every checkpoint whose successor in `root` is not there, or is not sealed."""
    for kept in sorted(by.glob("*")):
        successor = root / kept.name
        if not sealed(successor):
            shutil.rmtree(successor, ignore_errors=True)
            kept.rename(successor)
        drop(kept)


def drop(kept: pathlib.Path) -> None:
    """Removes a checkpoint that was put by, and the folder of such when it is empty; neither need be there."""
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):
        kept.parent.rmdir()


def remove_unfinished(root: pathlib.Path) -> list[int]:
    """Removes what a write that was broken off has left in a folder of checkpoints; returns the steps."""
    steps = []
    for path in sorted(root.glob("*.orbax-checkpoint-tmp*")):
        steps += [int(step) for step in re.findall(r"^\d+", path.name)]
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(f".*.{MANIFEST}"):
        path.unlink(missing_ok=True)
    return sorted(steps)


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
