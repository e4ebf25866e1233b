"""XLA's flags in the tests and in the programs that they start."""

import os

DEVICES = "--xla_force_host_platform_device_count"
# XLA's former code generator of the CPU: programs compile in half the time, if LLVM optimises little, as in the
# tests by default (conftest.py); otherwise they would take longer.
FAST = "" if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "0" else "--xla_cpu_use_fusion_emitters=false"


def flags(devices: int) -> str:
    """The value of XLA_FLAGS for a number of simulated devices."""
    return f"{DEVICES}={devices} {FAST}".strip()


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """This process's environment, with `more`, for a program that has its own number of simulated devices."""
    return {**os.environ, "XLA_FLAGS": flags(devices), **more}
