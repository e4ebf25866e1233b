"""Storage: paths on a disk or in a bucket of Google Cloud Storage, behind one interface.

A path in a bucket, `gs://BUCKET/NAME`, is a `pathlib.Path` too (`bucket.BucketPath`); packages of Google are imported
when the first one is made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING

from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.storage.facts import Facts

if TYPE_CHECKING:
    from taskexpert_jax.storage.bucket import BucketPath

BUCKET = "gs://"


def path(text: str | pathlib.Path) -> pathlib.Path:
    """The path that a user names: on the disk, or `gs://BUCKET/NAME`.

    Raises:
      UserError: a bucket, and google-cloud-storage is not installed.
    """
    if isinstance(text, pathlib.Path):
        return text
    if not text.startswith(BUCKET):
        return pathlib.Path(text)
    return bucket_path(text)


def bucket_path(path: str | pathlib.Path) -> "BucketPath":
    """A path in a bucket, with the methods that a path on the disk does not have; raises as `path`."""
    try:
        from taskexpert_jax.storage.bucket import BucketPath
    except ImportError:
        raise UserError(f'{path} needs google-cloud-storage: pip install "taskexpert-jax[gcs]"') from None
    return BucketPath(path)


def is_bucket(path: object) -> bool:
    """True for a path in a bucket."""
    return str(path).startswith(BUCKET)


def listed(folder: pathlib.Path) -> Mapping[str, Facts]:
    """All objects below a folder of a bucket by their name relative to it, in one listing.

    Raises:
      StoreError: the bucket does not exist or cannot be read.
    """
    from taskexpert_jax.storage import transfer

    return transfer.listed(bucket_path(folder))


def remove(folder: pathlib.Path) -> None:
    """Removes a folder and all that is in it; nothing happens if it does not exist."""
    if is_bucket(folder):
        bucket_path(folder).rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def copy_tree(source: pathlib.Path, target: pathlib.Path, *, last: str = "", replace: bool = True) -> None:
    """Copies a local folder to a bucket: files that are there already with the same content are not sent again.

    Args:
      source: a local folder.
      target: folder in a bucket; other objects in it stay.
      last: file that is written after all others, which tells that they are complete.
      replace: False writes new objects alone, and refuses a folder with any other object; of two programs that write
        there at once, only one completes it.

    Raises:
      StoreError: an upload failed, or does not have the file's checksum.
    """
    from taskexpert_jax.storage import transfer

    transfer.copy_tree(source, bucket_path(target), last=last, replace=replace)


def download(
    source: pathlib.Path,
    target: pathlib.Path,
    found: Mapping[str, Facts] | None = None,
    *,
    received: Callable[[int], None] = lambda count: None,
) -> None:
    """Copies an object or a folder to the disk: files that are there with the same content are not fetched again.

    Args:
      source: object or folder in a bucket.
      target: the local path.
      found: what `listed` returned for the folder, to get just that; default: what is there now.
      received: called with the number of bytes of each part, by several threads.

    Raises:
      FileNotFoundError: there is nothing of this name.
      StoreError: it cannot be read, or has changed meanwhile, or its checksum is wrong.
    """
    from taskexpert_jax.storage import transfer

    transfer.download(bucket_path(source), target, found, received=received)


def files_in(folder: pathlib.Path) -> Sequence[pathlib.Path]:
    """The files directly in a folder, in no order; those of a bucket in one listing.

    Raises:
      OSError: it cannot be listed.
    """
    if is_bucket(folder):
        return bucket_path(folder).files()
    return [path for path in folder.iterdir() if path.is_file()]


def beginning(path: pathlib.Path, count: int) -> bytes:
    """The first bytes of a file, or all if it is shorter.

    Raises:
      OSError: it cannot be read.
    """
    if is_bucket(path):
        return bucket_path(path).beginning(count)
    with path.open("rb") as file:
        return file.read(count)


@contextlib.contextmanager
def local_copy(path: pathlib.Path, names: Sequence[str] = ()) -> Iterator[pathlib.Path]:
    """Yields a path on the disk with the content of a file or folder, for libraries that need one.

    It is the path itself unless that is in a bucket: then a verified copy, deleted afterwards.

    Args:
      path: file or folder.
      names: files of the folder that are needed; those that do not exist are not copied. Default: all.

    Raises:
      UserError: it cannot be read, or does not fit on the disk.
    """
    if not is_bucket(path):
        yield path
        return
    from taskexpert_jax.storage import transfer

    found = {name: of for name, of in listed(path).items() if name in names} if names else None
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="taskexpert_"))
            copy = transfer.download(bucket_path(path), pathlib.Path(folder) / path.name, found)
        except StoreError:
            raise
        except OSError as error:
            if is_bucket(error.filename):  # there is nothing of this name
                raise
            reason = error.strerror or str(error)
            raise UserError(
                f"{path} cannot be copied to a temporary folder: {reason}; set TMPDIR to another"
            ) from error
        yield copy
