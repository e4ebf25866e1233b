"""Seals of checkpoints: a manifest with the size and checksum of every file, to detect damage.

Once a checkpoint is complete, `manifest.json` is written to its folder.
"""

from collections.abc import Iterator, Mapping
import json
import pathlib
import re
import shutil
import zlib

from taskexpert_jax import files, json_file
from taskexpert_jax.errors import shown

MANIFEST = "manifest.json"
METRICS = "metrics/metrics"  # Orbax's file name for a checkpoint's metrics
RECORD = "data/metadata"  # Orbax's file name for the position in the data and the version of the code
_LONGEST_NAME = 500  # of a file of a checkpoint
_BLOCK = 1 << 22  # bytes read at a time


def contents(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files of a checkpoint except its manifest."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            yield path


def size(folder: pathlib.Path) -> int:
    """Total size of a folder's files in bytes, without the manifest."""
    return sum(path.stat().st_size for path in contents(folder))


def seal(folder: pathlib.Path) -> None:
    """Writes the manifest of a complete checkpoint, atomically."""
    found = {str(path.relative_to(folder)): (path.stat().st_size, _checksum(path)) for path in contents(folder)}
    _write_manifest(folder, found)


def add(folder: pathlib.Path, name: str, text: str) -> None:
    """Adds a file to a sealed checkpoint; other files are neither read nor changed.

    The file belongs to the checkpoint once the manifest lists it. The checkpoint stays valid throughout.
    """
    found = _listed(folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    _write(folder, path, text)
    _write_manifest(folder, {**found, name: (path.stat().st_size, _checksum(path))})


def has(folder: pathlib.Path, name: str) -> bool:
    """True if the checkpoint is sealed with a file of this name."""
    return sealed(folder) and name in _listed(folder)


def sealed(folder: pathlib.Path) -> bool:
    """True if the checkpoint has a manifest."""
    return (folder / MANIFEST).is_file()


def problem(folder: pathlib.Path, *parts: str) -> str | None:
    """Describes the first file that differs from the manifest; None if all match, or if there is no manifest.

    A checkpoint whose folder was renamed or copied to another step is described too.

    parts: restricts the check to these files and folders of `folder`, such as `metrics`; default: all.
    """
    if not sealed(folder):
        return None
    try:
        expected = _listed(folder)
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except json_file.MalformedError as error:
        return f"{MANIFEST} is malformed: {error}"
    if not expected:
        return f"{MANIFEST} lists no files"
    for name, (length, checksum) in expected.items():
        wanted = not parts or pathlib.PurePath(name).parts[0] in parts
        if wanted and (found := _difference(folder / name, length, checksum)):
            return f"{name} {found}"
    return renamed(folder)


def renamed(folder: pathlib.Path) -> str | None:
    """Describes a checkpoint that is of another step than its folder says; None if it has no readable record."""
    try:
        step = json_file.read(folder / RECORD, {"next_batch": int})["next_batch"]
    except (OSError, json_file.MalformedError):
        return None
    return None if folder.name == str(step) else f"it is of step {step}, copied or renamed"


def unlisted(folder: pathlib.Path, *parts: str) -> list[str]:
    """Files of a sealed checkpoint that its manifest does not list; none if the manifest cannot be read.

    parts: as for `problem`.
    """
    try:
        expected = _listed(folder)
    except (OSError, json_file.MalformedError):
        return []
    names = (path.relative_to(folder) for path in contents(folder))
    return [str(name) for name in names if str(name) not in expected and (not parts or name.parts[0] in parts)]


def _listed(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """The manifest: name -> (size in bytes, CRC-32)."""
    listed = json_file.read(folder / MANIFEST, json_file.Each([int, int]))
    for name in listed:
        if len(name) > _LONGEST_NAME or not name.isprintable() or not pathlib.PurePath(name).parts:
            raise json_file.MalformedError(f"{shown(name)} is no name of a file")
    return {name: (length, checksum) for name, (length, checksum) in listed.items()}


def _write_manifest(folder: pathlib.Path, listed: Mapping[str, tuple[int, int]]) -> None:
    _write(folder, folder / MANIFEST, json.dumps(listed, indent=0))


def _write(folder: pathlib.Path, path: pathlib.Path, text: str) -> None:
    """Writes a file of a checkpoint atomically."""
    partial = folder.parent / f".{folder.name}.{MANIFEST}"  # outside the folder, which may be deleted at any time
    with files.atomic(path, partial, durable=True) as file:
        file.write(text.encode())


def _difference(path: pathlib.Path, length: int, checksum: int) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != length:
            return f"has {path.stat().st_size} of {length} bytes"
        return None if _checksum(path) == checksum else "has another checksum than when it was written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def set_aside(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Moves a checkpoint into another folder, with a number appended if its name is taken; returns the new path."""
    to.mkdir(exist_ok=True)
    names = (folder.name if i == 0 else f"{folder.name}_{i}" for i in range(10_000))
    target = next(to / name for name in names if not (to / name).exists())
    return folder.rename(target)


def remove_unfinished(root: pathlib.Path) -> list[str]:
    """Removes remains of interrupted writes from a folder of checkpoints; returns what they are of."""
    found = set()
    for path in sorted(root.glob("*.orbax-checkpoint-tmp*")):
        found |= {f"step {step}" for step in re.findall(r"^\d+", path.name)}
        shutil.rmtree(path, ignore_errors=True)
    for manifest in root.glob(f"[0-9]*/{MANIFEST}"):
        if unlisted(manifest.parent, "metrics") == [METRICS]:  # `add` lists them last
            (manifest.parent / METRICS).unlink()
            found.add(f"the evaluation of step {manifest.parent.name}")
    for path in root.glob(f".*.{MANIFEST}"):
        path.unlink(missing_ok=True)
    return sorted(found)


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value
