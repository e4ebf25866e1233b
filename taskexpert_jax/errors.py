"""The one exception that means: the user can fix this."""


class UserError(Exception):
    """Wrong input. The message is one line: what is wrong, where, and what to do.

    The programs print it as `error: <line>` on stderr and exit with status 2, without a traceback.
    """
