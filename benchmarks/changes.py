"""Changes of a config on the command line of a benchmark: FIELD=VALUE, such as model.gate.init=even."""

import ast
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from taskexpert_jax.config import flat
from taskexpert_jax.errors import UserError


def parsed(text: str, like: Any) -> Any:
    """The value of a text for a field that has the value `like`; the text itself if it is no Python literal."""
    try:
        return ast.literal_eval(text.capitalize() if isinstance(like, bool) else text)
    except (ValueError, SyntaxError):
        return text


def apply(config: ConfigDict, changes: Iterable[str], flag: str = "") -> None:
    """Changes the config; flag: stands before a change in messages.

    Raises:
      UserError: an unknown field, or a value of another kind.
    """
    known = dict(flat(config))
    for change in changes:
        field, mark, text = change.partition("=")
        if not mark or field not in known:
            raise UserError(
                f"{flag}{change}: give FIELD=VALUE with a field of the config, such as model.gate.init=even"
            )
        try:
            config.update_from_flattened_dict({field: parsed(text, known[field])})
        except TypeError as error:
            raise UserError(f"{flag}{change}: {error}") from None
