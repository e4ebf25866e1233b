"""Rows of arrays that lie on several devices."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from taskexpert_jax.parallel import processes, sharding


def test_one_process_gathers_its_own_value():
    assert processes.gather({"count": 2**60}) == [{"count": 2**60}]


@pytest.mark.multidevice
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_rows_come_back_in_order_and_once_from_any_mesh(sizes):
    """With a tensor axis, the same rows lie on several devices."""
    rows = np.arange(16 * 3).reshape(16, 3)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), {})
    array = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    np.testing.assert_array_equal(processes.local_rows(array), rows)
    with sharding.use(mesh):
        for row in (0, 5, 15):
            np.testing.assert_array_equal(processes.local_row(array, row), rows[row])
        with pytest.raises(IndexError):
            processes.local_row(array, 16)


@pytest.mark.parametrize(
    ("owners", "own", "counted"),
    [
        ([[0, 0], [0, 0], [1, 1], [1, 1]], ([0, 1, 2, 3], [4, 5, 6, 7]), ([1, 1, 1, 1], [1, 1, 1, 1])),
        ([[0], [1], [0], [1]], ([0, 1, 4, 5], [2, 3, 6, 7]), ([1, 1, 1, 1], [1, 1, 1, 1])),  # a mesh along the network
        ([[0, 1]], (range(8), range(8)), ([1] * 8, [0] * 8)),  # a tensor axis over both
        ([[0, 0], [0, 1], [1, 1], [1, 1]], ([0, 1, 2, 3], [2, 3, 4, 5, 6, 7]), ([1, 1, 1, 1], [0, 0, 1, 1, 1, 1])),
    ],
)
def test_a_process_has_the_rows_of_its_devices_and_each_row_counts_once(owners, own, counted):
    for process in range(2):
        rows = processes.split_rows(np.array(owners), 8, process)
        assert rows.own.tolist() == list(own[process])
        assert rows.counted.tolist() == counted[process]


@pytest.mark.multidevice
def test_one_process_has_all_rows_of_any_mesh():
    for sizes in [(8, 1, 1), (2, 2, 2), (1, 1, 8)]:
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), {})
        rows = processes.batch_rows(mesh, 16)
        assert rows.own.tolist() == list(range(16)) and rows.counted.all()
        assert processes.global_size(mesh, 16) == 16
        (batch,) = sharding.to_devices([{"row": np.arange(16), "id": np.array(["a"] * 16)}], mesh)
        assert batch.keys() == {"row"}
        np.testing.assert_array_equal(batch["row"], np.arange(16))
