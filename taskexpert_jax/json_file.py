"""JSON: reads what others may have written or damaged, as a value of the expected form or one reason why it is none."""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

from taskexpert_jax.errors import shown

_LONGEST_NAME = 80  # characters of a key in a message
_DEEPEST = 50  # nesting of arrays and objects; what reads the values is recursive


class MalformedError(ValueError):
    """Not JSON, or JSON of another form. The message is a clause of one line: what is wrong, and where."""


@dataclasses.dataclass(frozen=True)
class Each:
    """The form of an object with any keys: the form of all of its values."""

    form: Any


@dataclasses.dataclass(frozen=True)
class Items:
    """The form of an array of any length: the form of all of its items."""

    form: Any


def read(path: pathlib.Path, form: Any = object) -> Any:
    """The content of a file; see `parse`.

    Raises:
      OSError: the file cannot be read.
      MalformedError: as `parse`.
    """
    return parse(path.read_bytes(), form)


def parse(content: bytes, form: Any = object) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    Args:
      content: the text. Not allowed: keys that are given twice, text that is not Unicode, more than 50 levels.
      form: `object` for any value; `str`, `int`, `float` (any finite number), `dict` or None for null; a tuple of
        alternatives; {key: form} for an object with at least these keys; `Each`; [form, form] for an array of two;
        `Items`.

    Raises:
      MalformedError: not JSON, or not of this form.
    """
    if not content.strip():
        raise MalformedError("it is empty")
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise MalformedError(f"it is not text in UTF-8 (byte {error.start})") from None
    except (json.JSONDecodeError, MalformedError) as error:
        raise MalformedError(str(error)) from None
    except RecursionError:
        raise MalformedError("it is nested too deeply") from None
    except ValueError:
        raise MalformedError("it has a number of too many digits") from None
    _check_nesting_and_text(value)
    _check(value, form, "")
    return value


def finite(value: Any) -> Any:
    """Replaces NaN and Inf by None, recursively, because JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise MalformedError(f"the key {shown(key)} is given twice")
        found[key] = value
    return found


def _check_nesting_and_text(value: Any) -> None:
    todo = [(value, 0)]
    while todo:
        inner, depth = todo.pop()
        if depth > _DEEPEST:
            raise MalformedError("it is nested too deeply")
        if isinstance(inner, str) and not inner.isascii():
            try:
                inner.encode()
            except UnicodeEncodeError:
                raise MalformedError(f"{shown(inner)} is not Unicode text") from None
        elif isinstance(inner, dict):
            todo += [(key, depth) for key in inner]
            todo += [(each, depth + 1) for each in inner.values()]
        elif isinstance(inner, list):
            todo += [(each, depth + 1) for each in inner]


def _check(value: Any, form: Any, where: str) -> None:
    """Raises MalformedError if a value is not of a form; where: the value's keys, joined by dots."""
    alternatives = form if type(form) is tuple else (form,)
    if not any(_is_kind(value, each) for each in alternatives):
        words = " or ".join(_words(each) for each in alternatives)
        raise MalformedError(f"{where or 'it'} is {shown(value)}, and must be {words}")
    form = next(each for each in alternatives if _is_kind(value, each))
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(form, Each):
        inner = [(key, each, form.form) for key, each in value.items()]
    elif isinstance(form, dict):
        if missing := next((key for key in form if key not in value), None):
            raise MalformedError(f"{f'{where}.' if where else ''}{missing} is missing")
        inner = [(key, value[key], each) for key, each in form.items()]
    elif isinstance(form, list):
        inner = [(str(index), each, form[index]) for index, each in enumerate(value)]
    elif isinstance(form, Items):
        inner = [(str(index), each, form.form) for index, each in enumerate(value)]
    for key, each, of_each in inner:
        name = key if key and key.isprintable() and len(key) < _LONGEST_NAME else shown(key)
        _check(each, of_each, f"{where}.{name}" if where else name)


def _is_kind(value: Any, form: Any) -> bool:
    """True if a value is of the kind of a form; what is inside of it is not looked at."""
    if form is object:
        return True
    if form is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN
    if form in (int, str):
        return type(value) is form
    if isinstance(form, list):
        return isinstance(value, list) and len(value) == len(form)
    if isinstance(form, Items):
        return isinstance(value, list)
    return value is None if form is None else isinstance(value, dict)


def _words(form: Any) -> str:
    if isinstance(form, list):
        return f"an array of {len(form)} values"
    if isinstance(form, Items):
        return "an array"
    names = {str: "text", int: "a whole number", float: "a finite number", None: "null"}
    return "an object with fields" if isinstance(form, dict | Each) or form is dict else names[form]
