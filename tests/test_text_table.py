"""Text tables."""

import pytest

from taskexpert_jax import text_table

ROWS = [["task", "value"], ["depth", "0.5"], ["", "12.25"]]


def test_columns_are_as_wide_as_their_widest_cell_and_aligned_as_asked() -> None:
    assert text_table.lines(ROWS, "<>") == ["task   value", "depth    0.5", "       12.25"]
    assert text_table.lines(ROWS, "><") == [" task  value", "depth  0.5", "       12.25"]


def test_bold_takes_no_room() -> None:
    bold = "\033[1m0.5\033[0m"
    assert text_table.padded([["value"], [bold]], "<") == [["value"], [f"{bold}  "]]


def test_rows_of_other_lengths_are_refused() -> None:
    for rows, alignment in (([["a", "b"], ["c"]], "<<"), ([["a", "b"]], "<")):
        with pytest.raises(ValueError, match="zip"):
            text_table.lines(rows, alignment)
