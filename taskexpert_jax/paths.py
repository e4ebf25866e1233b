"""Paths that users give, in flags, arguments and config fields: the one place that says which are supported."""

import argparse
import os
import pathlib
import re

from absl import flags

from taskexpert_jax.errors import UserError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # gs://bucket/x; also gs:/bucket/x, as path libraries shorten it


def refusal(text: str) -> str | None:
    """Reason to refuse a path, whatever it is for; None for a path to try."""
    if not text.strip():
        return "the path is empty; give a file or a folder"
    if "\0" in text:
        return "a path has no NUL character"
    if match := _ADDRESS.match(text):
        scheme = match.group().partition(":")[0]
        return f"{scheme}:// addresses are not supported; give a local path, such as that of a mounted bucket"
    if os.path.expanduser(text).startswith("~"):
        return f"there is no user {text.split('/')[0][1:]!r}; write ./{text} for a path that begins with ~"
    return None


def local(text: str, name: str) -> pathlib.Path:
    """The path with `~` expanded; `name` is the field that gave it, for the message.

    Raises:
      UserError: an empty path, an address such as gs://bucket, or the home of an unknown user.
    """
    if problem := refusal(text):
        raise UserError(f"{name}={text!r}: {problem}")
    return pathlib.Path(os.path.expanduser(text))


def argument(text: str) -> pathlib.Path:
    """The path of a command-line argument, as `type` of `argparse`; refuses what `local` refuses."""
    if problem := refusal(text):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return pathlib.Path(os.path.expanduser(text))


class _PathParser(flags.ArgumentParser[pathlib.Path]):
    """Parser of path flags."""

    def parse(self, argument: str | pathlib.Path) -> pathlib.Path:
        """The path; ValueError for what `local` refuses, which absl prints after the flag's name."""
        if problem := refusal(str(argument)):
            raise ValueError(problem)
        return pathlib.Path(os.path.expanduser(argument))

    def flag_type(self) -> str:
        """For --help."""
        return "path"


def define(name: str, help_text: str) -> flags.FlagHolder[pathlib.Path | None]:
    """Defines an absl flag for a path; its value is None unless it is given."""
    return flags.DEFINE(_PathParser(), name, None, help_text, serializer=flags.ArgumentSerializer())


def needed(flag: flags.FlagHolder[pathlib.Path | None]) -> pathlib.Path:
    """The value of a flag of `define`.

    Raises:
      UserError: it is not given.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
    return flag.value
