"""The exception for errors that the user can fix, and detection of such errors in those of libraries."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os


class UserError(ValueError):
    """Wrong input. The message is one line: what is wrong, where, and what to do.

    The programs print it as `error: <line>` on stderr and exit with status 2, without a traceback.
    """


def shown(value: object, most: int = 100) -> str:
    """A value for a message of one line, as `repr`; what is longer than `most` characters is cut."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        text = "a number of too many digits"
    return text if len(text) <= most else f"{text[:most]}..."


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS)


def disk_refusal(error: object) -> str | None:
    """The disk's reason for an error, such as `No space left on device`; None for other errors.

    Searched in the error's text, because libraries wrap it in their own errors; TensorFlow also truncates it.
    """
    text = " ".join(str(error).split())
    reasons = (os.strerror(code) for code in _DISK_ERRORS)
    return next((reason for reason in reasons if " ".join(reason.split()[:3]) in text), None)


@contextlib.contextmanager
def refused_by_disk(line: Callable[[str], str]) -> Iterator[None]:
    """Raises UserError with `line(reason)` if its body fails because of a full disk or missing permission."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_refusal(error)
        if reason is None:
            raise
        raise UserError(line(reason)) from error
