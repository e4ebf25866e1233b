"""The exception for errors that the user can fix, and detection of such errors in those of libraries."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os
import re


class UserError(ValueError):
    """Wrong input. The message is one line: what is wrong, where, and what to do.

    The programs print it as `error: <line>` on stderr and exit with status 2, without a traceback.
    """


class StoreError(OSError, UserError):
    """Object storage refuses a request, or does not answer. `strerror` is the reason, and `filename` the address."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


def shown(value: object, most: int = 100) -> str:
    """A value for a message of one line, as `repr`; what is longer than `most` characters is cut."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        text = "a number of too many digits"
    return text if len(text) <= most else f"{text[:most]}..."


# Status codes of TensorStore for what a store refuses, or does not answer.
_STORE_ERRORS = (
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "ABORTED",
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS)


def disk_refusal(error: object) -> str | None:
    """The disk's reason for an error, such as `No space left on device`; None for other errors.

    Searched in the error's text, because libraries wrap it in their own errors; TensorFlow also truncates it. Errors of
    object storage count as the disk's.
    """
    if reason := _store_refusal(error):
        return reason
    text = " ".join(str(error).split())
    reasons = (os.strerror(code) for code in _DISK_ERRORS)
    return next((reason for reason in reasons if " ".join(reason.split()[:3]) in text), None)


def _store_refusal(error: object) -> str | None:
    """The reason of a StoreError among the causes of an error, or of TensorStore's client, whose errors are text."""
    found, text = error, " ".join(str(error).split())
    while isinstance(found, BaseException):
        if isinstance(found, StoreError):
            return found.strerror
        found = found.__cause__ or found.__context__
    status = re.search(r"\b([A-Z]+(?:_[A-Z]+)*): .*(?:gs://|gcs|googleapis|storage/v1)", text)
    return f"the store refused it ({status[1]})" if status and status[1] in _STORE_ERRORS else None


@contextlib.contextmanager
def refused_by_disk(line: Callable[[str], str]) -> Iterator[None]:
    """Raises UserError with `line(reason)` if its body fails because of a full disk or missing permission."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, StoreError):
            raise
        reason = disk_refusal(error)
        if reason is None:
            raise
        raise UserError(line(reason)) from error
