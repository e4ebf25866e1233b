"""Meshes over several slices: data spans them, fsdp where it is asked to, tensor never."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import processes, sharding, slices


def described(slice_indices, platform="gpu"):
    """Devices 0, 1, ... of processes of two, in the given slices."""
    return [
        SimpleNamespace(id=i, process_index=i // 2, slice_index=index, platform=platform, device_kind="described")
        for i, index in enumerate(slice_indices)
    ]


def ids(arranged):
    return np.vectorize(lambda device: device.id)(arranged).tolist()


def test_data_spans_the_slices_that_devices_report_and_the_other_axes_stay_within_one():
    devices = described([7, 3, 7, 3, 7, 3, 7, 3])  # slice 3 has the odd ones
    assert slices.of_devices(devices) == [1, 0] * 4
    assert ids(slices.arrange(devices, (2, 2, 2))) == [[[1, 3], [5, 7]], [[0, 2], [4, 6]]]
    assert ids(slices.arrange(devices, (4, 1, 2))) == [[[1, 3]], [[5, 7]], [[0, 2]], [[4, 6]]]


def test_fsdp_spans_as_many_slices_as_it_is_asked_to():
    devices = described([0, 0, 1, 1, 2, 2, 3, 3])
    assert ids(slices.arrange(devices, (2, 4, 1), fsdp_slices=2)) == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    assert ids(slices.arrange(devices, (1, 4, 2), fsdp_slices=4)) == [[[0, 1], [2, 3], [4, 5], [6, 7]]]


def test_a_mesh_may_split_an_axis_of_the_network():
    """Eight of the chips of a 4 x 4 network are no axis of it, nor several whole ones."""
    kind = {"platform": "tpu", "device_kind": "TPU v6 lite", "process_index": 0, "core_on_chip": 0}
    chips = [SimpleNamespace(id=i, coords=(i % 4, i // 4, 0), slice_index=0, **kind) for i in range(16)]
    arranged = slices.arrange(chips, (2, 8, 1))
    assert arranged.shape == (2, 8, 1) and sorted(np.ravel(ids(arranged))) == list(range(16))


def test_a_declared_number_of_slices_groups_consecutive_devices():
    nodes = described([0, 0, 1, 1, 2, 2, 3, 3])
    assert slices.of_devices(nodes[::-1], declared=2) == [1, 1, 1, 1, 0, 0, 0, 0]
    assert slices.of_devices(nodes, declared=1) == [0] * 8  # one network over all nodes
    assert ids(slices.arrange(nodes, (1, 8, 1), declared=1)) == [[[0], [1], [2], [3], [4], [5], [6], [7]]]
    unreported = [SimpleNamespace(id=i, process_index=0, platform="cpu") for i in range(4)]
    assert [slices.of_devices(unreported, declared) for declared in (0, 1, 2)] == [[0] * 4, [0] * 4, [0, 0, 1, 1]]
    assert slices.of_devices(described([1, 0], "tpu"), declared=2) == [1, 0]


@pytest.mark.parametrize(
    ("reported", "shape", "declared", "fsdp_slices", "message"),
    [
        (
            [0, 0, 0, 0, 1, 1, 1, 1],
            (1, 8, 1),
            0,
            1,
            r"^config.mesh \(data=1, fsdp=8, tensor=1\) over 2 slices of 4 devices: data must be a multiple of 2, so "
            r"that the others stay within a slice; or let fsdp span slices: --config.mesh.fsdp_slices=2$",
        ),
        ([0, 0, 0, 1, 1, 1], (3, 1, 2), 0, 1, r"data=3, .* data must be a multiple of 2, .* within a slice$"),
        ([0, 0, 0, 0, 1, 1, 1, 1], (1, 1, 8), 0, 1, r"tensor=8\) over 2 slices .* stay within a slice$"),
        ([0, 0, 0, 0, 1, 1, 1, 1], (8, 1, 1), 0, 2, r"fsdp=1, .*: fsdp must be a multiple of .*fsdp_slices=2$"),
        ([0, 0, 0, 0, 1, 1, 1, 1], (2, 4, 1), 0, 4, r"^config.mesh.fsdp_slices=4 must divide .* slices, 2$"),
        ([0, 0, 0, 0, 1, 1], (6, 1, 1), 0, 1, r"^all slices must have as many devices, .* 2 and another 4$"),
        ([0, 0, 0, 0, 0, 0], (6, 1, 1), 4, 1, r"^config.mesh.slices=4 does not divide 6 devices; 0: as they report$"),
    ],
)
def test_axes_that_do_not_fit_the_slices_are_refused(reported, shape, declared, fsdp_slices, message):
    with pytest.raises(UserError, match=message):
        slices.arrange(described(reported), shape, declared, fsdp_slices)


def test_the_slices_of_tpus_are_not_declared_to_be_others():
    with pytest.raises(UserError, match=r"^config.mesh.slices=1: the number of TPU slices is 2; leave it 0$"):
        slices.of_devices(described([0, 0, 1, 1], "tpu"), declared=1)


@pytest.mark.parametrize(("shape", "fsdp_slices"), [((4, 2, 1), 1), ((2, 4, 1), 2), ((2, 2, 2), 1)])
def test_each_row_is_read_and_counts_once_whichever_slices_it_lies_in(shape, fsdp_slices):
    devices = described([0, 0, 1, 1, 0, 0, 1, 1])
    mesh = SimpleNamespace(devices=slices.arrange(devices, shape, 0, fsdp_slices), axis_names=sharding.AXES)
    rows = [processes.split_rows(processes.owners(mesh), 16, process) for process in range(4)]
    assert sorted(np.concatenate([of.own[of.counted] for of in rows])) == list(range(16))
    shards = mesh.devices.reshape(-1, shape[2])
    for process, of in enumerate(rows):
        expected = [i for i, shard in enumerate(shards) if any(device.process_index == process for device in shard)]
        assert sorted({row * len(shards) // 16 for row in of.own}) == expected


@pytest.mark.multidevice
def test_simulated_slices_hold_the_same_global_batch():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1, "slices": 2, "fsdp_slices": 2}, {})
    one_slice = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1}, {})
    assert ids(mesh.devices) == [[[0], [1], [4], [5]], [[2], [3], [6], [7]]] != ids(one_slice.devices)
    of_data = sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 1, "slices": 2}, {})
    assert of_data == sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1}, {})  # in the order of the devices
    (batch,) = sharding.to_devices([{"row": np.arange(16)}], mesh)
    np.testing.assert_array_equal(jax.device_get(batch["row"]), np.arange(16))
    assert {shard.device.id: shard.data.tolist() for shard in batch["row"].addressable_shards}[4] == [4, 5]
