"""The fuzz test's own parts: mutations are those of their seed, and each kind of leak is found."""

import itertools
import os
import pathlib
import re
import signal
import warnings

import numpy as np
import pytest

from taskexpert_jax.errors import UserError
from tests.fuzz import leaks, mutate


def test_mutations_are_those_of_their_seed_and_differ() -> None:
    seed = bytes(range(256)) * 4
    first, second = (list(itertools.islice(mutate.mutations(seed, np.random.default_rng(3)), 200)) for _ in range(2))
    assert first == second
    assert len(set(first)) > 190
    assert len({len(content) for content in first}) > 20  # some are cut short, some are longer


def _odd(path: pathlib.Path) -> None:
    """Goes wrong in a way that the content names."""
    way = path.read_text()
    if way == "two lines":
        raise UserError("two\nlines")
    if way == "warning":
        warnings.warn("of a library", stacklevel=1)
    if way == "exception":
        raise RecursionError("too deep")
    if way == "memory":
        np.ones(300 * 2**20, np.uint8)
    if way == "one line":
        raise UserError("one line")


def _crash(path: pathlib.Path) -> None:
    if path.read_bytes() != b"good":
        os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize(
    ("way", "leak"),
    [
        ("good", None),
        ("one line", None),
        ("two lines", "message of 9 characters"),
        ("warning", "UserWarning"),
        ("exception", "RecursionError, 'too deep'"),
        ("memory", r"takes (2[89]|3[0-2])\d MiB of memory"),  # less or more if other threads free or take some
    ],
)
def test_what_counts_as_a_leak(tmp_path: pathlib.Path, way: str, leak: str | None) -> None:
    (tmp_path / "a").write_text(way)
    found = leaks.leak_of(leaks.Reader(_odd, "a", [b"good"]), tmp_path / "a")
    assert found is leak if leak is None else re.search(leak, found or "")


def test_a_crash_is_reported_with_its_file(tmp_path: pathlib.Path) -> None:
    (line,) = leaks.leaks([leaks.Reader(_crash, "a.txt", [b"good"])], tmp_path)
    assert line == f"ends the process with -11: _crash(a.txt): {tmp_path}/0/a.txt"
    assert (tmp_path / "0" / "a.txt").read_bytes() != b"good"
