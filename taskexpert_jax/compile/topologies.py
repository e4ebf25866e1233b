"""Accelerator topologies by name, to compile for without the hardware.

A TPU topology needs the package `libtpu` (the extra `tpu`), a GPU one JAX's CUDA plugin (the extra `cuda`).
"""

from collections.abc import Sequence
import dataclasses
import difflib
import importlib.util
import os
import re
from typing import Any, Literal

import jax

from taskexpert_jax.errors import UserError

GIB = 2**30

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_HOSTS = ("1", "2", "4", "8", "16", "32")


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Attributes:
      platform: tpu or cuda.
      gibibytes: nominal memory of a device; slightly less is available to programs.
      teraflops: nominal peak of a device's dense matmuls in bfloat16, in 1e12 FLOP/s.
      shapes: its topologies: chips along the axes of the network, or number of GPUs.
      device_kind: prefix of JAX's `device_kind` for it.
    """

    platform: Literal["tpu", "cuda"]
    gibibytes: int
    teraflops: int
    shapes: tuple[str, ...]
    device_kind: str


ACCELERATORS = {
    "v4": Accelerator("tpu", 32, 275, _CUBES, "TPU v4"),
    "v5e": Accelerator("tpu", 16, 197, _FLAT, "TPU v5 lite"),
    "v5p": Accelerator("tpu", 95, 459, _CUBES, "TPU v5"),
    "v6e": Accelerator("tpu", 32, 918, _FLAT, "TPU v6 lite"),
    "h100": Accelerator("cuda", 80, 989, _HOSTS, "NVIDIA H100"),
    "h200": Accelerator("cuda", 141, 989, _HOSTS, "NVIDIA H200"),
}
NAMES = tuple(f"{name}:{shape}" for name, of in ACCELERATORS.items() for shape in of.shapes)
_SLICES = re.compile(r"([1-9]\d{0,2}) ?x ?(?=[a-z])")  # of "2x v5e:4x4"

_GPUS_PER_HOST = 8

# Description of the absent GPU for XLA, from NVIDIA's data sheets and CUDA's device attributes of Hopper.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""
_BANDWIDTH = {"h100": 3_350_000_000_000, "h200": 4_800_000_000_000}  # bytes per second


def devices(name: str) -> Sequence[Any]:
    """Device descriptions of a topology in `NAMES`, or of several TPU slices, to build a mesh from and compile for.

    Restricts this process to its CPU, so call it before JAX initialises its devices.

    Args:
      name: such as "v5e:4x4", "h100:8", or "2x v5e:4x4" for two slices.

    Raises:
      UserError: an unknown name, or the compiler's package is not installed.
    """
    slices, of_slice = _split(name)
    if of_slice not in NAMES:
        near = difflib.get_close_matches(of_slice, NAMES, n=1)
        hint = f"did you mean {'' if slices == 1 else f'{slices}x '}{near[0]}? " if near else ""
        known = "; ".join(f"{kind}:{', '.join(of.shapes)}" for kind, of in ACCELERATORS.items())
        raise UserError(f'--topology={name}: {hint}known are {known}; several TPU slices: "2x v5e:4x4"')
    kind, shape = of_slice.split(":")
    accelerator = ACCELERATORS[kind]
    if slices > 1 and accelerator.platform != "tpu":
        raise UserError(
            f"--topology={name}: slices are of TPUs; for several nodes give the number of all GPUs, and the nodes by "
            "--config.mesh.slices"
        )
    package = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}[accelerator.platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--topology={name} needs the package {package}, not the hardware: "
            f'pip install "taskexpert-jax[{accelerator.platform}]"'
        )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    if accelerator.platform == "cuda":
        return topologies.get_topology_desc(platform="cuda", topology_name=of_slice, **_gpus(kind, int(shape))).devices
    # By default libtpu queries the cloud's metadata server, and can be loaded by only one process at a time.
    for key, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if shape in _CUBES:
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    return topologies.get_topology_desc(platform="tpu", topology_name=of_slice, **options).devices


def platform_of(name: str | None) -> str | None:
    """tpu or cuda; None for a name that `devices` does not know."""
    of_slice = _split(name or "")[1]
    return ACCELERATORS[of_slice.split(":")[0]].platform if of_slice in NAMES else None


def _split(name: str) -> tuple[int, str]:
    """The number of slices in the name of a topology, and the name of one."""
    found = _SLICES.match(name)
    return (int(found[1]), name[found.end() :]) if found else (1, name)


def _gpus(kind: str, count: int) -> dict[str, str]:
    hosts, each = (count // _GPUS_PER_HOST, _GPUS_PER_HOST) if count > _GPUS_PER_HOST else (1, count)
    accelerator = ACCELERATORS[kind]
    target = _HOPPER.format(
        bandwidth=_BANDWIDTH[kind], memory=accelerator.gibibytes * GIB, kind=accelerator.device_kind
    )
    return {"target_config": target, "topology": f"1x{hosts}x{each}"}


def memory_of(device: Any) -> int | None:
    """Bytes of memory of a device, real or described; None if unknown, as on a CPU."""
    if accelerator := _accelerator(device):
        return accelerator.gibibytes * GIB
    return (device.memory_stats() or {}).get("bytes_limit")


def peak_of(device: Any) -> float | None:
    """Nominal FLOP/s of a device's matmuls in bfloat16; None if unknown."""
    accelerator = _accelerator(device)
    return accelerator.teraflops * 1e12 if accelerator else None


def _accelerator(device: Any) -> Accelerator | None:
    longest_first = sorted(ACCELERATORS.values(), key=lambda of: -len(of.device_kind))
    return next((of for of in longest_first if device.device_kind.startswith(of.device_kind)), None)
