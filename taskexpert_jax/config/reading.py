"""Reads the config from a run's directory."""

from collections.abc import Iterator
import functools
import pathlib
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from taskexpert_jax import json_file
from taskexpert_jax.config.checking import check
from taskexpert_jax.config.fields import fields_of, first_values, nested
from taskexpert_jax.errors import StoreError, UserError, shown

_REMEDY = "restore the file, or give another directory"


def read_run(workdir: pathlib.Path) -> ConfigDict:
    """The config of a run, from WORKDIR/config.json; JSON lists become tuples.

    Fields that did not exist when the run started get their first defaults, and a logged line names them.

    Raises:
      UserError: the file is missing, or not a run's config.
    """
    path = workdir / "config.json"
    try:
        config, added = restored(json_file.read(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give the --workdir of a run, or a released model") from None
    except StoreError:  # the file needs no remedy
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from error
    except (json_file.MalformedError, UserError) as error:
        raise UserError(f"{path} is not a run's config ({error}); {_REMEDY}") from error
    if added:
        _name_defaults(path, added)
    return config


@functools.cache  # once a program, which may read the file again
def _name_defaults(path: pathlib.Path, added: tuple[str, ...]) -> None:
    logging.info(f"{path} is of an earlier version; with its first default each: {', '.join(added)}")


def restored(saved: Any) -> tuple[ConfigDict, tuple[str, ...]]:
    """The config from its JSON form, and the names of missing fields that got their first defaults.

    Raises:
      UserError: not a config.
    """
    if not isinstance(saved, dict):
        raise UserError("it has no fields")
    values: dict[str, Any] = {}
    for name, value in _leaves(saved):
        if name in values:
            raise UserError(f"config.{name} is given twice")
        values[name] = _with_tuples(value)
    _check_groups(values)
    values = {name: value for name, value in values.items() if value != {}}  # a group without fields
    known = first_values(values)
    added = tuple(name for name in known if name not in values)
    try:
        config = nested(values | {name: known[name] for name in added})
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # such as names that ConfigDict reserves
        raise UserError(shown(" ".join(str(error).split()))) from error
    check(config)
    return config, added


def _leaves(saved: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """As `flat`, with {} for groups without fields."""
    for name, value in saved.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_groups(values: dict[str, Any]) -> None:
    """Raises UserError if a group of fields has a value, or a field is a group of others."""
    known = fields_of(values)
    groups = {group for name in known for group in _groups_of(name)} | {"loss_weights"}
    for name, value in values.items():
        if name in groups and value != {}:
            raise UserError(f"config.{name}={shown(value)}: must be a group of fields")
        if of := next((group for group in _groups_of(name) if group in known), None):
            raise UserError(f"config.{of}: must be a value, not a group of fields")
        if name in known and value == {}:
            raise UserError(f"config.{name}: must be a value, not a group of fields")


def _groups_of(name: str) -> list[str]:
    """The groups that a field is in: `model` and `model.gate` for `model.gate.width`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _with_tuples(value: Any) -> Any:
    return tuple(_with_tuples(inner) for inner in value) if isinstance(value, list) else value
