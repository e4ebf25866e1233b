"""The record of a config field, and values that several of them share."""

from typing import Any, NamedTuple

from taskexpert_jax.config.rules import Rule

REQUIRED: Any = None  # no default: the variant or the config file sets the value
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Field(NamedTuple):
    """One field: its default (REQUIRED: none), its rule and its meaning.

    `first` is the field's first default, if that has changed: the value of runs from before the field existed.
    """

    default: Any
    rule: Rule
    meaning: str
    first: Any = None
