"""Result files: written completely or not at all, and one line where the disk refuses them."""

from collections.abc import Iterator, Mapping
import contextlib
import errno
import hashlib
import io
import os
import pathlib
import secrets
import shutil
import tempfile
from typing import BinaryIO

from taskexpert_jax import storage
from taskexpert_jax.errors import UserError, disk_refusal

_PROBE = 1 << 16  # bytes written to find out whether a folder takes files


class _File(io.BufferedWriter):
    """A file without a descriptor, so that NumPy and Pillow write through it and a full disk is named as the reason."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")


@contextlib.contextmanager
def atomic(path: pathlib.Path, partial: pathlib.Path | None = None, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yields a binary file that replaces `path` when the body has succeeded; otherwise nothing is changed.

    Args:
      path: the file to write. An object of a bucket is sent as a whole when the body has succeeded.
      partial: where it is written first; default: a hidden file in the same folder.
      durable: waits until the disk has it, before it replaces `path`.

    Raises:
      OSError: it cannot be written.
    """
    if storage.is_bucket(path):
        with path.open("wb") as file:
            yield file
        return
    partial = partial or path.with_name(f".{secrets.token_hex(4)}.partial")
    try:
        raw = io.FileIO(partial, "w")
        with _File(raw) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(raw.fileno())
        partial.rename(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: pathlib.Path, then: str = "free space, or give another folder") -> Iterator[None]:
    """Raises UserError with path and reason if its body cannot write; `then` says what to do."""
    try:
        yield
    except UserError:  # of another file, whose line may have the same reason
        raise
    except Exception as error:
        reason = disk_refusal(error)
        if reason is None and isinstance(error, OSError):
            gone = isinstance(error, FileNotFoundError) and not path.parent.is_dir()
            reason = "its folder has been deleted" if gone else error.strerror or str(error)
        if reason is None:
            raise
        if reason == os.strerror(errno.ENOSPC) and storage.is_bucket(path):
            then = "its files are written to a temporary folder first; set TMPDIR to another"
        raise UserError(f"{path} cannot be written: {reason}; {then}") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """As `atomic`, but raises UserError with path and reason."""
    with writing(path), atomic(path) as file:
        yield file


def write(texts: Mapping[pathlib.Path, str]) -> None:
    """Writes all files, or none if the disk is full, in UTF-8; bytes of names that are not UTF-8 are escaped.

    Raises:
      UserError: one cannot be written; the line has its path and the reason.
    """
    with contextlib.ExitStack() as stack:
        for path, text in texts.items():
            file = stack.enter_context(replacing(path))
            with writing(path):
                file.write(text.encode(errors="backslashreplace"))
                file.flush()


def append(path: pathlib.Path, text: str) -> None:
    """Appends text to a file, in UTF-8; an object of a bucket is read and written anew, for files of few lines.

    Raises:
      OSError: it cannot be written.
    """
    if not storage.is_bucket(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return
    try:
        before = path.read_text()
    except FileNotFoundError:
        before = ""
    path.write_text(before + text)


def folder_for_results(path: pathlib.Path, flag: str = "--output") -> pathlib.Path:
    """Makes a folder for results and returns it, after a trial: before the work and not after it.

    Raises:
      UserError: it cannot be made or written to; the line names the flag for another one.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if storage.is_bucket(path):
            probe = path / f".{secrets.token_hex(4)}.partial"
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)
        else:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(_PROBE))
                file.flush()
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "it, or a folder above it, is a file" if in_the_way else error.strerror
        raise UserError(f"results cannot be written to {path}: {reason}; give another folder with {flag}") from error
    return path


def refuse_taken(path: pathlib.Path, flag: str = "--output") -> None:
    """Raises UserError unless a folder is new or empty; what a killed program left in it does not count."""
    try:
        there = next((item.name for item in path.iterdir() if item.suffix != ".partial"), "") if path.is_dir() else ""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a new folder with {flag}") from error
    if there or (path.exists() and not path.is_dir()):
        what = f"already has {there}" if there else "is a file"
        raise UserError(f"{path} {what}: nothing is overwritten; give a new folder with {flag}")


def checksum(path: pathlib.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(path: pathlib.Path, last: str, flag: str = "--output") -> Iterator[pathlib.Path]:
    """Yields a folder whose content becomes that of `path` when the body has succeeded; otherwise nothing remains.

    Args:
      path: must not exist, or be empty.
      last: the file of the content that appears last, and so tells that the others are complete.
      flag: names another folder, for messages.

    Raises:
      UserError: `path` is not empty, or cannot be written to: before the body runs.
    """
    refuse_taken(path, flag)
    if storage.is_bucket(path):
        folder_for_results(path, flag)
        with tempfile.TemporaryDirectory(prefix="taskexpert_") as scratch:
            yield pathlib.Path(scratch)
            storage.copy_tree(pathlib.Path(scratch), path, last=last, replace=False)
        return
    existed = path.is_dir()
    partial = folder_for_results(path, flag) / f".{secrets.token_hex(4)}.partial"  # inside: `path` may be a mount
    try:
        with writing(path):
            partial.mkdir()
        yield partial
        with writing(path):
            for item in sorted(partial.iterdir(), key=lambda item: item.name == last):
                item.rename(path / item.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):  # unless it has the content
                path.rmdir()
