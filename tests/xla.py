"""XLA's flags in the tests and in the programs that they start."""

import os

DEVICES = "--xla_force_host_platform_device_count"
# XLA's former code generator of the CPU: programs compile in less than half the time. With LLVM's optimisation, which
# the tests do without (conftest.py), it would take longer.
FAST = "--xla_cpu_use_fusion_emitters=false"


def flags(devices: int) -> str:
    """The value of XLA_FLAGS for a number of simulated devices."""
    return f"{DEVICES}={devices} {FAST}"


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """This process's environment, with `more`, for a program that has its own number of simulated devices."""
    return {**os.environ, "XLA_FLAGS": flags(devices), **more}
