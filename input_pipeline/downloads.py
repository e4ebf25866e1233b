"""Copies from a bucket to the disk, with progress and a check of the disk's free space."""

from collections.abc import Mapping
import pathlib
import shutil
import threading

from taskexpert_jax import progress, storage
from taskexpert_jax.errors import UserError
from taskexpert_jax.storage.facts import Facts


def fetch(
    source: pathlib.Path, target: pathlib.Path, disk: pathlib.Path, then: str, found: Mapping[str, Facts] | None = None
) -> None:
    """Copies an object or a folder of a bucket; files of `target` with the same content are not fetched again.

    Args:
      source: object or folder in a bucket.
      target: the local path.
      disk: existing folder on the disk of the target; named in the message if the source does not fit.
      then: ends this message, says what to do.
      found: listing of the source (`storage.listed`); default: what is there now.

    Raises:
      OSError: of the disk; a StoreError of the bucket.
      UserError: it does not fit on the disk.
    """
    if found is None:
        found = storage.listed(source)
    size = sum(of_object.size for of_object in found.values()) or source.stat().st_size
    there = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    free = shutil.disk_usage(disk).free
    if size - there > free:
        raise UserError(f"{source}: {mib(size)} do not fit on the disk of {disk}, {free >> 20} MiB free; {then}")
    with progress.Progress(f"copying {source}", size >> 20, "MiB") as shown:
        storage.download(source, target, found or None, received=_Counted(shown).add)


def mib(size: int) -> str:
    """A number of bytes in MiB, rounded up."""
    return f"{-(-size >> 20)} MiB"


class _Counted:
    """Adds the bytes that several threads receive to a progress in MiB."""

    def __init__(self, shown: progress.Progress):
        self._shown, self._lock, self._bytes = shown, threading.Lock(), 0

    def add(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            self._shown.add((self._bytes >> 20) - self._shown.done)
