"""The one exception that means: the user can fix this; and errors of libraries that are of that kind."""

import errno
import os


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do.

    The programs print it as `error: <line>` on stderr and exit with status 2, without a traceback.
    """


_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS)


def disk_refusal(error: object) -> str | None:
    """What the disk said, such as `No space left on device`, where that is what an error comes from.

    Libraries wrap it into errors of their own; TensorFlow also breaks its text off.
    """
    text = " ".join(str(error).split())
    reasons = (os.strerror(code) for code in _OF_DISKS)
    return next((reason for reason in reasons if " ".join(reason.split()[:3]) in text), None)
