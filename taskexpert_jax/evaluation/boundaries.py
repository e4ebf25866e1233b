"""Boundary benchmark during an evaluation, in threads on the host while the device computes the next batches."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from taskexpert_jax.parallel import processes
from taskexpert_jax.parallel.threads import OrderedPool
from taskexpert_jax.tasks.metrics.boundary.scores import BoundaryCounts, image_curves


class BoundaryRun:
    """Counts boundary pixels of examples in a thread pool; reports each example's score in the order of `add`.

    Memory is bounded: `add` blocks while the pool is full. The work runs without Python's global lock.
    """

    def __init__(self, *, max_dist: float, labels: Literal["regions", "lines"]):
        """Starts the threads; arguments: see `config.eval.boundary`."""
        from taskexpert_jax.tasks.metrics.boundary import (
            counts as boundary,  # imported lazily: only the benchmark needs SciPy and Numba
        )

        self._count = boundary.image_counts
        self._max_dist = max_dist
        self._labels: Literal["regions", "lines"] = labels
        self._pool: OrderedPool[tuple[BoundaryCounts, Callable[[float], None]]] = OrderedPool()
        self._parts = [BoundaryCounts.empty()]

    def add(self, prediction: np.ndarray, label: np.ndarray, scored: Callable[[float], None]) -> None:
        """Adds an example.

        Args:
          prediction: (h, w) uint8, the probability in 8 bits (`quantise`), without padding.
          label: (h, w) integers, without padding.
          scored: called with the example's best F in percent during a later call of `add` or `counts`.
        """
        self._pool.submit(lambda: (self._count(prediction, label, self._max_dist, kind=self._labels), scored))
        if self._pool.full:
            self._finish_one()

    def counts(self) -> BoundaryCounts:
        """Waits for the pool; returns the counts of all examples of all processes, one row per image."""
        while self._pool:
            self._finish_one()
        return BoundaryCounts.join(processes.gather(BoundaryCounts.join(self._parts)))

    def close(self) -> None:
        """Cancels pending examples and waits for running ones."""
        self._pool.close()

    def _finish_one(self) -> None:
        counts, scored = self._pool.take()
        self._parts.append(counts)
        scored(100 * float(image_curves(counts).f.max()))
