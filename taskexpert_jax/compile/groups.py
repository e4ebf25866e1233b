"""Groups of devices that exchange data in a collective, from its HLO attributes."""

import re
from typing import NamedTuple

import numpy as np

_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<axes>[^\]]*)\]"
    r"(?:, ?device_ids=\((?:\[(?P<dims>[\d,]+)\]T\((?P<order>[\d,]+)\)|(?P<ids>[\d,]*))\))? ?\{(?P<over>[^}]*)\}"
)
_SUB_AXIS = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?")

# Between TPU slices the compiler sends from host to host; device identifiers are 100000 * (1 + slice) + device.
_TRANSFER = re.compile(r'_xla_megascale_target="?(\{.*?\})"?,_xla_megascale_transfer_type="([A-Z_]+)"')
_IDENTIFIERS_OF_A_SLICE = 100_000


class Transfer(NamedTuple):
    """Exchange between TPU slices: its kind, named as the collectives are, and the number of slices of a group."""

    kind: str
    slices: int


def of(attributes: str, devices: int) -> list[list[int]]:
    """Groups of partition numbers; pairs for a permute.

    HLO has lists, an iota `[groups,size]<=[shape]T(order)`, or axes of a mesh, which may be parts of one. No list means
    one group of all `devices`.
    """
    if listed := _LISTED.search(attributes):
        found = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1] or "")]
        return found or [list(range(devices))]
    if iota := _IOTA.search(attributes):
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2])).tolist()
    if mesh := _MESH.search(attributes):
        return _of_mesh(mesh)
    return [list(range(devices))]


def between_slices(attributes: str) -> Transfer | None:
    """The exchange that a `send` of a TPU program begins; None if it does not leave the slice."""
    found = _TRANSFER.search(attributes)
    if found is None:
        return None
    target, kind = found.groups()
    return Transfer("collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-"), _slices(target))


def _slices(target: str) -> int:
    """Number of slices of a group in `{1,2}x{0:3}` (slices x devices) or `{{100000,200000},{100001,200001}}`."""
    if product := re.fullmatch(r"\{([\d,:]+)\}x\{[\d,:]+\}", target):
        ranges = [[int(end) for end in part.split(":")] for part in product[1].split(",")]
        return sum(ends[-1] - ends[0] + 1 for ends in ranges)
    first = re.findall(r"\d+", target.split("}")[0])
    return len({int(identifier) // _IDENTIFIERS_OF_A_SLICE for identifier in first})


def _of_mesh(mesh: re.Match[str]) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh["axes"])}
    if mesh["dims"]:
        order = _iota(mesh["dims"], mesh["order"])
    else:
        order = np.array(_numbers(mesh["ids"])) if mesh["ids"] else np.arange(np.prod([*sizes.values()]))
    parts = [
        (name, int(before or 1), int(size or sizes[name])) for name, before, size in _SUB_AXIS.findall(mesh["over"])
    ]
    # Coordinates of each place along the mesh: those of one group agree in all that the group does not run over.
    places = dict(zip(sizes, np.unravel_index(np.arange(order.size), [*sizes.values()]), strict=True))
    keys = np.zeros(order.size, int)
    for name, size in sizes.items():
        place = places[name]
        for of_part, before, width in parts:
            if of_part == name:
                after = size // (before * width)
                place = place - (places[name] // after % width) * after
        keys = keys * size + place
    ids = order.ravel()
    return [ids[keys == key].tolist() for key in np.unique(keys)]


def _iota(shape: str, order: str | None) -> np.ndarray:
    dims = _numbers(shape)
    numbers = np.arange(np.prod(dims)).reshape(dims)
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
