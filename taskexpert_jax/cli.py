"""The console script `taskexpert COMMAND ...`; also `python -m taskexpert_jax COMMAND ...`. See docs/command_line.md.

A command is a row of `COMMANDS`. Its program is imported when it runs, so that --help and wrong commands take no time.
An argument straight after the command that is no flag is the run: `taskexpert evaluate RUN` is
`main.py --mode=evaluate --workdir=RUN`.
"""

from collections.abc import Iterator, Sequence
import contextlib
import difflib
import importlib
import signal
import sys
from typing import Literal, NamedTuple

from absl import flags

from taskexpert_jax import command_line, installation, paths, terminal
from taskexpert_jax.errors import UserError, shown


class Command(NamedTuple):
    """A command.

    Attributes:
      module: has the program, as `main()`.
      usage: its most used arguments.
      help: what it does, in one line.
      run: how its program takes the run, as the flag --workdir or as its first argument; empty: it needs no run.
      released: the run may be a released model, also as --model.
    """

    module: str
    usage: str
    help: str
    run: Literal["", "flag", "argument"] = ""
    released: bool = False


MODES = "taskexpert_jax.modes"
COMMANDS = {
    "train": Command(MODES, "RUN --config=nyud:vit_l16", "train a model, or resume a run", "flag"),
    "evaluate": Command(
        MODES,
        "RUN [--checkpoint=best|latest|STEP] [--output=DIR]",
        "evaluate a checkpoint: metrics, classes, gates, an HTML report",
        "flag",
        released=True,
    ),
    "predict": Command(
        MODES,
        "RUN --images=FILE_OR_FOLDER [--output=DIR]",
        "predict images: colour images, raw arrays, a montage each",
        "flag",
        released=True,
    ),
    "gates": Command(
        "taskexpert_jax.gates",
        "RUN --images=FILE_OR_FOLDER [--output=DIR]",
        "map the gate weights over images",
        "flag",
        released=True,
    ),
    "export": Command(
        MODES,
        "RUN --output=DIR [--checkpoint=best|latest|STEP]",
        "export the model as a program that runs with JAX alone",
        "flag",
        released=True,
    ),
    "compare": Command(
        "taskexpert_jax.compare", "RUN... [--paper=nyud] [--single RUN...]", "tabulate runs and published results"
    ),
    "score": Command(
        "taskexpert_jax.score",
        "--config=nyud --predictions=DIR --config.dataset.data_dir=DATA",
        "evaluate prediction files of any model",
    ),
    "checkpoint": Command(
        "taskexpert_jax.checkpoint", "RUN [--verify] [--tree]", "list or verify checkpoints", "argument", released=True
    ),
    "serve": Command(
        "taskexpert_jax.serve",
        "RUN [--port=7860] [--host=127.0.0.1]",
        "show predictions and gates of images in the browser",
        "argument",
        released=True,
    ),
    "release": Command(
        "taskexpert_jax.release",
        "RUN --output=DIR_OR_ADDRESS [--license=ID]",
        "release a model: a folder with its card, or on the Hugging Face hub",
        "argument",
        released=True,
    ),
    "compile": Command(
        MODES, "--config=nyud:vit_l16 --topology=v5e:4x4", "report memory and traffic on hardware that is absent"
    ),
    "prepare": Command(
        "input_pipeline.prepare", "DATASET --archive=PATH --data_dir=DIR", "verify an archive and build a data set"
    ),
    "show": Command("input_pipeline.show", "CONFIG --output=DIR [--check]", "draw training examples with their labels"),
    "scenes": Command("input_pipeline.scenes", "--output=DIR [--count=6]", "write images of the built-in scenes"),
}


def main() -> int:
    """The program; returns its exit status, or exits with it."""
    with _ended_by_interrupts():
        terminal.guard()
        name, *arguments = sys.argv[1:] or ["--help"]
        if name in ("--help", "-h", "help"):
            return command_line.ended(lambda: print(overview()))
        if name == "--version":
            return command_line.ended(lambda: print(f"taskexpert-jax {installation.version_text()}"))
        try:
            sys.argv[:] = [f"{command_line.PROGRAM} {name}", *translated(name, arguments)]
        except UserError as error:
            command_line.fail(str(error))
        if command_line.asks_for_help(sys.argv):
            print(_head(COMMANDS[name], usage(name)), end="")
        installation.enable()
        return importlib.import_module(COMMANDS[name].module).main() or 0


def overview() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: taskexpert COMMAND ...",
            "",
            *lines,
            "",
            "taskexpert COMMAND --help describes a command, taskexpert --version prints the version.",
            "RUN is the folder that training writes to. All but train and compare also take a released model as RUN:",
            "its folder, demo (the bundled one) or hf://OWNER/NAME.",
        ]
    )


def usage(name: str) -> str:
    """Usage line of a command, such as `taskexpert evaluate RUN [--checkpoint=...]`."""
    return f"{command_line.PROGRAM} {name} {COMMANDS[name].usage}"


def translated(name: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of a command as its program takes them.

    Raises:
      UserError: an unknown command; no run, or several; --mode; a flags file that cannot be read.
    """
    if name not in COMMANDS:
        raise UserError(_unknown(name))
    command, rest = COMMANDS[name], list(arguments)
    first = [rest.pop(0)] if command.run and rest and not rest[0].startswith("-") else []
    if command.module == MODES or command.run == "flag":
        rest = _with_files(rest)
    mode = [f"--mode={name}"] if command.module == MODES else []
    if mode and _taken(rest, "mode"):
        raise UserError(f"--mode is a flag of main.py; here the command is the mode, and this is taskexpert {name}")
    if not command.run or any(part.startswith("--help") for part in rest) or command_line.asks_for_help(rest):
        return [*mode, *rest]
    runs = [*first, *_taken(rest, "workdir"), *(_taken(rest, "model") if command.released else ())]
    if not runs:
        raise UserError(f"which run? {usage(name)}{', or --model=demo for RUN' * command.released}")
    if len(runs) > 1:
        raise UserError(f"the run is given {len(runs)} times, as {', '.join(map(shown, runs))}: give it once")
    return [*mode, f"--workdir={runs[0]}", *rest] if command.run == "flag" else [runs[0], *rest]


def _head(command: Command, line: str) -> str:
    """Text of --help before a command's flags; programs that use argparse describe their arguments themselves."""
    what = f"usage: {line}\n\n{command.help}\n\n" if command.module == MODES else ""
    run = f"RUN: {paths.MODEL_FORM}; also as --model=RUN\n\n" if command.released and command.run == "flag" else ""
    return what + run


def _unknown(name: str) -> str:
    if name.startswith("-"):
        return f"the command comes first: taskexpert COMMAND {name} ...; taskexpert --help lists the commands"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown command {shown(name)}; {hint}taskexpert --help lists the commands"


def _with_files(arguments: list[str]) -> list[str]:
    """The arguments with the flags of --flagfile=FILE in its place."""
    try:
        return flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
    except (flags.Error, UnicodeDecodeError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _taken(arguments: list[str], flag: str) -> list[str]:
    """Values of --FLAG=VALUE and --FLAG VALUE, which are removed from the arguments."""
    values, index = [], 0
    while index < len(arguments) and arguments[index] != "--":
        name, equals, value = arguments[index].partition("=")
        if name not in (f"--{flag}", f"-{flag}"):
            index += 1
            continue
        del arguments[index]
        if not equals:
            if index == len(arguments):
                raise UserError(f"--{flag} needs a value: --{flag}=VALUE")
            value = arguments.pop(index)
        values.append(value)
    return values


@contextlib.contextmanager
def _ended_by_interrupts() -> Iterator[None]:
    """Within its body, Ctrl-C ends the program without a traceback until a command handles it: imports take seconds."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
