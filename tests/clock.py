"""A clock for progress that runs as fast as a test wants."""

import itertools
import types

import pytest

from taskexpert_jax import progress


def each_look_takes(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every look of progress at the clock is as many seconds after the one before."""
    ticks = itertools.count(0.0, seconds)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
