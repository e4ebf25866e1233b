"""Config changes that reduce the memory of a train step."""

from collections.abc import Iterator, Mapping
import math
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from taskexpert_jax.parallel import slices

Changes = Mapping[str, Any]  # config field -> value


def advice(config: ConfigDict, mesh: Mesh) -> tuple[str, ...]:
    """Flags that reduce the memory of a train step, the cheapest first."""
    found = [flags(changes) for changes in _single(config, mesh)]
    if (each := _images_per_device(config, mesh)) > 1:
        found.append(f"a smaller batch or --config.accumulate_steps (now {each} images per device)")
    return tuple(found) or ("a larger --config.mesh.fsdp or .tensor", "a smaller model or smaller images")


def candidates(config: ConfigDict, mesh: Mesh) -> Iterator[Changes]:
    """Changes to try in order: each alone, all together, then all with a growing number of micro-batches."""
    single = _single(config, mesh)
    every = {field: value for changes in single for field, value in changes.items()}
    yield from single
    if len(single) > 1:
        yield every
    each = _images_per_device(config, mesh)
    for n in range(2, each + 1):
        if each % n == 0:
            yield {**every, "accumulate_steps": config.accumulate_steps * n}


def flags(changes: Changes) -> str:
    """Changes as command line flags."""
    return " ".join(f"--config.{field}={value}" for field, value in changes.items())


def _images_per_device(config: ConfigDict, mesh: Mesh) -> int:
    return config.batch_size // config.accumulate_steps // (mesh.shape["data"] * mesh.shape["fsdp"])


def _single(config: ConfigDict, mesh: Mesh) -> list[dict[str, Any]]:
    """Changes that each reduce the memory."""
    found: list[dict[str, Any]] = [] if config.model.remat else [{"model.remat": True}]
    within = mesh.shape["data"] // slices.count(mesh.devices.flat, config.mesh.slices)  # fsdp stays within a slice
    if mesh.shape["fsdp"] == 1 and within > 1:
        shards = math.gcd(within, 8)
        shards = shards if shards > 1 else within
        rest = {} if config.mesh.data == -1 else {"mesh.data": mesh.shape["data"] // shards}
        found.append({**rest, "mesh.fsdp": shards})
    return found
