"""Seals of checkpoints: a manifest with the size and checksum of every file, to detect damage.

Once a checkpoint is complete, `manifest.json` is written to its folder. In a bucket, sizes and checksums are those that
the store keeps of each object, so nothing is read again.
"""

from collections.abc import Iterator, Mapping
import json
import pathlib
import re
from typing import NamedTuple
import zlib

from taskexpert_jax import files, json_file, storage
from taskexpert_jax.errors import StoreError, UserError, shown

MANIFEST = "manifest.json"
METRICS = "metrics/metrics"  # Orbax's file name for a checkpoint's metrics
RECORD = "data/metadata"  # Orbax's file name for the position in the data and the version of the code
METADATA = "_CHECKPOINT_METADATA"  # Orbax's facts about a checkpoint
COMMIT = "commit_success.txt"  # Orbax's file in a complete checkpoint of a bucket, which has no renaming of folders
_LONGEST_NAME = 500  # of a file of a checkpoint
_ALTERED = "has another checksum than when it was written"
_BLOCK = 1 << 22  # bytes read at a time


class Sum(NamedTuple):
    """Size in bytes and checksum of a file: its CRC-32 on a disk, its CRC-32C in a bucket."""

    size: int
    checksum: int
    castagnoli: bool = False  # CRC-32C


def contents(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files of a checkpoint except its manifest."""
    for path in sorted(folder.rglob("*")):
        if (storage.is_bucket(path) or path.is_file()) and path != folder / MANIFEST:
            yield path


def size(folder: pathlib.Path) -> int:
    """Total size of a folder's files in bytes, without the manifest."""
    if storage.is_bucket(folder):
        return sum(each.size for each in _in_bucket(folder).values())
    return sum(path.stat().st_size for path in contents(folder))


def saved_at(folder: pathlib.Path) -> float:
    """Seconds since 1970 at which a checkpoint was completed.

    Raises:
      OSError: there is no such checkpoint.
    """
    if not storage.is_bucket(folder):
        return folder.stat().st_mtime
    try:  # a bucket knows no times of folders
        return (folder / COMMIT).stat().st_mtime
    except FileNotFoundError:
        return (folder / MANIFEST).stat().st_mtime


def _in_bucket(folder: pathlib.Path) -> dict[str, Sum]:
    """The store's own sizes and checksums of all objects of a checkpoint except its manifest."""
    found = storage.listed(folder)
    return {name: Sum(each.size, each.crc32c, True) for name, each in found.items() if name != MANIFEST}


def seal(folder: pathlib.Path) -> None:
    """Writes the manifest of a complete checkpoint, atomically."""
    if storage.is_bucket(folder):
        found = _in_bucket(folder)
    else:
        found = {path.relative_to(folder).as_posix(): _sum(path) for path in contents(folder)}
    _write_manifest(folder, found)


def add(folder: pathlib.Path, name: str, text: str) -> None:
    """Adds a file to a sealed checkpoint; other files are neither read nor changed.

    The file belongs to the checkpoint once the manifest lists it. The checkpoint stays valid throughout.
    """
    found = _listed(folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    _write(folder, path, text)
    added = _in_bucket(folder)[name] if storage.is_bucket(folder) else _sum(path)
    _write_manifest(folder, {**found, name: added})


def has(folder: pathlib.Path, name: str) -> bool:
    """True if the checkpoint is sealed with a file of this name."""
    return sealed(folder) and name in _listed(folder)


def sealed(folder: pathlib.Path) -> bool:
    """True if the checkpoint has a manifest."""
    return (folder / MANIFEST).is_file()


def complete(folder: pathlib.Path) -> bool:
    """True if Orbax has written all of a checkpoint: it then has its final name, in a bucket its last object."""
    return (folder / COMMIT).is_file() if storage.is_bucket(folder) else folder.is_dir()


def problem(folder: pathlib.Path, *parts: str) -> str | None:
    """Describes the first file that differs from the manifest; None if all match, or if there is no manifest.

    A checkpoint whose folder was renamed or copied to another step is described too.

    parts: restricts the check to these files and folders of `folder`, such as `metrics`; default: all.
    """
    if not sealed(folder):
        return None
    try:
        expected = _listed(folder)
    except StoreError:  # no damage
        raise
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except json_file.MalformedError as error:
        return f"{MANIFEST} is malformed: {error}"
    if not expected:
        return f"{MANIFEST} lists no files"
    there = _in_bucket(folder) if storage.is_bucket(folder) else {}
    for name, each in expected.items():
        wanted = not parts or pathlib.PurePath(name).parts[0] in parts
        if wanted and there.get(name) != each and (found := _difference(folder / name, each)):
            return f"{name} {found}"
    return renamed(folder)


def renamed(folder: pathlib.Path) -> str | None:
    """Describes a checkpoint that is of another step than its folder says; None if it has no readable record."""
    try:
        step = json_file.read(folder / RECORD, {"next_batch": int})["next_batch"]
    except StoreError:
        raise
    except (OSError, json_file.MalformedError):
        return None
    return None if folder.name == str(step) else f"it is of step {step}, copied or renamed"


def unlisted(folder: pathlib.Path, *parts: str) -> list[str]:
    """Files of a sealed checkpoint that its manifest does not list; none if the manifest cannot be read.

    parts: as for `problem`.
    """
    try:
        expected = _listed(folder)
    except StoreError:
        raise
    except (OSError, json_file.MalformedError):
        return []
    names = (path.relative_to(folder) for path in contents(folder))
    return [str(name) for name in names if str(name) not in expected and (not parts or name.parts[0] in parts)]


def _listed(folder: pathlib.Path) -> dict[str, Sum]:
    """The manifest: name -> size and checksum."""
    on_disk, in_bucket = [int, int], {"size": int, "crc32c": int}
    listed = json_file.read(folder / MANIFEST, json_file.Each((on_disk, in_bucket)))
    for name in listed:
        if len(name) > _LONGEST_NAME or not name.isprintable() or not pathlib.PurePath(name).parts:
            raise json_file.MalformedError(f"{shown(name)} is no name of a file")
    return {
        name: Sum(*each) if isinstance(each, list) else Sum(each["size"], each["crc32c"], True)
        for name, each in listed.items()
    }


def _write_manifest(folder: pathlib.Path, listed: Mapping[str, Sum]) -> None:
    found = {
        name: {"size": each.size, "crc32c": each.checksum} if each.castagnoli else [each.size, each.checksum]
        for name, each in listed.items()
    }
    _write(folder, folder / MANIFEST, json.dumps(found, indent=0))


def _write(folder: pathlib.Path, path: pathlib.Path, text: str) -> None:
    """Writes a file of a checkpoint atomically."""
    partial = folder.parent / f".{folder.name}.{MANIFEST}"  # outside the folder, which may be deleted at any time
    with files.atomic(path, partial, durable=True) as file:
        file.write(text.encode())


def _difference(path: pathlib.Path, wanted: Sum) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if (length := path.stat().st_size) != wanted.size:
            return f"has {length} of {wanted.size} bytes"
        return None if _sum(path, castagnoli=wanted.castagnoli) == wanted else _ALTERED
    except StoreError:
        raise
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
    for path in _unfinished(root):
        found |= {f"step {step}" for step in re.findall(r"^\d+", path.name)}
        storage.remove(path)
    for manifest in root.glob(f"[0-9]*/{MANIFEST}"):
        if unlisted(manifest.parent, "metrics") == [METRICS]:  # `add` lists them last
            (manifest.parent / METRICS).unlink()
            found.add(f"the evaluation of step {manifest.parent.name}")
    for path in root.glob(f".*.{MANIFEST}"):
        path.unlink(missing_ok=True)
    return sorted(found)


def _unfinished(root: pathlib.Path) -> list[pathlib.Path]:
    """Folders of checkpoints that were being written."""
    if not storage.is_bucket(root):
        return sorted(root.glob("*.orbax-checkpoint-tmp*"))
    return [root / step for step, state in sorted(_states(root).items()) if not any(state)]


def _states(root: pathlib.Path) -> dict[str, tuple[bool, bool]]:
    """Two flags of each step of a bucket's folder of checkpoints: has a commit file; is complete without one.

    The latter are sealed, or were copied from a disk, where those without a seal count too until they are restored.
    """
    names = storage.listed(root)
    states = {}
    for step in {name.partition("/")[0] for name in names if "/" in name}:
        if step.isdecimal():
            committed, sealed = f"{step}/{COMMIT}" in names, f"{step}/{MANIFEST}" in names
            states[step] = committed, sealed or (not committed and _finished(root / step))
    return states


def _finished(folder: pathlib.Path) -> bool:
    """True if Orbax has noted the time at which a checkpoint was completed, just before it renamed or committed it."""
    try:
        json_file.read(folder / METADATA, {"commit_timestamp_nsecs": int})
    except StoreError:
        raise
    except (OSError, json_file.MalformedError):
        return False
    return True


def steps_in_bucket(root: pathlib.Path) -> list[int]:
    """The saved steps of a bucket's folder of checkpoints, oldest first."""
    return sorted(int(step) for step, state in _states(root).items() if any(state))


def commit_copied(root: pathlib.Path) -> None:
    """Marks the checkpoints of a bucket as complete that were copied to it from a disk, for Orbax.

    Raises:
      UserError: this account may not write to the bucket.
    """
    for step, (committed, whole) in _states(root).items():
        if whole and not committed:
            try:
                (root / step / COMMIT).write_text("copied from a disk, complete")
            except StoreError as error:
                if complete(root / step):  # it was being written, and not copied
                    continue
                raise UserError(
                    f"checkpoint {root}/{step} was copied from a disk and has no {COMMIT}, which cannot be written: "
                    f"{error.strerror}; let an account that may write evaluate the run once"
                ) from error


def _sum(path: pathlib.Path, *, castagnoli: bool = False) -> Sum:
    if castagnoli:
        from taskexpert_jax.runs import crc32c  # compiles, and only a copy from a bucket to a disk needs it

        return Sum(path.stat().st_size, crc32c.of_file(path), True)
    value, length = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value, length = zlib.crc32(block, value), length + len(block)
    return Sum(length, value)
