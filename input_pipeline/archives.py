"""Verification and extraction of data set archives: id files, members, images, and a list of all faults."""

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

from taskexpert_jax import images, progress
from taskexpert_jax.errors import UserError

T = TypeVar("T")
AGAIN = "get the archive again"


class Problems(UserError):
    """Faults of an archive, one line each: what is wrong, where, and what to do.

    Attributes:
      lines: the faults; `str` joins them with newlines.
    """

    def __init__(self, lines: Iterable[str]):
        self.lines = tuple(lines)
        super().__init__(self.lines)  # `args`, which unpickling passes to __init__

    def __str__(self) -> str:
        return "\n".join(self.lines)


def read_all(readers: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Return values of all functions, by key; all are called even after a fault, so that every fault is found at once.

    Raises:
      Problems: the faults of all functions, in order.
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


def read_picture(
    root: pathlib.Path, member: str, channels: int, *, ids: bool = False, dtype: str = "uint8"
) -> np.ndarray:
    """Reads the image `root/member`, (h,w,channels) of `dtype`; verifies and fully decodes it, so that damage is found.

    The EXIF orientation is ignored, as in `records` for images that are stored unchanged.

    Args:
      root: folder of the members.
      member: file below `root`.
      channels: 3 converts to RGB from any colour mode. 1 returns the indices of a palette image, or grey from 0 to 255.
      ids: the values are class ids; grey of 1, 2 or 4 bits gives the numbers stored.
      dtype: uint8, or uint16 for grey of 16 bits.

    Raises:
      Problems: the file is missing, damaged or not an image, or has another number of channels or bits.
    """
    content = read_bytes(root, member)
    try:
        with images.decoded(io.BytesIO(content)) as found:
            mode = found.image.mode
            array = found.ids() if ids else np.asarray(found.image.convert("RGB") if channels == 3 else found.image)
        with images.decoder_errors(), Image.open(io.BytesIO(content), formats=images.FORMATS) as image:
            image.verify()  # checks checksums up to the end of the file; decoding stops at the last pixel
    except ValueError as error:
        raise Problems([f"{member} is corrupt, it does not decode as an image; {AGAIN}"]) from error
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] != channels:
        raise Problems([f"{member} has {array.shape[2]} channels instead of {channels}; {AGAIN}"])
    if array.dtype != dtype:
        bits = 8 * np.dtype(dtype).itemsize
        raise Problems([f"{member} has pixels of {array.dtype} ({mode}) instead of {bits} bits; {AGAIN}"])
    return array


def check_sizes(parts: Mapping[str, np.ndarray], files: Mapping[str, str]) -> None:
    """Raises Problems for the parts (h,w,c) of an example that differ in size from its image."""
    height, width = parts["image"].shape[:2]
    lines = []
    for part, array in parts.items():
        if array.shape[:2] != (height, width):
            size = "x".join(map(str, array.shape[:2]))
            lines.append(f"{files[part]} is {size} but its image is {height}x{width}; {AGAIN}")
    if lines:
        raise Problems(lines)


def read_bytes(root: pathlib.Path, member: str) -> bytes:
    """Reads the file `root/member`.

    Raises:
      Problems: the file is missing or cannot be read.
    """
    try:
        return (root / member).read_bytes()
    except FileNotFoundError as error:
        raise Problems([f"{member} is missing; {AGAIN}"]) from error
    except OSError as error:
        raise Problems([f"{member} cannot be read ({error.strerror}); check its permissions"]) from error


def listed(folder: pathlib.Path, name: str, pattern: str) -> list[pathlib.Path]:
    """Files of `folder` that match a pattern, sorted; `name` is that of the folder in messages.

    Raises:
      Problems: there is no such folder, or it has no such file.
    """
    if not folder.is_dir():
        raise Problems([f"the folder {name} is missing; give the folder that contains it"])
    found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    if not found:
        raise Problems([f"{name} has no file {pattern}; {AGAIN}"])
    return found


class Listing(NamedTuple):
    """Examples of an archive, according to its id files.

    Attributes:
      ids: split -> ids to build, in the order of the split's id file.
      left_out: split -> number of further ids in the id file, omitted because their image is missing.
      missing: example id -> faults, for examples with missing files.
    """

    ids: dict[str, list[str]]
    left_out: dict[str, int]
    missing: dict[str, list[str]]


def list_examples(root: pathlib.Path, module: ModuleType, *, allow_subset: bool) -> Listing:
    """Lists the ids of every split, checked for duplicates and against the published counts and the existing files.

    Args:
      root: folder with the id files and the members.
      module: module of the data set, with `ID_FILES`, `PUBLISHED_COUNTS` and `members`. Without lists of ids it has
        `ids_in`, and `ID_FILES` names the folders of the images: (folder, its name for messages) -> ids in their order.
      allow_subset: accepts any number of ids and omits ids without an image.

    Raises:
      Problems: an id file is missing, empty or names an id twice, or the counts differ from the published ones.
    """
    ids, lines, first_seen = {}, [], {}
    for split, file in module.ID_FILES.items():
        try:
            ids[split] = module.ids_in(root / file, file) if hasattr(module, "ids_in") else _read_ids(root, file)
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
    """Reads the ids in the file `root/file`, one per line."""
    if not (root / file).is_file():
        raise Problems([f"{file} is missing; give the archive, or the folder extracted from it"])
    try:
        ids = read_bytes(root, file).decode("utf-8-sig").split()
    except UnicodeDecodeError as error:
        raise Problems([f"{file} is corrupt, it is not text; {AGAIN}"]) from error
    if not ids:
        raise Problems([f"{file} names no id; {AGAIN}"])
    if wrong := [i for i in ids if pathlib.PurePath(i).name != i]:
        raise Problems([f"{file} names {i[:200]!r}, which would lie outside of its folder; {AGAIN}" for i in wrong])
    return ids


def _check_members(
    root: pathlib.Path, module: ModuleType, ids: Mapping[str, list[str]], *, allow_subset: bool
) -> Listing:
    """Finds missing files; with `allow_subset`, omits the ids whose image is missing."""

    @functools.cache
    def names(folder: pathlib.Path) -> frozenset[str]:  # one listing is faster than a look-up per file
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
    """Result of reading an example: parts and their digest, or faults with parts None and digest empty."""

    parts: Parts | None
    digest: str
    faults: tuple[str, ...]


def read_with_digest(
    read_example: Callable[[pathlib.Path, str], Parts], root: pathlib.Path, example_id: str
) -> Reading:
    """Reads an example with `read_example`; the digest is the SHA-256 of its parts' names, dtypes, shapes and bytes."""
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
      UserError: not a tar file, a truncated or damaged one, or one with a member that leads outside of `target`.
    """
    try:
        with (
            archive.open("rb") as file,
            progress.Progress("extracting", archive.stat().st_size >> 20, "MiB") as shown,
            tarfile.open(fileobj=file) as tar,
        ):
            for member in tar:
                tar.extract(member, target, filter="data")
                shown.add((file.tell() >> 20) - shown.done)
            while tar.fileobj is not None and tar.fileobj.read(2**20):
                pass  # reads on to a compressed file's checksum, after the last member
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: refused because a member is unsafe to extract: {error}") from error
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk, not of the archive
        raise UserError(f"{archive}: it is not a tar file, or it is truncated or corrupt; {AGAIN}") from error
