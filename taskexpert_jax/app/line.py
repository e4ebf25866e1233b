"""The line in front of the model: one thread owns it, and requests wait in a bounded queue."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
import threading


class Line:
    """Runs one job at a time, in the order of their arrival.

    A job is whatever a request asks of the model; its result goes to that request alone.

    Args:
      places: requests that may be in it at once, from the first byte of an upload to the answer.
    """

    def __init__(self, places: int):
        self._places = threading.BoundedSemaphore(places)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._waiting: dict[str, Future[bytes]] = {}  # by ticket, in the order of arrival

    def enter(self) -> bool:
        """Takes a place, to be given back by `leave`; False if there is none."""
        return self._places.acquire(blocking=False)

    def leave(self) -> None:
        """Gives a place back."""
        self._places.release()

    def submit(self, ticket: str, job: Callable[[], bytes]) -> Future[bytes]:
        """Queues a job; cancelling the future takes it out of the queue, unless it has begun."""
        future = self._worker.submit(job)
        self._waiting[ticket] = future
        future.add_done_callback(lambda _: self._waiting.pop(ticket, None))
        return future

    def ahead(self, ticket: str) -> int | None:
        """Number of jobs before the one of a ticket, the running one included; None if it is not in the queue."""
        tickets = list(self._waiting)
        return tickets.index(ticket) if ticket in tickets else None
