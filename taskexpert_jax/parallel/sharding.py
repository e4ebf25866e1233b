"""Device mesh with named axes, and the sharding rules.

Parameters and activations carry logical axis names; `RULES` maps them to the mesh axes data (data parallel), fsdp
(shards parameters and optimiser state, and the batch) and tensor (shards heads, MLPs and feature maps). The same
program runs on one CPU and on a pod: an axis of size 1 changes nothing. `slices.py` lays the axes over several slices.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import processes, slices

AXES = ("data", "fsdp", "tensor")

RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("feature_in", "fsdp"),
    ("feature_out", "tensor"),
    ("norm", None),
    ("tasks", None),
    ("layers", None),
    ("stages", None),
)


def make_mesh(sizes: Mapping[str, int], batch_sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Device mesh of `config.mesh` over all devices, or over the given ones.

    Args:
      sizes: devices along data, fsdp and tensor; one of them may be -1, for all remaining devices. Optional: `slices`
        and `fsdp_slices`.
      batch_sizes: config field -> global batch size; each must be divisible by data * fsdp.
      devices: None for all devices of the program.

    Raises:
      UserError: the sizes do not multiply to the number of devices, a batch is not divisible, or the axes do not fit
        the slices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = [sizes[axis] for axis in AXES]
    known = math.prod(size for size in shape if size != -1)
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"config.mesh ({asked}): sizes must be positive, and at most one may be -1")
    if count % known or (-1 not in shape and known != count):
        raise UserError(f"config.mesh ({asked}) does not fit {count} devices: its product must be {count}")
    shape = [count // known if size == -1 else size for size in shape]
    split = shape[0] * shape[1]
    for field, size in batch_sizes.items():
        if size % split:
            raise UserError(
                f"config.{field}={size} is not divisible by {split} devices (mesh data={shape[0]} x fsdp={shape[1]}); "
                f"choose a multiple of {split}"
            )
    arranged = slices.arrange(devices, shape, sizes.get("slices", 0), sizes.get("fsdp_slices", 1))
    # Explicit axes, JAX's default, break Linen's logical constraints.
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device_mesh() -> Mesh:
    """Mesh of this process's first device."""
    return make_mesh(dict.fromkeys(AXES, 1), {}, jax.local_devices()[:1])


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Sets the mesh and the rules; a plain `with mesh:` would silently ignore sharding constraints."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the global batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def unbox(boxed: Any) -> Any:
    """Strips the boxes of axis names; unlike Flax's `unbox` it also takes abstract arrays and adds no constraints."""

    def is_box(node: Any) -> bool:
        return isinstance(node, nn.meta.AxisMetadata)

    return jax.tree.map(
        lambda node: node.unbox(apply_constraint=False) if is_box(node) else node, boxed, is_leaf=is_box
    )


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of (abstract) arrays boxed with logical axis names; unnamed leaves are replicated.

    A mesh axis that does not divide its dimension is left out for that array.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

    def place(spec: PartitionSpec, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _fit(spec, leaf.shape, mesh.shape))

    return jax.tree.map(place, specs, unbox(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec))


def constrain(array: jax.Array, *names: str | None) -> jax.Array:
    """The array, laid out over the current mesh as the logical names of its axes say; without a mesh, as it is.

    Where Flax's own constraint would pad a dimension that its mesh axis does not divide, that axis is left out, as for
    parameters: so three heads over two devices are computed by both.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(array.shape, *names)))


def spec(shape: Sequence[int], *names: str | None) -> PartitionSpec:
    """Partition spec that `constrain` uses for an array of this shape on the current mesh."""
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    return _fit(nn.logical_to_mesh_axes(names, RULES) or (), shape, mesh_shape)


def _fit(spec: Iterable[Any], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """The spec, without the mesh axes that do not divide their dimension."""

    def extent(axis: str | tuple[str, ...]) -> int:
        return math.prod(mesh_shape[name] for name in ((axis,) if isinstance(axis, str) else axis))

    axes = tuple(spec)
    padded = axes + (None,) * (len(shape) - len(axes))
    sized = zip(padded, shape, strict=True)
    return PartitionSpec(*(axis if axis and size % extent(axis) == 0 else None for axis, size in sized))


def to_devices(
    batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays from this process's rows of each batch, `ahead` transfers started before they are asked for.

    The rows are those of `processes.batch_rows`. Strings (ids) stay on the host and are left out.
    """
    sharding = batch_sharding(mesh)

    def put_array(local: np.ndarray) -> jax.Array:
        size = processes.global_size(mesh, len(local))
        own = processes.batch_rows(mesh, size).own

        def part(index: Any) -> np.ndarray:  # a slice for each axis of the global array
            rows = index[0]
            first, end = np.searchsorted(own, [rows.start or 0, size if rows.stop is None else rows.stop])
            return local[first:end]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, part)

    def put(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {key: put_array(value) for key, value in batch.items() if value.dtype.kind not in "USO"}

    source = iter(batches)
    queue = collections.deque(put(batch) for batch in itertools.islice(source, ahead))
    while queue:
        yield queue.popleft()
        queue.extend(put(batch) for batch in itertools.islice(source, 1))
