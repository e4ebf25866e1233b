"""A Griffe extension for the reference pages: the paragraphs of docstrings, as Markdown wants them.

Our docstrings give an argument's shape on a line of its own, and figures and signatures as indented lines. Markdown
needs a blank line before either.
"""

import re
from typing import Any

import griffe

SHAPE = re.compile(r"\w+(?:, \w+)*(?: \(|: )")  # `label (B, H, W, 1) ...`, `valid: ...`


class Paragraphs(griffe.Extension):
    """Separates shapes and indented lines from the text before them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = separated(obj.docstring.value)


def separated(docstring: str) -> str:
    """The docstring with a blank line before every shape, and around lines that are indented by four or more."""
    lines, before = [], ""
    for line in docstring.splitlines():
        block, block_before = line.startswith("    "), before.startswith("    ")
        text_before = bool(before) and not before.startswith(" ")
        if (text_before and (block or SHAPE.match(line))) or (block_before and line and not line.startswith(" ")):
            lines.append("")
        lines.append(line)
        before = line
    return "\n".join(lines)
