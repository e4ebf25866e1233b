"""HTML and SVG as trees of elements: texts are escaped and tags closed by the library, not by care."""

from collections.abc import Mapping
import json
from typing import Any
from xml.etree import ElementTree

Element = ElementTree.Element


def element(tag: str, *content: Element | str | None, **attributes: str | float | None) -> Element:
    """An element with its content in order; what is None is left out.

    attributes: `class_` and `for_` lose their underscore, inside of a name it becomes a hyphen (`stroke_width`).
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), value if isinstance(value, str) else f"{value:g}")
    for part in content:
        if isinstance(part, str):
            if len(made):
                made[-1].tail = (made[-1].tail or "") + part
            else:
                made.text = (made.text or "") + part
        elif part is not None:
            made.append(part)
    return made


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def footer(facts: Mapping[str, Any], title: str) -> Element:
    """The end of a page: the versions in `facts`, and all facts as JSON under `title`."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    told = element("details", element("summary", title), element("pre", json.dumps(facts, indent=2)))
    return element("footer", element("p", f"TaskExpert-JAX; {versions}."), told)


def page(root: Element) -> str:
    """The text of an HTML file."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"
