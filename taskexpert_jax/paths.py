"""Paths that users give, in flags, arguments and config fields: the one place that says which are supported."""

import argparse
import os
import pathlib
import re
from typing import NamedTuple

from absl import flags

from taskexpert_jax import storage
from taskexpert_jax.errors import UserError

# s3://bucket/x; also s3:/bucket/x, as path libraries shorten it, and after a space, or it would be a local folder.
_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/|(gs):")
# An object's name has no empty part: path libraries would shorten it.
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](?:/[^/\r\n]+)*/?", re.ASCII)
BUCKET_FORM = "gs://BUCKET/NAME"
# Orbax and TensorStore end a name at ? and #, and write no arrays below one with a tab: checkpoints would be empty.
_NOT_IN_BUCKETS = re.compile(r"[?#]")
_LONGEST = 800  # bytes of an object's name; those of a checkpoint's files are longer, and a store takes 1024

# OWNER/NAME[@REVISION][/SUBFOLDER]; a / of the revision is %2F. Neither . nor .. nor a wildcard is a part.
_PART = r"(?!\.\.?(?:[/@%]|$))[\w.+-]+"
_HUB = re.compile(rf"hf:/+({_PART}/{_PART})(?:@({_PART}(?:%2F{_PART})*))?((?:/{_PART})*)/?", re.ASCII)
HUB_FORM = "hf://OWNER/NAME[@REVISION][/SUBFOLDER]"
MODEL_FORM = "a run's folder, a released one, demo (the bundled model) or hf://OWNER/NAME"  # what `hub.located` takes


def refusal(text: str, *, hub: bool = False) -> str | None:
    """Reason to refuse a path, whatever it is for; None for a path to try.

    hub: takes the address of a released model on the Hugging Face hub too.
    """
    if not text.strip():
        return "the path is empty; give a file or a folder"
    if "\0" in text:
        return "a path has no NUL character"
    if match := _ADDRESS.match(text):
        scheme = match[1] or match[2]
        if scheme == "gs":
            return _bucket_refusal(text)
        if scheme != "hf":
            return f"{scheme}:// addresses are not supported; give a local path or {BUCKET_FORM}"
        if not hub:
            return "hf:// addresses are for a trained model, and --output of release; give a local path"
        return None if _HUB.fullmatch(text) else f"is no address of a model on the hub; give {HUB_FORM}"
    if os.path.expanduser(text).startswith("~"):
        return f"there is no user {text.split('/')[0][1:]!r}; write ./{text} for a path that begins with ~"
    return None


def _bucket_refusal(text: str) -> str | None:
    if not _BUCKET.fullmatch(text) or {".", ".."} & set(text.split("/")):
        return f"is no address of a bucket or an object; give {BUCKET_FORM}"
    if not text.isprintable() or _NOT_IN_BUCKETS.search(text):
        return "has a character that is not safe in the name of a checkpoint, such as ?, # or a tab; give another name"
    if len(text.encode()) > _LONGEST:
        return f"is longer than {_LONGEST} bytes; give a shorter name"
    return None


def is_hub(path: str | pathlib.Path) -> bool:
    """True for an hf:// address, well-formed or not; as a `Path` it has one slash only."""
    return str(path).startswith("hf:/")


class Address(NamedTuple):
    """Address of a model on the hub: repository OWNER/NAME, revision ("": the main one), subfolder ("": none)."""

    repository: str
    revision: str
    subfolder: str

    def __str__(self) -> str:
        revision, subfolder = self.revision.replace("/", "%2F"), self.subfolder
        return f"hf://{self.repository}{f'@{revision}' * bool(revision)}{f'/{subfolder}' * bool(subfolder)}"


def address(path: str | pathlib.Path, name: str) -> Address:
    """The parts of an hf:// address; `name` is the flag or field that gave it.

    Raises:
      UserError: it is malformed.
    """
    text = re.sub("^hf:/+", "hf://", str(path))
    match = _HUB.fullmatch(text)
    if match is None:
        raise UserError(f"{name}={text}: is no address of a model on the hub; give {HUB_FORM}")
    return Address(match[1], (match[2] or "").replace("%2F", "/"), match[3].strip("/"))


def local(text: str, name: str) -> pathlib.Path:
    """The path with `~` expanded; `name` is the field that gave it, for the message.

    Raises:
      UserError: an empty path, an address other than of a bucket, or the home of an unknown user.
    """
    if problem := refusal(text):
        raise UserError(f"{name}={text!r}: {problem}")
    return storage.path(os.path.expanduser(text))


def user_cache() -> pathlib.Path | None:
    """This package's folder in the user's cache folder on this host; None for a user without a home."""
    try:
        folder = pathlib.Path.home() / ".cache"
    except RuntimeError:
        return None
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (folder / given if os.path.isabs(given) else folder) / "taskexpert_jax"


def argument(text: str, *, hub: bool = False) -> pathlib.Path:
    """The path of a command-line argument, as `type` of `argparse`; refuses what `refusal` refuses."""
    if problem := refusal(text, hub=hub):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    try:
        return storage.path(os.path.expanduser(text))
    except UserError as error:  # argparse would print its own line for a ValueError
        raise argparse.ArgumentTypeError(str(error)) from error


def model_argument(text: str) -> pathlib.Path:
    """As `argument`, and takes the hf:// address of a released model, for `runs.hub.located`."""
    return argument(text, hub=True)


class _PathParser(flags.ArgumentParser[pathlib.Path]):
    """Parser of path flags; hub: they take an hf:// address too."""

    def __init__(self, *, hub: bool = False):
        super().__init__()
        self._hub = hub

    def parse(self, argument: str | pathlib.Path) -> pathlib.Path:
        """The path; ValueError for what `refusal` refuses, which absl prints after the flag's name."""
        if problem := refusal(str(argument), hub=self._hub):
            raise ValueError(problem)
        return storage.path(os.path.expanduser(argument))

    def flag_type(self) -> str:
        """For --help."""
        return "path"


def define(name: str, help_text: str, *, hub: bool = False) -> flags.FlagHolder[pathlib.Path | None]:
    """Defines an absl flag for a path; its value is None unless it is given.

    hub: takes the hf:// address of a released model too, for `runs.hub.located`.
    """
    return flags.DEFINE(_PathParser(hub=hub), name, None, help_text, serializer=flags.ArgumentSerializer())


def needed(flag: flags.FlagHolder[pathlib.Path | None], *, hub: bool = False) -> pathlib.Path:
    """The value of a flag of `define`.

    Raises:
      UserError: it is not given; or it is an hf:// address, unless with `hub`.
    """
    if flag.value is None:
        raise UserError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
    if is_hub(flag.value) and not hub:
        raise UserError(f"--{flag.name}={address(flag.value, flag.name)}: {refusal(str(flag.value))}")
    return flag.value
