"""What the processes of a run tell each other on the host, and which rows of a global array are a process's own."""

import pickle
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of the processes, on every process; all must call it.

    value: anything that can be pickled. Integers stay exact, which they would not as arrays of JAX's 32 bits.
    """
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(own.size)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def local_shards(array: jax.Array) -> list[jax.Array]:
    """The parts of an array split over its first axis that lie on this process's devices, in order, each once."""
    parts = {shard.index[0].start or 0 if shard.index else 0: shard.data for shard in array.addressable_shards}
    return [parts[start] for start in sorted(parts)]


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows, as those of the batch that it gave."""
    return np.concatenate([np.asarray(part) for part in local_shards(array)])


def local_row(array: jax.Array, row: int) -> np.ndarray:
    """One of this process's rows; those of other devices are not fetched."""
    for part in local_shards(array):
        if row < len(part):
            return np.asarray(part)[row]
        row -= len(part)
    raise IndexError(row)
