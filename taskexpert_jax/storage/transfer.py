"""Folders of a bucket: listing, and verified copies from and to the disk."""

import base64
from collections.abc import Callable, Iterable, Mapping
import errno
import pathlib

from google.api_core.exceptions import PreconditionFailed
from google.cloud import storage
import google_crc32c

from taskexpert_jax.errors import StoreError
from taskexpert_jax.storage import client
from taskexpert_jax.storage.bucket import BucketPath, relative
from taskexpert_jax.storage.facts import Facts

_FIELDS = "items(name,size,crc32c,updated,generation),nextPageToken"
_BLOCK = 1 << 22  # bytes read at a time
_PART = 1 << 24  # bytes of an object that a request fetches
_TWO_WRITERS = "another program wrote it: remove the folder and start again"


def crc32c(path: pathlib.Path) -> int:
    """CRC-32C of a local file."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
    return int.from_bytes(checksum.digest(), "big")


def facts(blob: storage.Blob) -> Facts:
    """Facts of an object that was read or listed."""
    checksum = int.from_bytes(base64.b64decode(blob.crc32c or ""), "big")
    updated = blob.updated.timestamp() if blob.updated else 0.0
    return Facts(blob.size or 0, checksum, updated, int(blob.generation or 0))


def listed(folder: BucketPath) -> Mapping[str, Facts]:
    """See `storage.listed`."""
    with client.errors(folder, of_bucket=True):
        blobs = folder.bucket.list_blobs(prefix=folder.prefix, fields=_FIELDS, **client.options(folder))
        return {relative(folder, blob.name): facts(blob) for blob in blobs if not blob.name.endswith("/")}


def copy_tree(source: pathlib.Path, target: BucketPath, *, last: str = "", replace: bool = True) -> None:
    """See `storage.copy_tree`."""
    paths = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("*")) if path.is_file()}
    wanted = dict(zip(paths, client.each(_content, paths.values()), strict=True))
    there = listed(target)
    if not replace:
        _refuse_others(target, wanted, there)
    first = [name for name in paths if name != last]
    for names in (first, [last] if last in paths else []):
        client.each(lambda name: _upload(paths[name], target / name, wanted[name], there.get(name), replace), names)
        if not replace:
            _refuse_others(target, wanted, listed(target), complete=names)


def _content(path: pathlib.Path) -> tuple[int, int]:
    """Size and CRC-32C of a local file."""
    return path.stat().st_size, crc32c(path)


def _refuse_others(
    target: BucketPath, wanted: Mapping[str, tuple[int, int]], there: Mapping[str, Facts], complete: Iterable[str] = ()
) -> None:
    """Raises StoreError for an object with another name or content than wanted, or one of `complete` that is missing.

    wanted: size and CRC-32C by name. The trial of a program that was killed (`files.folder_for_results`) is no other.
    """
    for name in [*(name for name in there if not name.endswith(".partial")), *complete]:
        if name not in there or there[name][:2] != wanted.get(name):
            found = (
                "it was removed after it was sent"
                if name not in there
                else "it has another content than the file to send"
            )
            raise StoreError(errno.EEXIST, f"{found}; {_TWO_WRITERS}", str(target / name))


def _upload(
    path: pathlib.Path, target: BucketPath, wanted: tuple[int, int], there: Facts | None, replace: bool
) -> None:
    if there is not None and there[:2] == wanted:
        return
    blob = target.blob
    precondition = {} if replace else {"if_generation_match": 0}
    with client.errors(target, of_bucket=True):
        try:
            blob.upload_from_filename(str(path), checksum="crc32c", **precondition, **client.options(target))
        except PreconditionFailed:  # there is an object: of another program, or of an answer that was lost
            blob.reload(**client.options(target))
    if facts(blob)[:2] != wanted:
        raise StoreError(errno.EEXIST, f"it has another content than {path}; {_TWO_WRITERS}", str(target))


def download(
    path: BucketPath,
    target: pathlib.Path,
    found: Mapping[str, Facts] | None = None,
    *,
    received: Callable[[int], None] = lambda count: None,
) -> pathlib.Path:
    """See `storage.download`; returns `target`. Large objects come in parts: a lost connection costs one of them."""
    if found is None:
        found = listed(path) or {"": _facts_of(path)}
    files = {path / name: (target / name, of_object) for name, of_object in found.items()}
    parts = []
    for source, (file, of_object) in files.items():
        size = of_object.size
        if file.is_file() and file.stat().st_size == size and crc32c(file) == of_object.crc32c:
            received(size)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        parts += [(source, file, of_object, start, min(start + _PART, size)) for start in range(0, size, _PART)]

    def fetch(part: tuple[BucketPath, pathlib.Path, Facts, int, int]) -> None:
        _fetch(*part)
        received(part[4] - part[3])

    client.each(fetch, parts)
    client.each(lambda source: _verify(source, *files[source]), dict.fromkeys(part[0] for part in parts))
    return target


def _verify(source: BucketPath, file: pathlib.Path, of_object: Facts) -> None:
    if crc32c(file) != of_object.crc32c:
        raise StoreError(errno.EIO, "it was received with another checksum than it has in the store", str(source))


def _facts_of(path: BucketPath) -> Facts:
    blob = path.blob
    with client.errors(path):
        blob.reload(**client.options(path))
    return facts(blob)


def _fetch(source: BucketPath, file: pathlib.Path, of_object: Facts, start: int, end: int) -> None:
    """Fetches the bytes [start, end) of an object and writes them to their place in the file."""
    with client.errors(source):
        content = source.blob.download_as_bytes(
            start=start,
            end=end - 1,
            raw_download=True,  # as stored, which the checksum is of
            if_generation_match=of_object.generation,
            checksum=None,  # pyright: ignore[reportArgumentType] # there is none of a part
            **client.options(source),
        )
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(content)
