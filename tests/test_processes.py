"""Rows of arrays that lie on several devices."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from taskexpert_jax import processes, sharding


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
