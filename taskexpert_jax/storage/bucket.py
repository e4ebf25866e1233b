"""Paths in a bucket of Google Cloud Storage."""

from collections.abc import Iterator
import contextlib
import errno
import fnmatch
import functools
import io
import pathlib
import re
import types
from typing import Any, Self

from etils import epath
from etils.epath import gpath, stat_utils
from google.api_core.exceptions import NotFound
from google.cloud import storage

from taskexpert_jax.errors import StoreError
from taskexpert_jax.storage import client

_MAGIC = re.compile(r"[*?\[]")
_FIELDS = "items(name),prefixes,nextPageToken"
# A folder without these is no checkpoint: removed first, so that a removal that is cut short leaves no half of one.
# In this order, because a checkpoint with its manifest but no commit file counts as one that was copied from a disk.
_FIRST_REMOVED = ("_CHECKPOINT_METADATA", "manifest.json", "commit_success.txt")
_REFUSED = (
    *("chmod", "hardlink_to", "lchmod", "lstat", "owner", "group", "readlink", "samefile", "symlink_to"),
    *("copy", "walk"),  # of etils, which would use another client
)


class Stat(stat_utils.StatResult):
    """Facts of an object, with the names of `os.stat_result` that are used here too."""

    @property
    def st_size(self) -> int:
        """Bytes."""
        return self.length

    @property
    def st_mtime(self) -> float:
        """Seconds since 1970 at the last write, by the store's clock."""
        return self.mtime


@epath.register_path_cls("gs://")  # Orbax, TFDS and JAX make their own from text: they get the same client and retries
class BucketPath(gpath.PosixGPath, pathlib.PosixPath):
    """A path `gs://BUCKET/NAME`: a `pathlib.Path`, and one of etils for the libraries that take those.

    A folder exists while an object has its name as a prefix, so `mkdir` does nothing. An object is written as a whole,
    when its file is closed without an exception, and there is no appending. Methods raise OSError as those of a local
    path do: FileNotFoundError, or `StoreError` after bounded retries.
    """

    __slots__ = ()

    @property
    def key(self) -> str:
        """Name of the object in its bucket; empty for the bucket itself."""
        return "/".join(self.parts[3:])

    @property
    def prefix(self) -> str:
        """Beginning of the names of the objects in this folder; empty for the bucket itself."""
        return f"{self.key}/" if self.key else ""

    @property
    def bucket(self) -> storage.Bucket:
        """The bucket's handle."""
        return client.bucket(self.parts[2])

    @property
    def blob(self) -> storage.Blob:
        """The object's handle, without a request."""
        return self.bucket.blob(self.key)

    def _asked(self, *, of_bucket: bool = False) -> Any:
        return client.errors(self, of_bucket=of_bucket)

    def is_file(self) -> bool:
        """True if there is an object of this name."""
        with self._asked():
            return bool(self.key) and self.blob.exists(**client.options(self))

    def is_dir(self) -> bool:
        """True if an object's name begins with this one."""
        with self._asked(of_bucket=True):
            return any(
                self.bucket.list_blobs(prefix=self.prefix, max_results=1, fields=_FIELDS, **client.options(self))
            )

    def exists(self) -> bool:
        """True for an object or a folder."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[Self]:
        """Objects and folders of this folder; none if it does not exist."""
        files, folders = self._children()
        names = {name.removeprefix(self.prefix).rstrip("/") for name in (*files, *folders)}
        yield from (self / name for name in sorted(names - {""}))  # "" is a marker of the folder itself

    def files(self) -> list[Self]:
        """Objects directly in this folder, by one listing."""
        return [self / relative(self, name) for name in self._children()[0] if name != self.prefix]

    def _children(self) -> tuple[list[str], set[str]]:
        """Names of the objects and of the folders directly in this folder."""
        with self._asked(of_bucket=True):
            found = self.bucket.list_blobs(prefix=self.prefix, delimiter="/", fields=_FIELDS, **client.options(self))
            return [blob.name for blob in found], found.prefixes  # the folders are known after the objects are read

    def glob(self, pattern: str) -> Iterator[Self]:
        """Objects and folders that match a pattern, without `**`."""
        first, _, rest = pattern.partition("/")
        if first == "**":
            raise io.UnsupportedOperation(f"{self}: glob of {pattern!r} in a bucket; use rglob")
        if not _MAGIC.search(first):
            found = iter([self / first])
        else:
            found = (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, first))
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif _MAGIC.search(first) or path.exists():
                yield path

    def rglob(self, pattern: str) -> Iterator[Self]:
        """Objects at any depth whose last part matches a pattern; folders are left out."""
        names = [relative(self, name) for name in self._names() if not name.endswith("/")]
        yield from (self / name for name in names if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern))

    def _names(self) -> list[str]:
        """Names of all objects below this folder, also of markers of folders, which end in a slash."""
        with self._asked(of_bucket=True):
            found = self.bucket.list_blobs(prefix=self.prefix, fields=_FIELDS, **client.options(self))
            return [blob.name for blob in found]

    def _remove_markers(self) -> bool:
        """Removes the markers of this folder and those in it, as the console and gcsfuse make them; False: no such."""
        markers = [name for name in self._names() if name.endswith("/")]
        with self._asked():
            for name in markers:
                with contextlib.suppress(NotFound):
                    self.bucket.blob(name).delete(**client.options(self))
        return bool(markers)

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing, unless there is an object of this name."""
        if self.is_file():
            raise FileExistsError(errno.EEXIST, "it is a file", str(self))

    def rmdir(self) -> None:
        """Does nothing: a folder without objects does not exist."""

    def rmtree(self, missing_ok: bool = False) -> None:
        """Removes all objects of this folder."""
        paths = list(self.rglob("*"))
        early = [[path for path in paths if path.name == name] for name in _FIRST_REMOVED]
        for some in (*early, [path for path in paths if path.name not in _FIRST_REMOVED]):
            client.each(lambda path: path.unlink(missing_ok=True), some)
        if not self._remove_markers() and not paths and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        failed: list[Exception] = []  # a request whose answer was lost may have removed it
        try:
            with self._asked():
                self.blob.delete(**client.options(self, failed.append))
        except FileNotFoundError:
            if not (missing_ok or failed):
                raise

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **kwargs: Any) -> Any:
        """Opens the object to read it, all at once, or to write it when the file is closed."""
        kind = mode.replace("b", "").replace("t", "")
        if kind not in ("r", "w"):
            raise io.UnsupportedOperation(f"{self}: mode {mode!r}; objects are read or written as a whole")
        if kind == "r":
            with self._asked():
                raw: io.BytesIO = io.BytesIO(self.blob.download_as_bytes(**client.options(self)))
        else:
            raw = _Upload(self)
        return raw if "b" in mode else _Text(raw, encoding=encoding or "utf-8", write_through=True, **kwargs)

    def beginning(self, count: int) -> bytes:
        """The first bytes of the object."""
        with self._asked():
            no_checksum: Any = None  # the store's is of the whole object
            return self.blob.download_as_bytes(start=0, end=count - 1, checksum=no_checksum, **client.options(self))

    def write_bytes(self, data: Any) -> int:
        """Writes the object."""
        content = bytes(data)
        with self._asked(of_bucket=True):
            self.blob.upload_from_string(content, "application/octet-stream", checksum="crc32c", **client.options(self))
        return len(content)

    def write_text(self, data: str, encoding: Any = None, errors: Any = None, newline: Any = None) -> int:
        """Writes the object; the arguments are those of a local path, and lines end as in `data`."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def read_text(self, encoding: Any = None, errors: Any = None, newline: Any = None) -> str:
        """Reads the object."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Writes an empty object unless there is one."""
        if not self.is_file():
            self.write_bytes(b"")
        elif not exist_ok:
            raise FileExistsError(errno.EEXIST, "it exists", str(self))

    def replace(self, target: Any) -> Self:
        """Copies an object or the objects of a folder, and removes them here: not at once, unlike on a disk."""
        target = type(self)(target)
        pairs = [(path, target / path.relative_to(self)) for path in self.rglob("*")] or [(self, target)]
        client.each(lambda pair: _copy(*pair), pairs)
        client.each(lambda pair: pair[0].unlink(missing_ok=True), pairs)
        return target

    def rename(self, target: Any) -> Self:
        """As `replace`."""
        return self.replace(target)

    def stat(self, *, follow_symlinks: bool = True) -> Stat:
        """Size and time of the last write; those of a folder are 0."""
        with self._asked():
            blob = self.bucket.get_blob(self.key, **client.options(self)) if self.key else None
        if blob is not None and blob.updated is not None:
            return Stat(is_directory=False, length=blob.size or 0, mtime=int(blob.updated.timestamp()))
        if not self.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return Stat(is_directory=True, length=0, mtime=0)

    def absolute(self) -> Self:
        """The path itself."""
        return self

    def resolve(self, strict: bool = False) -> Self:
        """The path itself."""
        return self

    def is_symlink(self) -> bool:
        """False."""
        return False


def relative(folder: BucketPath, name: str) -> str:
    """The name of an object relative to a folder.

    Raises:
      StoreError: it is no relative path: a bucket takes any name, also one that leads to another folder.
    """
    found = name.removeprefix(folder.prefix)
    if {"", ".", ".."} & set(found.split("/")) or "\0" in found:
        raise StoreError(errno.EINVAL, f"the object {found!a} has no name of a file; remove or rename it", str(folder))
    return found


def _refused(name: str, self: BucketPath, *args: Any, **kwargs: Any) -> Any:
    raise io.UnsupportedOperation(f"{self}: a bucket has no {name}")


for _name in _REFUSED:
    setattr(BucketPath, _name, functools.partialmethod(functools.partial(_refused, _name)))


def _copy(source: BucketPath, target: BucketPath) -> None:
    with client.errors(source):
        token, blob, copy = None, source.blob, target.blob
        while True:  # a large object takes several requests
            token, _, _ = copy.rewrite(blob, token=token, **client.options(source))
            if token is None:
                return


class _Upload(io.BytesIO):
    """A file that becomes an object when it is closed, unless its `with` block raises."""

    def __init__(self, path: BucketPath):
        super().__init__()
        self._path, self._wanted = path, True

    def discard(self) -> None:
        """Writes nothing when it is closed."""
        self._wanted = False

    def close(self) -> None:
        """Writes the object."""
        if not self.closed:
            wanted, self._wanted = self._wanted, False
            content = self.getvalue()
            super().close()
            if wanted:
                self._path.write_bytes(content)

    def __exit__(self, kind: Any, value: Any, traceback: types.TracebackType | None) -> None:
        if kind is not None:
            self.discard()
        super().__exit__(kind, value, traceback)

    def __del__(self) -> None:  # not closed: nothing is written
        self.discard()


class _Text(io.TextIOWrapper):
    def __exit__(self, kind: Any, value: Any, traceback: types.TracebackType | None) -> None:
        if kind is not None and isinstance(self.buffer, _Upload):
            self.buffer.discard()
        super().__exit__(kind, value, traceback)
