"""Folders of a bucket: listing, and verified copies from and to the disk."""

import base64
from collections.abc import Mapping
import errno
import pathlib

from google.cloud import storage
import google_crc32c

from taskexpert_jax.errors import StoreError
from taskexpert_jax.storage import client
from taskexpert_jax.storage.bucket import BucketPath
from taskexpert_jax.storage.facts import Facts

_FIELDS = "items(name,size,crc32c,updated,generation),nextPageToken"
_BLOCK = 1 << 22  # bytes read at a time


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
    prefix = f"{folder.key}/" if folder.key else ""
    with client.errors(folder, of_bucket=True):
        blobs = folder.bucket.list_blobs(prefix=prefix, fields=_FIELDS, **client.options(folder))
        return {blob.name.removeprefix(prefix): facts(blob) for blob in blobs if not blob.name.endswith("/")}


def copy_tree(source: pathlib.Path, target: BucketPath, *, last: str = "") -> None:
    """See `storage.copy_tree`."""
    there = listed(target)
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    names = {path.relative_to(source).as_posix(): path for path in files}
    for some in ([name for name in names if name != last], [name for name in names if name == last]):
        client.each(lambda name: _upload(names[name], target / name, there.get(name)), some)


def _upload(path: pathlib.Path, target: BucketPath, there: Facts | None) -> None:
    wanted = (path.stat().st_size, crc32c(path))
    if there is not None and there[:2] == wanted:
        return
    blob = target.blob
    with client.errors(target, of_bucket=True):
        blob.upload_from_filename(str(path), checksum="crc32c", **client.options(target))
    if facts(blob)[:2] != wanted:
        raise StoreError(errno.EIO, f"it was sent with another content than {path} has", str(target))


def download(path: BucketPath, target: pathlib.Path) -> pathlib.Path:
    """Copies an object or a folder to the disk; the client compares the checksum of each.

    Raises:
      FileNotFoundError: there is nothing of this name.
    """
    found = listed(path)
    if not found:
        _download(path, target)
        return target
    files = [(path / name, target / name) for name in found]
    for folder in {file.parent for _, file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    client.each(lambda pair: _download(*pair), files)
    return target


def _download(path: BucketPath, target: pathlib.Path) -> None:
    with client.errors(path):
        path.blob.download_to_filename(str(target), checksum="crc32c", **client.options(path))
