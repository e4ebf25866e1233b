"""What the processes of a run tell each other on the host, and which rows of a global array are a process's own."""

import pickle
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np


class Rows(NamedTuple):
    """The rows of the global batch that lie on a process's devices: those that it reads.

    Attributes:
      own: their places in the global batch, ascending, (n,) int.
      counted: (n,) bool, false where a process of a lower index has the row as well, as when a `tensor` axis spans
        processes. What is added up on the hosts takes the counted rows alone, so that each counts once.
    """

    own: np.ndarray
    counted: np.ndarray


def owners(mesh: Mesh) -> np.ndarray:
    """(parts of the batch, copies of each) int: the process of every device, in the order of the mesh."""
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index("tensor"), -1)
    indices = [device.process_index for device in devices.flat]
    return np.array(indices).reshape(-1, devices.shape[-1])


def split_rows(owners: np.ndarray, batch_size: int, process: int) -> Rows:
    """The rows of one process.

    A mesh follows the network of its devices, so the parts of a process need not be neighbours in the batch.

    Args:
      owners: as of the function of that name; the batch is split into as many parts as it has rows.
      batch_size: the global one, divisible by that.
      process: index of the process.
    """
    rows = np.arange(batch_size).reshape(len(owners), -1)
    has = (owners == process).any(axis=1)
    first = owners.min(axis=1) == process
    return Rows(rows[has].ravel(), np.repeat(first[has], rows.shape[1]))


def batch_rows(mesh: Mesh, batch_size: int) -> Rows:
    """The rows of this process; `batch_size` is the global one."""
    return split_rows(owners(mesh), batch_size, jax.process_index())


def global_size(mesh: Mesh, rows: int) -> int:
    """The global batch size of which this process has so many rows."""
    has = (owners(mesh) == jax.process_index()).any(axis=1)
    return rows * len(has) // int(has.sum())


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
