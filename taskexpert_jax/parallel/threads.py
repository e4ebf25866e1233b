"""Work by all cores of the host, in order, with few results in memory at a time.

Threads do: decoding and compiled loops let other threads run, and processes would have to hand arrays over.
"""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent import futures
import os
from typing import Generic, ParamSpec, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class OrderedPool(Generic[Result]):
    """As many threads as there are cores, whose results are taken in the order in which the work was given.

    Who gives work takes a result whenever the pool is `full`, so that few are held. `len` is the number of results
    that are still to be taken.
    """

    def __init__(self) -> None:
        workers = os.cpu_count() or 1
        self._limit = 4 * workers
        self._threads = futures.ThreadPoolExecutor(workers)
        self._begun: collections.deque[futures.Future[Result]] = collections.deque()

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def full(self) -> bool:
        return len(self._begun) > self._limit

    def submit(
        self, work: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> None:
        """Has a thread call `work`, now or when one is free."""
        self._begun.append(self._threads.submit(work, *arguments, **options))

    def take(self) -> Result:
        """The oldest result, when it is there; raises what its work has raised."""
        return self._begun.popleft().result()

    def close(self) -> None:
        """Drops what has not begun, and waits for what has."""
        self._threads.shutdown(cancel_futures=True)


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """work(item) for each item, in order.

    Items are taken only as far as the work goes. Closing the generator, or an error in it, drops what has not begun.
    """
    pool: OrderedPool[Result] = OrderedPool()
    try:
        for item in items:
            pool.submit(work, item)
            if pool.full:
                yield pool.take()
        while pool:
            yield pool.take()
    finally:
        pool.close()
