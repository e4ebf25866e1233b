"""Reads the config from a run's directory."""

import json
import pathlib
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from taskexpert_jax.config.checking import check, flat
from taskexpert_jax.config.fields import defaults, nested
from taskexpert_jax.errors import UserError

_REMEDY = "restore the file, or give another directory"


def read_run(workdir: pathlib.Path) -> ConfigDict:
    """The config of a run, from WORKDIR/config.json; JSON lists become tuples.

    Fields that did not exist when the run started get their defaults, and a logged line names them.

    Raises:
      UserError: the file is missing, or not a run's config.
    """
    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give the --workdir of a run of main.py") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a run's config ({error}); {_REMEDY}") from error
    try:
        config, added = restored(saved)
    except UserError as error:
        raise UserError(f"{path} is not a run's config ({error}); {_REMEDY}") from error
    if added:
        logging.info(f"{path} is of an earlier version; with its default each: {', '.join(added)}")
    return config


def restored(saved: Any) -> tuple[ConfigDict, tuple[str, ...]]:
    """The config from its JSON form, and the names of missing fields that got their defaults.

    Raises:
      UserError: not a config.
    """
    if not isinstance(saved, dict):
        raise UserError("it has no fields")
    values = {name: _with_tuples(value) for name, value in flat(saved)}
    known = defaults(str(values.get("variant")), str(values.get("dataset.name")))
    added = tuple(name for name in known if name not in values)
    try:
        config = nested(values | {name: known[name] for name in added})
    except (TypeError, ValueError, KeyError) as error:  # such as a number in place of a group of fields
        raise UserError(" ".join(str(error).split())) from error
    check(config)
    return config, added


def _with_tuples(value: Any) -> Any:
    return tuple(_with_tuples(inner) for inner in value) if isinstance(value, list) else value
