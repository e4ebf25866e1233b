"""Output to terminals and pipes: control characters are escaped, and a stream that fails stops no program.

Names of files, ids and the JSON of others may hold escape sequences, line breaks and bytes that are not UTF-8.
"""

from collections.abc import Iterator
import contextlib
import os
import re
import sys
from typing import Any

BOLD, PLAIN = "\033[1m", "\033[0m"  # the only escape sequences that pass

# C0 and C1 controls, line and paragraph separators, marks that reverse the direction of text, lone surrogates.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_STREAM = re.compile(rf"(?!\x1b\[[01]m|[\n\t]|\A\r|\r\Z)[{_CONTROL}]")  # \r: progress bars
_IN_LINE = re.compile(rf"(?!\x1b\[[01]m)[{_CONTROL}]")
_IN_MESSAGE = re.compile(rf"(?!\n  )[{_CONTROL}]")


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def one_line(text: object) -> str:
    """The text of a name or of a cell of a table as one line, its control characters as `\\x1b` or `\\n`."""
    return _IN_LINE.sub(_escape, str(text))


def message(text: object) -> str:
    """The text of an error or a warning as one line; lists, whose lines are indented by two spaces, keep theirs."""
    return _IN_MESSAGE.sub(_escape, str(text))


def print_written(path: object) -> None:
    """Prints at once, in one line, that a file or folder has been written."""
    print(f"written: {one_line(path)}", flush=True)


class _Stream:
    """A text stream without control characters, whose errors are kept and not raised.

    Characters that its encoding lacks are written as `\\u2191`. Nothing is written after an error.

    Args:
      stream: the stream that is written to.
      over_bar: a progress bar is hidden while text is written to a terminal.
    """

    def __init__(self, stream: Any, *, over_bar: bool = True):
        self._stream = stream
        self._over_bar = over_bar
        self.failure: Exception | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Writes the text, and returns its length as all text streams do."""
        bar = _bar if _bar is not None and self._over_bar and self._stream.isatty() else None
        if bar is not None:
            bar.clear()
        if self.failure is None:
            with self._kept():
                self._stream.write(_IN_STREAM.sub(_escape, text))
        if bar is not None and text.endswith("\n"):
            self.flush()
            bar.refresh()
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        if self.failure is None:
            with self._kept():
                self._stream.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.failure = error
            with contextlib.suppress(OSError, ValueError):  # or Python complains when it flushes the stream at its end
                _open_null(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


_bar: Any = None  # a progress bar of tqdm on stderr


def stream_of_bar() -> Any:
    """stderr for a progress bar, which does not hide itself."""
    return _Stream(sys.stderr._stream if isinstance(sys.stderr, _Stream) else sys.stderr, over_bar=False)


def set_bar(bar: Any) -> None:
    """Sets the bar that is hidden while text is written to the terminal; None: there is none."""
    global _bar
    _bar = bar


def hide_bar() -> None:
    """Clears the line of the bar, if there is one, from a thread that must not wait for others."""
    if _bar is not None:
        with contextlib.suppress(OSError):
            os.write(2, b"\r\x1b[K")


def guard() -> None:
    """Replaces stdout and stderr by guarded streams, once; a closed one (`>&-`) by one that discards."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file opened would get its number, and the messages of C++ libraries
            _open_null(descriptor)
        if name == "stdin":
            continue
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 (open until the end)
        if not isinstance(stream, _Stream):
            setattr(sys, name, _Stream(stream))


def lost() -> str | None:
    """Flushes stdout; the reason why not all of it could be written, None if all was, or if its reader has left."""
    sys.stdout.flush()
    failure = getattr(sys.stdout, "failure", None)
    if failure is None or isinstance(failure, BrokenPipeError):
        return None
    return getattr(failure, "strerror", None) or str(failure)
