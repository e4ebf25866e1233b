"""Command line of the programs: flags, errors in one line, exit status, and what is logged."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import logging as standard_logging
import os
import pathlib
import re
import signal
import sys
import textwrap
from typing import Any, NoReturn
import warnings

from absl import app, flags, logging
from absl.logging import converter
from ml_collections import ConfigDict, config_flags

from taskexpert_jax import installation, interruption, terminal
from taskexpert_jax.errors import UserError

PROGRAM = "taskexpert"  # the console script, which puts its command into sys.argv[0]

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_FIELD = re.compile(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", re.DOTALL)
_OUR_MODULES = ("taskexpert_jax", "input_pipeline", "__main__")
_OURS = tuple(str(_ROOT / package) for package in ("taskexpert_jax", "input_pipeline", "main.py"))

# Until a program runs, Ctrl-C ends it without a traceback: the imports that follow take seconds.
if str(getattr(sys.modules["__main__"], "__file__", None)).startswith(_OURS):
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def print_error(text: object) -> None:
    """Writes `error: <text>` to stderr, in one line."""
    print(f"error: {terminal.message(text)}", file=sys.stderr, flush=True)


def fail(text: str, status: int = 2) -> NoReturn:
    """Exits with `error: <text>` on stderr and a status; default: the status of wrong input."""
    print_error(text)
    sys.exit(status)


def by_script() -> bool:
    """True if the console script called this program."""
    return sys.argv[0].startswith(f"{PROGRAM} ")


def called(mode: str, run: object = "") -> str:
    """A mode of main.py as the user would call it, in the way that this program was called."""
    if by_script():
        return " ".join(filter(None, (PROGRAM, mode, str(run))))
    return f"main.py --mode={mode} --workdir={run}" if run else f"--mode={mode}"


class Parser(argparse.ArgumentParser):
    """Parser of the programs without a config; exits with one line on wrong arguments."""

    def __init__(self, module: str, description: str | None):
        name = sys.argv[0] if by_script() else f"python -m {module}"
        super().__init__(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Exits with `error: ...` on stderr."""
        fail(f"{message}; {self.prog} --help lists the arguments")


class _Stderr(standard_logging.Handler):
    """Writes `message` for progress and `warning: message` from there on to stderr.

    Libraries log every file that they open: of their messages only warnings are shown.
    """

    def filter(self, record: standard_logging.LogRecord) -> bool:
        """Lets warnings of every library through, and our own lines of progress."""
        return record.levelno > standard_logging.INFO or record.pathname.startswith(_OURS)

    def emit(self, record: standard_logging.LogRecord) -> None:
        """Writes a line."""
        level = f"{record.levelname.lower()}: " if record.levelno > standard_logging.INFO else ""
        print(f"{level}{terminal.message(record.getMessage())}", file=sys.stderr, flush=True)


def configure_logging(verbosity: int | None = None) -> None:
    """Shows progress and warnings on stderr in plain lines; `--verbosity=-1` shows warnings only, -2 errors only.

    verbosity: of a program without absl flags; None: that of the flag.
    """
    logger = logging.get_absl_logger()
    logger.handlers = [_Stderr()]
    logger.propagate = False
    flag = flags.FLAGS["verbosity"]
    if verbosity is None and flag.present:
        verbosity = flag.value
    if verbosity is None:
        logging.set_verbosity(logging.WARNING)  # of loggers outside of absl, such as JAX's
    logger.setLevel(converter.absl_to_standard(logging.INFO if verbosity is None else verbosity))


def ignore_warnings() -> None:
    """Hides Python's warnings that name no file and that nobody can act on; what cannot be decoded raises."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata that is not used here
    warnings.filterwarnings("ignore", message="Reading `.npy` or `.npz` file required additional header parsing")
    # Of a checkpoint's writes that have not started when an earlier one fails.
    warnings.filterwarnings("ignore", message="coroutine '.*' was never awaited", category=RuntimeWarning)


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Logs errors only within its body."""
    logger = logging.get_absl_logger()
    level = logger.level
    logger.setLevel(standard_logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def ended(program: Callable[[], object], interrupted: str | Callable[[], str] = "interrupted") -> int:
    """Runs a program and returns its exit status: 2 for wrong input, with one line, and 1 if stdout is incomplete.

    What it prints can neither fail it (see `terminal`) nor reach the terminal with control characters.

    Args:
      program: the program.
      interrupted: the line for Ctrl-C, which ends the program with status 130; or a function that returns it.
    """
    terminal.guard()
    ignore_warnings()
    with interruption.handled(interrupted if callable(interrupted) else lambda: interrupted):
        try:
            program()
        except UserError as error:
            print_error(error)
            return 2
        except (RuntimeError, AssertionError):  # what JAX raises where it finds no device
            if not (line := absent_device()):
                raise
            print_error(line)
            return 2
        if reason := terminal.lost():
            print_error(f"not everything could be printed: {reason}")
            return 1
        return 0


def absent_device() -> str:
    """The message if JAX_PLATFORMS names devices that this machine or this installation of JAX lacks; else ""."""
    jax, asked = sys.modules.get("jax"), os.environ.get("JAX_PLATFORMS")
    if jax is None or not asked:
        return ""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()).split(" (set JAX_PLATFORMS")[0]
        said = f": {reason}" if reason else ""
        return f"JAX_PLATFORMS={asked}: JAX finds no such device here{said}; unset it, or install JAX for that device"
    return ""


def run(
    program: Callable[[], None],
    *,
    doc: str | None = None,
    shown: Callable[[str], bool] = lambda name: True,
    parse: Callable[[Sequence[str]], list[str]] | None = None,
    arguments: str = "flags start with --",
    interrupted: str | Callable[[], str] = "interrupted",
) -> None:
    """Runs a program with absl flags and exits with its status, see `ended`.

    Args:
      program: called after the flags are parsed.
      doc: what --help prints before the flags.
      shown: whether --help lists a flag, by its name.
      parse: parses the command line and returns the arguments that are no flags; default: `parse_flags`.
      arguments: what to say of such an argument.
      interrupted: the line for Ctrl-C, or a function that returns it.
    """

    def main(argv: Sequence[str]) -> int:
        def checked() -> None:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}: {arguments}")
            configure_logging()
            program()

        status = ended(checked, interrupted)
        if status:  # at once: after a failed write, threads of Orbax may wait for its end for many minutes
            sys.stdout.flush()
            os._exit(status)
        return status

    terminal.guard()
    if asks_for_help(sys.argv[1:]):
        print(f"{(doc or '').strip()}\n\n{_flags_help(shown)}".strip())
        sys.exit()
    installation.enable()
    app.run(main, flags_parser=parse or parse_flags)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """True for --help and its short forms; --helpfull is absl's, and lists the flags of libraries too."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return not {"--help", "-help", "-h", "-?"}.isdisjoint(before)


def _flags_help(shown: Callable[[str], bool]) -> str:
    """The project's flags, each with its help and default."""
    lines = ["flags:"]
    modules = flags.FLAGS.flags_by_module_dict()
    ours = [flag for module, own in modules.items() if module.startswith(_OUR_MODULES) for flag in own]
    for flag in sorted(ours, key=lambda flag: flag.name):
        if shown(flag.name):
            value = "" if flag.boolean else "=VALUE"
            default = f" (default: {flag.default})" if flag.default not in (None, False, []) else ""
            text = re.sub(r"^For [\w, ]+: ", "", flag.help) if by_script() else flag.help  # the command is the mode
            text = f"{text[:1].upper()}{text[1:]}{default}"
            lines.append(_flag_line(f"--{flag.name}{value}", text))
            if flag.name == "config":
                fields = "A field of the config; all are in taskexpert_jax/config/fields.py."
                lines.append(_flag_line("--config.FIELD=VALUE", fields))
    lines.append(_flag_line("--verbosity=VALUE", "-1: only warnings and errors; -2: only errors."))
    return "\n".join(lines)


def _flag_line(flag: str, text: str) -> str:
    indent = " " * 26
    return textwrap.fill(text, 110, initial_indent=f"  {flag:<23} ", subsequent_indent=indent)


def define_config(help_text: str) -> flags.FlagHolder[ConfigDict]:
    """Defines the flag --config; exits with one line if a flags file on the command line cannot be read."""
    try:
        return config_flags.DEFINE_config_file("config", None, help_text)
    except (flags.Error, UnicodeDecodeError) as error:  # ml_collections reads the command line already here
        fail(" ".join(str(error).split()))


def parse_flags(argv: Sequence[str], own_config: Callable[[], Any] | None = None) -> list[str]:
    """Parses the command line, for `run`; exits with one line on wrong flags, fields or configs.

    The program must have a flag `config`. Without --config the config is that of `own_config()`, called when all other
    flags are parsed; --config.FIELD=VALUE then changes its fields. Without that too, --config is an error.
    """
    try:
        argv = _with_config_file(_last_values(argv))
        if own_config is not None and not _gives_config(argv):
            _parse_others(argv)
            configure_logging()
            if (config := own_config()) is not None:
                del flags.FLAGS.config
                values = flags.FLAGS
                config_flags.DEFINE_config_dict("config", config, "The run's.", sys_argv=argv, flag_values=values)
        rest = flags.FLAGS(argv)
        config = flags.FLAGS["config"].value
        if config is None and len(rest) > 1:
            return rest  # `run` names the argument, such as a mode without --mode=
        if config is None:
            raise ValueError(
                "--config is missing: give a config file, such as --config=configs/nyud.py:vit_b16; evaluate and "
                "predict (--mode) take the run's own"
            )
        _ = config.to_dict  # a missing config file raises only when the config is used
        return rest
    except UserError as error:
        fail(str(error))
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        text = str(error).strip()
        if "Traceback" in text:  # a config file raised an error
            text = text.splitlines()[-1].removeprefix("ValueError: ")
        elif isinstance(error, OSError):
            text = f"no readable config file: {text.splitlines()[-1].strip()}"
        elif isinstance(error, AttributeError | KeyError):
            hint = "" if "Did you mean" in text else "; all fields are in taskexpert_jax/config/fields.py"
            cause = error.args[0]  # ConfigDict's text, or its error wrapped in another
            text = f"unknown config field {cause.args[0] if isinstance(cause, Exception) else cause}{hint}"
        fail(" ".join(text.split()))


def refuse_flags_of_others(mode: str, of_modes: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError if a flag is given that only other modes use; of_modes: the flags that not all modes use."""
    for name in sorted({name for names in of_modes.values() for name in names} - set(of_modes[mode])):
        if flags.FLAGS[name].present:
            modes = " or ".join(other for other, names in of_modes.items() if name in names)
            raise UserError(f"--{name} is for {called(modes)}, and this is {called(mode)}")


def _last_values(argv: Sequence[str]) -> list[str]:
    """The command line without all but the last value of each config field; a warning names a field with several.

    ml_collections would join the values of a tuple.

    Raises:
      flags.Error: a flags file cannot be read; a repeated field whose value is an argument of its own.
    """
    argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)]
    given: dict[str, list[tuple[int, str | None]]] = {}
    for index, argument in enumerate(argv):
        if argument == "--":
            break
        if found := _FIELD.fullmatch(argument):
            given.setdefault(found[1], []).append((index, found[2]))
    dropped = set()
    for field, values in given.items():
        texts = [text for _, text in values]
        if len(values) > 1 and None in texts:
            raise flags.Error(f"--config.{field} is given {len(values)} times; give it once, as --config.{field}=VALUE")
        if len(set(texts)) > 1:
            print(
                f"warning: --config.{field} is given {len(values)} times; the last value counts: {texts[-1]}",
                file=sys.stderr,
            )
        dropped |= {index for index, _ in values[:-1]}
    return [argument for index, argument in enumerate(argv) if index not in dropped]


def _with_config_file(argv: Sequence[str]) -> list[str]:
    """The command line with the file in --config=~/FILE and in short names of bundled configs, as --config=nyud."""
    found = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if equals and flag in ("-config", "--config"):
            argument = f"{flag}={installation.config_file(os.path.expanduser(value))}"
        elif found and found[-1] in ("-config", "--config"):
            argument = installation.config_file(os.path.expanduser(argument))
        found.append(argument)
    return found


def _gives_config(argv: Sequence[str]) -> bool:
    return any(argument.lstrip("-").partition("=")[0] == "config" for argument in argv[1:] if argument.startswith("-"))


def _parse_others(argv: Sequence[str]) -> None:
    """Parses all flags but --config.FIELD=VALUE, which are unknown as long as there is no config."""
    flags.FLAGS.set_gnu_getopt(True)  # also those after the value in `--config.FIELD VALUE`
    flags.FLAGS(argv, known_only=True)
    flags.FLAGS.set_gnu_getopt(False)
