"""What the programs that take a config share on the command line: wrong input ends in one line, not in a trace."""

from collections.abc import Sequence
import sys
from typing import Any, NoReturn

from absl import flags, logging


def fail(text: str, status: int = 2) -> NoReturn:
    """Ends the program with `error: <text>` on stderr and a status, that of wrong input."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(status)


def quieten() -> None:
    """Leaves out what libraries tell of every file that they open or rename, unless the user gave a --verbosity."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line, for `app.run(flags_parser=...)`; wrong flags, fields or config files end in one line.

    The program must have a flag `config`.
    """
    try:
        rest = flags.FLAGS(argv)
        config: Any = flags.FLAGS["config"].value
        _ = config.to_dict  # a file that is not there is said when its config is used
        return rest
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        text = str(error).strip()
        if "Traceback" in text:  # of a config file that raised
            text = text.splitlines()[-1]
        elif isinstance(error, OSError):
            text = f"no readable config file: {text.splitlines()[-1].strip()}"
        elif isinstance(error, AttributeError | KeyError):
            hint = "" if "Did you mean" in text else "; all fields are in taskexpert_jax/config/fields.py"
            cause = error.args[0]  # ConfigDict's text, or its error wrapped in another
            text = f"unknown config field {cause.args[0] if isinstance(cause, Exception) else cause}{hint}"
        fail(" ".join(text.split()))
