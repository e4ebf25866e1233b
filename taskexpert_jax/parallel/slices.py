"""Slices: groups of devices that a fast network joins, a TPU slice (ICI) or a node of GPUs (NVLink).

Between slices is the data-centre network (DCN), which is slower. So `data`, which communicates once a step, spans the
slices; `fsdp` does where it is asked to; `tensor` never does.
"""

import collections
from collections.abc import Iterable, Sequence
import math
from typing import Any

from jax.experimental import mesh_utils
import numpy as np

from taskexpert_jax.errors import UserError


def of_devices(devices: Iterable[Any], declared: int = 0) -> list[int]:
    """Slice of each device, from 0.

    Args:
      devices: real or described.
      declared: `config.mesh.slices`. 0: as the devices report; those that report none, as CPUs, are one slice.
        Otherwise consecutive devices form so many slices.

    Raises:
      UserError: the TPUs lie in another number of slices, or it does not divide the number of devices.
    """
    devices = list(devices)
    reported = [getattr(device, "slice_index", 0) for device in devices]
    names = sorted(set(reported))
    if declared in (0, len(names)):
        return [names.index(name) for name in reported]
    if devices[0].platform == "tpu":
        raise UserError(f"config.mesh.slices={declared}: the number of TPU slices is {len(names)}; leave it 0")
    if len(devices) % declared:
        raise UserError(f"config.mesh.slices={declared} does not divide {len(devices)} devices; 0: as they report")
    in_order = sorted(range(len(devices)), key=lambda i: (devices[i].process_index, devices[i].id))
    return [in_order.index(i) * declared // len(devices) for i in range(len(devices))]


def count(devices: Iterable[Any], declared: int) -> int:
    """Number of slices; see `of_devices`."""
    return len(set(of_devices(devices, declared)))


def arrange(devices: Sequence[Any], shape: Sequence[int], declared: int = 0, fsdp_slices: int = 1) -> np.ndarray:
    """Devices in the shape of a mesh, so that neighbours along its axes are near each other in the network.

    Args:
      devices: as many as the shape has.
      shape: devices along data, fsdp and tensor.
      declared: see `of_devices`.
      fsdp_slices: `config.mesh.fsdp_slices`: the number of slices that fsdp spans.

    Raises:
      UserError: the axes do not fit the slices.
    """
    of_device = of_devices(devices, declared)
    between = _between(shape, of_device, fsdp_slices)
    arranged = mesh_utils.create_hybrid_device_mesh(
        [size // spanned for size, spanned in zip(shape, between, strict=True)],
        between,
        list(map(_InSlice, devices, of_device)),
        allow_split_physical_axes=True,  # where no axes of the network have the sizes of the mesh
    )
    return np.vectorize(lambda placed: placed.device, otypes=[object])(arranged)


def _between(shape: Sequence[int], of_device: Sequence[int], fsdp_slices: int) -> tuple[int, int, int]:
    """Number of slices that each axis spans."""
    sizes = sorted(collections.Counter(of_device).values())
    slices, each = len(sizes), sizes[0]
    if each != sizes[-1]:
        raise UserError(f"all slices must have as many devices, but one has {each} and another {sizes[-1]}")
    if slices % fsdp_slices:
        raise UserError(f"config.mesh.fsdp_slices={fsdp_slices} must divide the number of slices, {slices}")
    data, fsdp, tensor = shape
    asked = f"config.mesh (data={data}, fsdp={fsdp}, tensor={tensor}) over {slices} slices of {each} devices"
    if fsdp % fsdp_slices:
        raise UserError(f"{asked}: fsdp must be a multiple of config.mesh.fsdp_slices={fsdp_slices}")
    copies = slices // fsdp_slices
    if data % copies:
        needed = slices // math.gcd(data, slices)
        hint = "" if fsdp % needed else f"; or let fsdp span slices: --config.mesh.fsdp_slices={needed}"
        raise UserError(f"{asked}: data must be a multiple of {copies}, so that the others stay within a slice{hint}")
    return copies, fsdp_slices, 1


class _InSlice:
    """A device with the index of its slice; the other attributes are the device's."""

    def __init__(self, device: Any, slice_index: int) -> None:
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)
