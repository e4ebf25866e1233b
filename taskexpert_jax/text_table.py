"""Text tables for a terminal, with columns as wide as their widest cell."""

from collections.abc import Sequence
import re

from taskexpert_jax import terminal

_STYLE = re.compile(r"\033\[\d*m")  # ANSI codes such as bold, which have no width


def padded(rows: Sequence[Sequence[str]], alignment: str) -> list[list[str]]:
    """Pads the cells of each row with spaces to the width of their column; control characters in them are escaped.

    alignment: one character per column, `<` left or `>` right.
    """
    rows = [[terminal.one_line(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    sides = list(zip(widths, alignment, strict=True))
    return [[_pad(cell, *side) for cell, side in zip(row, sides, strict=True)] for row in rows]


def lines(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Formats rows as lines with two spaces between columns; alignment: see `padded`."""
    return ["  ".join(row).rstrip() for row in padded(rows, alignment)]


def _pad(cell: str, width: int, side: str) -> str:
    space = " " * (width - _width(cell))
    return space + cell if side == ">" else cell + space


def _width(cell: str) -> int:
    return len(_STYLE.sub("", cell))
