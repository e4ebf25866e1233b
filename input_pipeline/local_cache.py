"""Copies of data sets in a bucket on the disk: one for all processes of a host, checked by the store's checksums.

A copy is the folder CACHE/NAME-DIGEST; the digest is of the names, sizes and checksums of its objects, so changed data
get another folder. It is written as a hidden folder, which gets this name when every checksum is right. The copy of a
killed process is completed by the next one.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import hashlib
import pathlib
import shutil
import tempfile
import time

from absl import logging
from ml_collections import ConfigDict

from input_pipeline import downloads, file_lock, records
from taskexpert_jax import paths, storage
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.storage.facts import Facts

AUTO = "auto"
_FIELD = "config.dataset.local_cache"


def located(config: ConfigDict) -> ConfigDict:
    """The data config with the place to read from as `data_dir`: for data in a bucket, their copy in `local_cache`.

    The first call in a process copies the data, unless the host has a whole copy.

    config: the `dataset` part of the config; returned as it is for local data, or with an empty `local_cache` or none.

    Raises:
      UserError: the data or the bucket cannot be read, or the copy does not fit on the disk.
    """
    cache = config.get("local_cache", "")
    if "data_dir" not in config or not storage.is_bucket(config.data_dir) or not cache:
        return config
    source, within = paths.local(config.data_dir, "config.dataset.data_dir"), ""
    builder = getattr(records.dataset_module(config.name), "Builder", None)
    if builder is not None:
        records.directory(builder, config.data_dir)  # says how to build what is missing
        within = builder.folder()
    local = config.copy_and_resolve_references()
    local.data_dir = str(_copied(str(source), within, cache))
    return local


def default_folder() -> pathlib.Path:
    """Folder of the copies for "auto"."""
    return (paths.user_cache() or pathlib.Path(tempfile.gettempdir()) / "taskexpert_jax") / "data"


@functools.cache  # one listing a program: a run opens its data at each evaluation
def _copied(source: str, within: str, setting: str) -> pathlib.Path:
    """The copy of the objects below `source/within`, in their folder `within` of the path returned."""
    cache = default_folder() if setting == AUTO else paths.local(setting, _FIELD).absolute()
    objects = storage.path(source) / within
    with _errors_of(cache, setting, within):
        found = storage.listed(objects)
        if not found:
            raise UserError(f"config.dataset.data_dir: there is nothing at {objects}; check the address")
        name = within.replace("/", "-") or objects.name
        digest = hashlib.sha256("".join(f"{at}\n{found[at][:2]}\n" for at in sorted(found)).encode()).hexdigest()[:16]
        target = cache / f"{name[-60:]}-{digest}"
        if _is_whole(target / within, found):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process of this host, which copies {objects} to {target}"
        with file_lock.held(cache / f".{target.name}.lock", waiting=waiting):
            if not _is_whole(target / within, found):
                _copy(objects, found, target, within)
    return target


def _is_whole(folder: pathlib.Path, found: Mapping[str, Facts]) -> bool:
    """True if all files are there in their size; their checksums were right when the folder got its name."""
    try:
        return all((folder / name).stat().st_size == of_object.size for name, of_object in found.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _copy(objects: pathlib.Path, found: Mapping[str, Facts], target: pathlib.Path, within: str) -> None:
    """Copies the objects to `target/within`."""
    partial = target.with_name(f".{target.name}.partial")
    if target.exists():
        logging.warning(f"{target}: files are missing or truncated; they are copied again")
        shutil.rmtree(partial, ignore_errors=True)
        target.rename(partial)
    start = time.monotonic()
    try:
        downloads.fetch(objects, partial / within, target.parent, _remedy(within), found)
    except (OSError, UserError) as error:
        if not isinstance(error, StoreError):  # the disk is full, and other programs need it too
            shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(target)
    size = sum(of_object.size for of_object in found.values())
    logging.info(f"copied {objects} to {target}: {downloads.mib(size)} in {time.monotonic() - start:.0f} s")


def _remedy(within: str) -> str:
    """The end of the message for a disk that takes no copy: ways out."""
    direct = f", or read from the bucket with --{_FIELD}=''" if within else ""
    return f"give a folder on another disk with --{_FIELD}=FOLDER{direct}"


@contextlib.contextmanager
def _errors_of(cache: pathlib.Path, setting: str, within: str) -> Iterator[None]:
    """Raises UserError for errors of the disk; those of the bucket are UserErrors."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if storage.is_bucket(error.filename):
            raise UserError(f"{error.filename}: {error.strerror}; it was removed while it was copied") from error
        where = error.filename or cache
        raise UserError(f"{_FIELD}={setting}: {where}: {error.strerror}; {_remedy(within)}") from error
