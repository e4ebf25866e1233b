"""A local folder whose files are sent to a bucket in the background, for writers that append."""

from collections.abc import Callable, Mapping
import contextlib
import pathlib
import threading

from taskexpert_jax.errors import UserError
from taskexpert_jax.storage import generations
from taskexpert_jax.storage.bucket import BucketPath

_SECONDS_BETWEEN_WRITES = 1.0  # a store takes about one write a second of the same object


class Mirror:
    """Sends the files of a folder to a bucket whenever they have changed, each as a whole.

    It replaces no object that others have written or deleted since.

    Args:
      source: the local folder.
      target: folder of the bucket.
      known: generation of the objects that are there already, by name.
      check: called before each write, in the thread; raises UserError to end the mirror.
    """

    def __init__(self, source: pathlib.Path, target: BucketPath, known: Mapping[str, int], check: Callable[[], None]):
        self._source, self._target, self._check = source, target, check
        self._known = dict(known)
        self._sent: dict[pathlib.Path, tuple[int, int]] = {}  # path -> size and time of the version in the bucket
        self._error: Exception | None = None
        self._asked, self._done = 0, 0  # numbers of calls of `changed`
        self._change = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="uploads to the bucket", daemon=True)
        self._thread.start()

    def changed(self) -> None:
        """Sends what has changed; returns at once.

        Raises:
          StoreError: an earlier change could not be sent.
          UserError: an object was written or deleted by others, or `check` raised it.
        """
        with self._change:
            self._raise()
            self._asked += 1
            self._change.notify_all()

    def wait(self) -> None:
        """Returns when all changes are in the bucket; raises as `changed`."""
        self.changed()
        with self._change:
            wanted = self._asked
            self._change.wait_for(lambda: self._done >= wanted or self._error is not None)
            self._raise()

    def close(self) -> None:
        """Sends what has changed, unless an earlier change could not be sent, and ends the thread."""
        with contextlib.suppress(Exception):  # raised below
            self.wait()
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._thread.join()
        with self._change:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._asked > self._done)
                if self._asked == self._done:
                    return
                asked = self._asked
            error = None
            try:
                self._send()
            except Exception as found:  # any, or `wait` would not return
                error = found
            with self._change:
                self._done, self._error = asked, error
                self._change.notify_all()
                if error is not None:
                    return
                self._change.wait_for(lambda: self._closing, timeout=_SECONDS_BETWEEN_WRITES)

    def _send(self) -> None:
        for path in sorted(self._source.rglob("*")):
            if not path.is_file():
                continue
            found = path.stat()
            version = (found.st_size, found.st_mtime_ns)
            if self._sent.get(path) != version:
                self._write(path.relative_to(self._source).as_posix(), path.read_bytes())
                self._sent[path] = version

    def _write(self, name: str, content: bytes) -> None:
        self._check()
        try:
            version = generations.write(self._target / name, content, self._known.get(name, generations.MISSING))
        except generations.Changed:
            line = f"{self._target / name} has been deleted or replaced during the run, which ends here"
            raise UserError(line) from None
        self._known[name] = version.generation
