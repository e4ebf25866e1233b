"""Skeleton of all pages: one self-contained HTML file, for light and dark screens, phones and print."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
from typing import Any

from taskexpert_jax.report.markup import Element, element, to_html

_FOLDER = pathlib.Path(__file__).parent  # has the style sheets


def html(
    title: str, header: Sequence[Element], main: Sequence[Element | None], facts: Mapping[str, Any], *, style: str
) -> str:
    """A page as HTML: a header, the sections, and a footer with the versions and all facts as JSON.

    Args:
      title: heading and window title.
      header: content below the heading: facts, warnings, links.
      main: the sections; None is omitted.
      facts: see `results.facts`.
      style: the page's style sheet, a file in this folder, added to base.css.
    """
    sheets = ("base.css", style)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    details = element("details", element("summary", "All facts"), element("pre", json.dumps(facts, indent=2)))
    root = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", "\n".join((_FOLDER / sheet).read_text() for sheet in sheets)),
        ),
        element(
            "body",
            element("header", element("h1", title), *header),
            element("main", *main),
            element("footer", element("p", f"TaskExpert-JAX {facts['version']}; {versions}."), details),
        ),
        lang="en",
    )
    return "<!DOCTYPE html>\n" + to_html(root)


def facts_list(facts: Mapping[str, Any], entries: Mapping[str, str]) -> Element:
    """List for the header: the run and its checkpoint from `results.facts`, then the entries, name -> text."""
    shown = {"run": facts["workdir"], "checkpoint": f"step {facts['step']} ({facts['checkpoint']})", **entries}
    parts = (element("div", element("dt", name), element("dd", text)) for name, text in shown.items())
    return element("dl", *parts, class_="facts")


def date(facts: Mapping[str, Any]) -> str:
    """The date in `results.facts`, formatted as `2026-01-31 12:00:00 UTC`."""
    return facts["date"].replace("T", " ").replace("+00:00", " UTC")


def section(name: str, title: str, *content: Element | None) -> Element:
    """A section with a heading and the anchor `#name`."""
    return element("section", element("h2", title), *content, id=name)


def scrolling(table: Element) -> Element:
    """A table that scrolls sideways on narrow screens."""
    return element("div", table, class_="scroll")


def number(value: float | None, form: str) -> str:
    """The value in a format such as `.2f`; a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else format(value, form)
