"""Host-side exchange between the processes of a run, and the rows of a global array that belong to each process."""

import pickle
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np


class Rows(NamedTuple):
    """Rows of the global batch that lie on a process's devices, which it therefore reads.

    Attributes:
      own: their indices in the global batch, ascending, (n,) int.
      counted: (n,) bool, False where a process of lower index has the same row (`tensor` axis across processes).
        Host-side sums use the counted rows only, so that each row counts once.
    """

    own: np.ndarray
    counted: np.ndarray


def owners(mesh: Mesh) -> np.ndarray:
    """Process index of every device in mesh order, (batch shards, replicas of each) int."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index("tensor"), -1)
    indices = [device.process_index for device in devices.flat]
    return np.array(indices).reshape(-1, devices.shape[-1])


def split_rows(owners: np.ndarray, batch_size: int, process: int) -> Rows:
    """Rows of one process. They need not be contiguous, because a mesh follows the network of its devices.

    Args:
      owners: see `owners`; the batch is split into as many shards as it has rows.
      batch_size: global batch size, divisible by that number.
      process: process index.
    """
    rows = np.arange(batch_size).reshape(len(owners), -1)
    has = (owners == process).any(axis=1)
    first = owners.min(axis=1) == process
    return Rows(rows[has].ravel(), np.repeat(first[has], rows.shape[1]))


def batch_rows(mesh: Mesh, batch_size: int) -> Rows:
    """Rows of this process; `batch_size` is global."""
    return split_rows(owners(mesh), batch_size, jax.process_index())


def global_size(mesh: Mesh, rows: int) -> int:
    """Global batch size, given the number of rows of this process."""
    has = (owners(mesh) == jax.process_index()).any(axis=1)
    return rows * len(has) // int(has.sum())


def gather(value: Any) -> list[Any]:
    """All-gather of one picklable value per process, in process order; every process must call it.

    Pickled rather than sent as arrays, so that integers beyond JAX's 32 bits stay exact.
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
    """Shards on this process's devices of an array split over its first axis, in order, each once."""
    parts = {shard.index[0].start or 0 if shard.index else 0: shard.data for shard in array.addressable_shards}
    return [parts[start] for start in sorted(parts)]


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows, in the order of the batch that it contributed."""
    return np.concatenate([np.asarray(part) for part in local_shards(array)])


def local_row(array: jax.Array, row: int) -> np.ndarray:
    """One of this process's rows; only the shard that holds it is fetched."""
    for part in local_shards(array):
        if row < len(part):
            return np.asarray(part)[row]
        row -= len(part)
    raise IndexError(row)
