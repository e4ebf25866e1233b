"""docs/paper_vs_code.md and docs/model.md name real fields, all choices are named, and each has a test."""

import pathlib
import re

import pytest

from configs import nyud
from taskexpert_jax.config import flat
from tests.conftest import ROOT

CHOICES = (ROOT / "docs" / "paper_vs_code.md").read_text()
MODEL = (ROOT / "docs" / "model.md").read_text()
# They change speed and memory, no value.
NOT_CHOICES = {"model.attention", "model.remat", "model.unroll"}


def named_fields(text: str) -> set[str]:
    """The `part.field` names in backquotes; `part.name_*` stands for all that begin so."""
    found = re.findall(r"`((?:model|optimizer|augment|loss_weights)\.[\w.*]+)", text)
    fields = dict(flat(nyud.get_config("tiny")))
    named = set()
    for name in found:
        fitting = {field for field in fields if re.fullmatch(name.replace(".", r"\.").replace("*", r"\w+"), field)}
        assert fitting, f"no config field {name}"
        named |= fitting
    return named


@pytest.mark.parametrize("part", ["model", "optimizer", "augment"])
def test_every_field_of_a_choice_has_its_row(part: str) -> None:
    fields = {field for field in dict(flat(nyud.get_config("tiny"))) if field.startswith(f"{part}.")}
    assert sorted(fields - named_fields(CHOICES) - NOT_CHOICES) == []


def test_every_named_field_is_set_by_some_test() -> None:
    tests = "\n".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    untested = []
    for field in sorted(named_fields(CHOICES)):
        name = field.partition(".")[2]
        if field.startswith(("model.", "optimizer.", "augment.")) and not re.search(
            rf"""(["'.]{re.escape(name)}["']|\.{re.escape(name)} =|\b{re.escape(name)}=)""", tests
        ):
            untested.append(field)
    assert untested == []


def test_the_switches_of_the_model_page_are_fields_with_their_defaults() -> None:
    config = nyud.get_config("vit_b16")
    rows = re.findall(r"^\| `([\w.]+)`(?:, `([\w.]+)`)? \| ([^|]*) \|", MODEL, re.MULTILINE)
    assert len(rows) > 10
    for first, second, values in rows:
        for name, value in zip(filter(None, (first, second)), values.split(", "), strict=False):
            assert f"model.{name}" in dict(flat(config)), name
            default = config.model
            for part in name.split("."):
                default = default[part]
            if name != "feature_width":  # by size
                assert str(default) in (value, f"{value}.0"), (name, default, value)
