"""Work on many examples by all cores, in order, with few of them in memory at a time."""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
import os
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """work(item) for each item, in order, by as many threads as there are cores.

    Threads do: decoding is C code that lets other threads run, and processes would have to hand arrays over. Items are
    taken only as far as the work goes. Closing the generator, or an error in it, drops what has not begun.
    """
    workers = os.cpu_count() or 1
    pool = futures.ThreadPoolExecutor(workers)
    begun: collections.deque[futures.Future[Result]] = collections.deque()
    try:
        for item in items:
            begun.append(pool.submit(work, item))
            if len(begun) > 4 * workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
