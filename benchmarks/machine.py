"""Machine, versions, commit and date of a measurement."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def described(*packages: str) -> dict[str, Any]:
    """The facts for a report in JSON; packages: whose versions matter."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # of other programs, before the measurement
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "commit": subprocess.run(command, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
