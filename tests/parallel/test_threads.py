"""Thread pool: ordered results, bounded read-ahead, propagated errors, and cancellation."""

import operator
import os
import time

import pytest

from taskexpert_jax.parallel import threads

AHEAD = 4 * (os.cpu_count() or 1)


def test_results_come_in_order() -> None:
    def work(item: int) -> int:
        time.sleep(item % 3 / 1000)  # later ones are ready first
        return -item

    assert list(threads.in_order(work, range(100))) == [-item for item in range(100)]


def test_items_are_taken_only_as_far_as_the_work_goes() -> None:
    taken = []
    results = threads.in_order(operator.neg, (taken.append(item) or item for item in range(10_000)))
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    assert len(taken) <= AHEAD + 3
    results.close()


def test_after_an_error_or_the_end_of_interest_no_work_begins() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        if item == 3:
            raise ValueError("three")
        return item

    results = threads.in_order(work, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^three$"):
        next(results)
    assert len(begun) <= AHEAD + 4
    begun.clear()
    results = threads.in_order(work, range(1000))
    next(results)
    results.close()
    count = len(begun)
    assert count <= AHEAD + 1
    time.sleep(0.05)
    assert len(begun) == count
