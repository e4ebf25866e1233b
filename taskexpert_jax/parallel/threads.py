"""Thread pool over all cores of the host, with ordered results and bounded memory.

Threads are enough, because decoding and compiled loops release the GIL; processes would have to copy arrays.
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
    """One thread per core; results are taken in the order of submission.

    The caller takes a result whenever the pool is `full`, which bounds the memory. `len` is the number of results not
    yet taken.
    """

    def __init__(self) -> None:
        workers = os.cpu_count() or 1
        self._limit = 4 * workers
        self._threads = futures.ThreadPoolExecutor(workers)
        self._submitted: collections.deque[futures.Future[Result]] = collections.deque()

    def __len__(self) -> int:
        return len(self._submitted)

    @property
    def full(self) -> bool:
        return len(self._submitted) > self._limit

    def submit(
        self, work: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
    ) -> None:
        """Schedules a call of `work` on a free thread."""
        self._submitted.append(self._threads.submit(work, *arguments, **options))

    def take(self) -> Result:
        """Waits for the oldest result and returns it, or raises the error of its work."""
        return self._submitted.popleft().result()

    def close(self) -> None:
        """Cancels work that has not started, and waits for the rest."""
        self._threads.shutdown(cancel_futures=True)


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Yields work(item) for each item, in order.

    Items are consumed only a little ahead of the work. Closing the generator, or an error, cancels work that has not
    started.
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
