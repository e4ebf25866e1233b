"""JAX's persistent compilation cache, which the programs switch on: a start compiles nothing that is in it.

`import taskexpert_jax` changes no setting of JAX; in your own programs set JAX_COMPILATION_CACHE_DIR.
"""

import os
import pathlib

from absl import logging

from taskexpert_jax import paths, storage
from taskexpert_jax.errors import UserError

FLAG = "compilation_cache"
HELP = (
    "Folder or gs:// address for compiled programs; empty: they are not kept; default: JAX_COMPILATION_CACHE_DIR, else "
    "the user's cache folder, or one in the run's to train in a bucket or in several processes (docs/performance.md)."
)
LARGEST = 2 << 30  # bytes of the user's cache folder


def enable(wanted: str | None, workdir: pathlib.Path | None = None) -> None:
    """Keeps compiled programs, in the folder that `chosen` returns.

    A folder that nobody asked for and that cannot be used is not used, and the programs are compiled: with a warning
    where it is in a bucket.

    Args:
      wanted: the value of --compilation_cache; None: it is not given.
      workdir: the directory of a run to train.

    Raises:
      UserError: the folder of the flag cannot be used.
    """
    import jax

    several = jax.distributed.is_initialized() and jax.process_count() > 1
    folder = chosen(wanted, workdir, jax.default_backend() if several else "")
    try:
        usable = folder is not None and _prepared(folder, workdir)
    except OSError as error:
        if wanted:
            raise UserError(f"--{FLAG}={folder} cannot be used: {error.strerror}; give another, or none") from error
        if storage.is_bucket(folder):
            logging.warning(f"compiled programs are not kept in {folder}: {error.strerror}")
        usable = False
    jax.config.update("jax_compilation_cache_dir", str(folder) if usable else None)
    if usable and storage.is_bucket(folder):  # XLA's own caches for GPUs are files on a disk
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def chosen(wanted: str | None, workdir: pathlib.Path | None, several: str) -> pathlib.Path | None:
    """The folder for compiled programs; None: they are not kept.

    That of the flag, else of JAX_COMPILATION_CACHE_DIR, else the user's cache folder. There the programs of a run that
    is trained in a bucket would be lost with the machine, and JAX writes those of several processes from the first one
    alone: these runs keep them in their own directory. Other programs never read them there, because reading compiled
    programs means to execute what is in the folder, and a run may be somebody else's.

    On CPUs each process has keys of its own, so only the first of several would find its programs, and Gloo gives up on
    those that compile for 30 s longer: by default they keep none.

    Args:
      wanted, workdir: see `enable`.
      several: the platform of several processes; empty: there is one.

    Raises:
      UserError: the flag is no path or address, or the address needs a package that is not installed.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR") if wanted is None else wanted
    if given is not None:
        name = "JAX_COMPILATION_CACHE_DIR" if wanted is None else f"--{FLAG}"
        return paths.local(given, name) if given else None
    if several == "cpu":
        return None
    if workdir is not None and (storage.is_bucket(workdir) or several):
        return workdir / "compilation_cache"
    return paths.user_cache()


def _prepared(folder: pathlib.Path, workdir: pathlib.Path | None) -> bool:
    """Makes the folder and removes what has not been read for longest; False if it cannot be written to."""
    new = not folder.is_dir()
    if storage.is_bucket(folder) or folder.parent == workdir:  # JAX makes it when the run has been accepted
        writable = True
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        prune(folder, LARGEST)
    if new:
        logging.info(f"compiled programs are kept in {folder}; --{FLAG}= turns this off")
    return writable


def prune(folder: pathlib.Path, largest: int) -> None:
    """Removes the programs that have not been read for longest, until the others fit in `largest` bytes."""
    found = []
    for path in folder.glob("*-cache"):
        try:
            facts = path.stat()
        except OSError:  # removed by another program
            continue
        found.append((max(facts.st_atime, facts.st_mtime), facts.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= largest:
            break
        path.unlink(missing_ok=True)
        total -= size
