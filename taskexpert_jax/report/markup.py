"""HTML and SVG as trees of elements: texts are escaped and tags closed by the library, not by care."""

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


def to_html(root: Element) -> str:
    """The text of an element, as HTML."""
    return ElementTree.tostring(root, encoding="unicode", method="html") + "\n"
