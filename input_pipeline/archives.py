"""What data set archives have in common: faults by the line, pictures read with care, id files, members, extraction."""

import collections
from collections.abc import Callable, Iterable, Mapping
import functools
import hashlib
import io
import lzma
import os
import pathlib
import tarfile
from types import ModuleType
from typing import NamedTuple, TypeVar
import zlib

import numpy as np
from PIL import Image
import tqdm

from taskexpert_jax import images
from taskexpert_jax.errors import UserError

T = TypeVar("T")
AGAIN = "get the archive again"


class Problems(UserError):
    """Faults of an archive, each one line: what is wrong, where, and what to do.

    Attributes:
      lines: the faults; as a string they stand below each other.
    """

    def __init__(self, lines: Iterable[str]):
        self.lines = tuple(lines)
        super().__init__(self.lines)  # what pickling hands to __init__ again

    def __str__(self) -> str:
        return "\n".join(self.lines)


def read_all(readers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """What each of the functions returns, by its key; all are called, so that every fault is found at once.

    Raises:
      Problems: those of all functions, in order.
    """
    values, lines = {}, []
    for key, read in readers.items():
        try:
            values[key] = read()
        except Problems as problems:
            lines += problems.lines
    if lines:
        raise Problems(lines)
    return values


def read_picture(root: pathlib.Path, member: str, channels: int) -> np.ndarray:
    """The picture `root/member`, (h,w,channels) uint8, decoded whole, so that every kind of damage is found.

    Three channels: RGB, from whatever colours the file has. One: the stored values; a palette's are its indices, those
    of one bit a pixel are 0 and 255.

    Raises:
      Problems: the file is missing or damaged, it is not a picture, or it has other channels.
    """
    content = read_bytes(root, member)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.verify()  # checksums, and the end of the file: decoding stops at the last pixel
        with Image.open(io.BytesIO(content)) as picture:
            mode = picture.mode
            array = np.asarray(picture.convert("RGB") if channels == 3 else picture)
    except images.UNREADABLE as error:
        raise Problems([f"{member} is corrupt, it does not decode as a picture; {AGAIN}"]) from error
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] != channels:
        raise Problems([f"{member} has {array.shape[2]} channels instead of {channels}; {AGAIN}"])
    if array.dtype != np.uint8:
        raise Problems([f"{member} has pixels of {array.dtype} ({mode}) instead of 8 bits; {AGAIN}"])
    return array


def read_bytes(root: pathlib.Path, member: str) -> bytes:
    """The content of the file `root/member`.

    Raises:
      Problems: it is missing or cannot be read.
    """
    try:
        return (root / member).read_bytes()
    except FileNotFoundError as error:
        raise Problems([f"{member} is missing; {AGAIN}"]) from error
    except OSError as error:
        raise Problems([f"{member} cannot be read ({error.strerror}); look at its permissions"]) from error


class Listing(NamedTuple):
    """What an archive says that it holds.

    Attributes:
      ids: split -> the ids to build, in the order of the split's id file.
      left_out: split -> how many more ids the id file has, whose image is not there.
      missing: example id -> faults, of those that lack a file.
    """

    ids: dict[str, list[str]]
    left_out: dict[str, int]
    missing: dict[str, list[str]]


def list_examples(root: pathlib.Path, module: ModuleType, *, allow_subset: bool) -> Listing:
    """The ids of every split, checked against each other, the published counts and the files that are there.

    Args:
      root: the folder that holds the id files and the members.
      module: the data set's; its `ID_FILES`, `PUBLISHED_COUNTS` and `members` say what is expected.
      allow_subset: any number of ids will do, and those without an image are left out.

    Raises:
      Problems: an id file is missing, empty or names an id twice; the counts are others than the published ones.
    """
    ids, lines, first_seen = {}, [], {}
    for split, file in module.ID_FILES.items():
        try:
            ids[split] = _read_ids(root, file)
        except Problems as problems:
            lines += problems.lines
            continue
        for example_id, times in collections.Counter(ids[split]).items():
            if example_id in first_seen:
                lines.append(f"{file} names {example_id}, and so does {first_seen[example_id]}; {AGAIN}")
            if times > 1:
                lines.append(f"{file} names {example_id} more than once; {AGAIN}")
            first_seen[example_id] = file
        published = module.PUBLISHED_COUNTS[split]
        if len(ids[split]) != published and not allow_subset:
            lines.append(
                f"{file} names {len(ids[split])} ids, but {published} are published; "
                f"{AGAIN}, or give --allow-subset if this is meant"
            )
    if lines:
        raise Problems(lines)
    return _check_members(root, module, ids, allow_subset=allow_subset)


def _read_ids(root: pathlib.Path, file: str) -> list[str]:
    """The ids in the file `root/file`, one a line."""
    if not (root / file).is_file():
        raise Problems([f"{file} is missing; give the archive, or the folder extracted from it"])
    try:
        ids = read_bytes(root, file).decode().split()
    except UnicodeDecodeError as error:
        raise Problems([f"{file} is corrupt, it is not text; {AGAIN}"]) from error
    if not ids:
        raise Problems([f"{file} names no id; {AGAIN}"])
    if wrong := [i for i in ids if pathlib.PurePath(i).name != i]:
        raise Problems([f"{file} names {i!r}, which would lie outside of its folder; {AGAIN}" for i in wrong])
    return ids


def _check_members(
    root: pathlib.Path, module: ModuleType, ids: Mapping[str, list[str]], *, allow_subset: bool
) -> Listing:
    """The ids less those that `allow_subset` leaves out, and the files that the others lack."""

    @functools.cache
    def names(folder: pathlib.Path) -> frozenset[str]:  # listing a folder beats asking for each of its files
        return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()

    def exists(member: str) -> bool:
        path = root / member
        return path.name in names(path.parent)

    listing = Listing({}, {}, {})
    for split, of_split in ids.items():
        listing.ids[split] = []
        for example_id in of_split:
            absent = {part: files for part, files in module.members(example_id).items() if not any(map(exists, files))}
            if "image" in absent and allow_subset:
                continue
            listing.ids[split].append(example_id)
            if absent:
                listing.missing[example_id] = [
                    f"{' or '.join(files)} is missing, though {module.ID_FILES[split]} names {example_id}; {AGAIN}"
                    for files in absent.values()
                ]
        listing.left_out[split] = len(of_split) - len(listing.ids[split])
    if empty := [split for split, kept in listing.ids.items() if not kept]:
        raise Problems([f"none of the ids in {module.ID_FILES[split]} has an image; {AGAIN}" for split in empty])
    return listing


Parts = dict[str, np.ndarray | bytes]


class Reading(NamedTuple):
    """An example as it was read: its parts and their digest, or its faults and neither."""

    parts: Parts | None
    digest: str
    faults: tuple[str, ...]


def read_with_digest(
    read_example: Callable[[pathlib.Path, str], Parts], root: pathlib.Path, example_id: str
) -> Reading:
    """The example as `read_example` gives it, with the SHA-256 of its parts' names, types, shapes and contents."""
    try:
        parts = read_example(root, example_id)
    except Problems as problems:
        return Reading(None, "", problems.lines)
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        kind = f"{part.dtype.str} {part.shape}" if isinstance(part, np.ndarray) else f"{len(part)} bytes"
        digest.update(f"{name} {kind}\n".encode())
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return Reading(parts, digest.hexdigest(), ())


def extract(archive: pathlib.Path, target: pathlib.Path) -> None:
    """Extracts the tar file `archive` into the existing folder `target`, in one pass over the archive.

    Raises:
      UserError: not a tar file; a truncated or damaged one; one with a member that would land outside of `target`.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tqdm.tqdm(tar, desc="extracting", unit=" files", mininterval=1.0):
                tar.extract(member, target, filter="data")
            while tar.fileobj is not None and tar.fileobj.read(2**20):
                pass  # the checksum of a compressed file stands at its end, after the last member
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: refused, as a member is unsafe to extract: {error}") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's trouble, not the archive's
        raise UserError(f"{archive}: it is not a tar file, or it is truncated or corrupt; {AGAIN}") from error
