"""HTML and SVG as element trees, so that the library escapes text and closes tags."""

from xml.etree import ElementTree

Element = ElementTree.Element


def element(tag: str, *content: Element | str | None, **attributes: str | float | None) -> Element:
    """An element with its content in order; content and attributes that are None are omitted.

    attributes: a trailing underscore is removed (`class_`, `for_`), others become hyphens (`stroke_width`).
    """
    built = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            built.set(name.rstrip("_").replace("_", "-"), value if isinstance(value, str) else f"{value:g}")
    for part in content:
        if isinstance(part, str):
            if len(built):
                built[-1].tail = (built[-1].tail or "") + part
            else:
                built.text = (built.text or "") + part
        elif part is not None:
            built.append(part)
    return built


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def to_html(root: Element) -> str:
    """Serialises an element as HTML."""
    return ElementTree.tostring(root, encoding="unicode", method="html") + "\n"
