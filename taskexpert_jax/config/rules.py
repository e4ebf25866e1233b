"""Rules for the value of one config field: its type and its range."""

from collections.abc import Callable, Sequence
import math
import re
from typing import Any, NamedTuple

from taskexpert_jax import paths, storage

_MOST = 2**31 - 1  # devices compute with whole numbers of 32 bits
SIZE = 65_536  # of a side of an image or of a part of the model
_LARGEST = 1e30  # and with numbers that have a float32


class Rule(NamedTuple):
    """The allowed values of a field.

    Attributes:
      words: completes the error message after "config.FIELD=VALUE: ".
      allows: predicate; gets values of any type.
    """

    words: str
    allows: Callable[[Any], bool]


def choice(*names: str) -> Rule:
    """One of the given strings."""
    return Rule(f"must be one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def flag() -> Rule:
    """True or False."""
    return Rule("must be True or False", lambda value: isinstance(value, bool))


def whole(low: int, high: int | None = None, *, words: str = "") -> Rule:
    """A whole number from `low` to `high`, inclusive; `high` is at most 2**31 - 1 unless given."""
    limits = f"of {low} or more, below 2**31" if high is None else f"from {low} to {high}"
    most = _MOST if high is None else high
    return Rule(words or f"must be a whole number {limits}", lambda value: type(value) is int and low <= value <= most)


def wholes(count: int | None = None, *, multiple_of: int = 1) -> Rule:
    """`count` whole numbers of 1 or more, or at least one of them, each a multiple of `multiple_of`."""
    of = f", each a multiple of {multiple_of}" if multiple_of > 1 else ""
    words = "whole numbers of 1 or more" if count is None else f"{count} whole numbers"

    def allows(value: Any) -> bool:
        fits = whole(1, SIZE).allows
        counts = _is_sequence(value) and (len(value) >= 1 if count is None else len(value) == count)
        return counts and all(fits(n) and n % multiple_of == 0 for n in value)

    return Rule(f"give {words}{of}, as ({', '.join(['2'] * (count or 3))})", allows)


def odd(low: int, high: int) -> Rule:
    """An odd whole number from `low` to `high`, inclusive."""
    return Rule(
        f"must be an odd whole number from {low} to {high}",
        lambda value: type(value) is int and low <= value <= high and value % 2 == 1,
    )


def number(
    low: float = -_LARGEST,
    high: float = _LARGEST,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    words: str = "",
) -> Rule:
    """A finite number in [low, high] and in (above, below)."""
    left = f"({above:g}" if above > low else f"[{low:g}"
    right = f"{below:g})" if below < high else f"{high:g}]"
    return Rule(
        words or f"must be a number in {left}, {right}",
        lambda value: _is_number(value) and low <= value <= high and above < value < below,
    )


def text(*, empty: bool = False) -> Rule:
    """A string."""
    words = "must be text" if empty else "must be text, and not empty"
    return Rule(words, lambda value: isinstance(value, str) and (empty or value != ""))


def matching(pattern: str, words: str) -> Rule:
    """A string that a regular expression matches as a whole."""
    return Rule(words, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def path(*, empty: bool = False, hub: bool = False) -> Rule:
    """A path that `paths.refusal` accepts; `empty` also allows "", `hub` also an hf:// address."""

    def allows(value: Any) -> bool:
        return isinstance(value, str) and ((empty and value == "") or paths.refusal(value, hub=hub) is None)

    hub_form = f" or {paths.HUB_FORM}" * hub
    return Rule(f"must be the path of a file or folder, {paths.BUCKET_FORM}{hub_form}", allows)


def local_path(*, empty: bool = False) -> Rule:
    """A path on a disk; `empty` also allows ""."""
    of_any_kind = path(empty=empty)
    return Rule(
        "must be the path of a local folder",
        lambda value: of_any_kind.allows(value) and not storage.is_bucket(value),
    )


def names(*, empty: bool = False) -> Rule:
    """A tuple of distinct, non-empty strings; `empty` also allows ()."""

    def allows(value: Any) -> bool:
        if not _is_sequence(value) or not (empty or value):
            return False
        return all(isinstance(name, str) and name.isprintable() and name for name in value) and _all_differ(value)

    return Rule("must be a tuple of names, each once" if empty else "must name at least one, each once", allows)


def size(*, empty: bool = False, words: str = "give a height and a width in pixels, as (height, width)") -> Rule:
    """Height and width in pixels; `empty` also allows ()."""

    def allows(value: Any) -> bool:
        if not _is_sequence(value):
            return False
        return (empty and len(value) == 0) or (
            len(value) == 2 and all(type(side) is int and 1 <= side <= SIZE for side in value)
        )

    return Rule(words, allows)


def numbers(words: str, low: float = -_LARGEST, high: float = _LARGEST, *, count: int | None = None) -> Rule:
    """A tuple of numbers in [low, high]: `count` of them, or at least one."""

    def allows(value: Any) -> bool:
        fits = _is_sequence(value) and (len(value) >= 1 if count is None else len(value) == count)
        return fits and all(_is_number(each) and low <= each <= high for each in value)

    return Rule(words, allows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _all_differ(values: Sequence[Any]) -> bool:
    return len(set(values)) == len(values)
