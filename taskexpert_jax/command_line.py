"""Command line of the programs that take a config: wrong input ends in one line, without a traceback."""

from collections.abc import Sequence
import sys
from typing import Any, NoReturn

from absl import flags, logging


def fail(text: str, status: int = 2) -> NoReturn:
    """Exits with `error: <text>` on stderr and a status; default: the status of wrong input."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(status)


def quieten() -> None:
    """Hides libraries' log lines about every file that they open or rename, unless --verbosity is given."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line, for `app.run(flags_parser=...)`; exits with one line on wrong flags, fields or configs.

    The program must have a flag `config`.
    """
    try:
        rest = flags.FLAGS(argv)
        config: Any = flags.FLAGS["config"].value
        _ = config.to_dict  # a missing config file raises only when the config is used
        return rest
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        text = str(error).strip()
        if "Traceback" in text:  # a config file raised an error
            text = text.splitlines()[-1]
        elif isinstance(error, OSError):
            text = f"no readable config file: {text.splitlines()[-1].strip()}"
        elif isinstance(error, AttributeError | KeyError):
            hint = "" if "Did you mean" in text else "; all fields are in taskexpert_jax/config/fields.py"
            cause = error.args[0]  # ConfigDict's text, or its error wrapped in another
            text = f"unknown config field {cause.args[0] if isinstance(cause, Exception) else cause}{hint}"
        fail(" ".join(text.split()))
