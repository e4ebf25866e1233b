"""A folder that is deleted or replaced while a run writes to it: one line, and it is not made again."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil

from taskexpert_jax import storage
from taskexpert_jax.errors import UserError


class Presence:
    """Tells whether a folder is still the one that a run started with; a bucket has no folders, but see `lease`."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        # While it is open, no new folder gets the same inode.
        self._descriptor = None if storage.is_bucket(path) else os.open(path, os.O_RDONLY)

    @property
    def gone(self) -> bool:
        """True if there is no such folder any more, or another one."""
        if self._descriptor is None:
            return False
        return not self._path.is_dir() or not os.path.samestat(self._path.stat(), os.fstat(self._descriptor))

    def close(self) -> None:
        """Ends the watch."""
        if self._descriptor is not None:
            os.close(self._descriptor)

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """Raises UserError before its body, or in place of any error in it, if the folder is gone."""
        try:
            if not self.gone:
                yield
        except UserError:
            raise
        except Exception as error:
            if not self.gone:
                raise
            raise self._error() from error
        if self.gone:
            raise self._error()

    def _error(self) -> UserError:
        return UserError(f"{self._path} has been deleted or replaced during the run, which ends here")

    def remove_remade(self, *names: str) -> None:
        """If a library has made the folder again, removes its content of these names, and what is empty then.

        names: of files or folders, without the suffixes that the library adds after a dot.
        """
        if self.gone and self._path.is_dir():
            for path in self._path.iterdir():
                if path.name.split(".")[0] in names:
                    shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty
                self._path.rmdir()
                self._path.parent.rmdir()
