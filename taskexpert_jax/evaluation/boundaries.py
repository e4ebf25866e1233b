"""The boundary benchmark beside an evaluation: threads count while the device goes on with the next examples."""

from collections.abc import Callable

from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.parallel import processes
from taskexpert_jax.parallel.threads import OrderedPool
from taskexpert_jax.tasks.metrics.boundary.scores import BoundaryCounts, image_curves


class BoundaryRun:
    """Counts the boundary pixels of examples, and hands out each one's own score in the order of the examples.

    Few examples are held at a time: `add` waits where the threads do not keep up. They run without Python's lock.
    """

    def __init__(self, config: ConfigDict):
        """Starts the threads.

        config: `config.eval.boundary`.
        """
        from taskexpert_jax.tasks.metrics.boundary import (
            counts as boundary,  # SciPy and Numba are needed for nothing else here
        )

        self._count = boundary.image_counts
        self._config = config
        self._pool: OrderedPool[tuple[BoundaryCounts, Callable[[float], None]]] = OrderedPool()
        self._parts = [BoundaryCounts.empty()]

    def add(self, prediction: np.ndarray, label: np.ndarray, scored: Callable[[float], None]) -> None:
        """Takes an example: its probability (h, w) as uint8 and its label (h, w), without padding.

        scored: gets the example's own best F in percent, in a later call of `add` or in `counts`.
        """
        config = self._config
        self._pool.submit(lambda: (self._count(prediction, label, config.max_dist, kind=config.labels), scored))
        if self._pool.full:
            self._finish_one()

    def counts(self) -> BoundaryCounts:
        """Those of all examples of all processes, an image a row, when all are done."""
        while self._pool:
            self._finish_one()
        return BoundaryCounts.join(processes.gather(BoundaryCounts.join(self._parts)))

    def close(self) -> None:
        """Drops what has not begun, and waits for what has."""
        self._pool.close()

    def _finish_one(self) -> None:
        counts, scored = self._pool.take()
        self._parts.append(counts)
        scored(100 * float(image_curves(counts).f.max()))
