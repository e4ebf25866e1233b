"""Memory that a program needs on each device.

For TPUs it is read from XLA's dump during compilation, because `memory_analysis` of a compiled program counts more
temporaries than the block that the compiler allocates and compares with the device's memory.
"""

import collections
import dataclasses
import math
import pathlib
import re
from typing import Any

_ASSIGNMENT = "*.after_optimizations-buffer-assignment.txt"
_PROGRAM = "*.after_optimizations.txt"
_NEXT = "*.after_optimizations_after_buffer_assignment.txt"  # written after the two above
_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Memory layout of a program, in bytes on each device.

    Attributes:
      reserved: total allocation: arguments, results that do not alias them, and temporaries.
      arguments: parameters, optimiser state and batch.
      outputs: results, including those that alias arguments.
      temporaries: everything else, fragmentation included.
    """

    reserved: int
    arguments: int
    outputs: int
    temporaries: int


def of_analysis(sizes: Any) -> Layout:
    """The layout from a compiled program's `memory_analysis`."""
    arguments, outputs = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
    reserved = arguments + outputs - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    return Layout(reserved, arguments, outputs, sizes.temp_size_in_bytes)


def options(folder: pathlib.Path) -> dict[str, str]:
    """Compiler options for XLA to dump a program's layout to an empty folder."""
    return {"xla_dump_to": str(folder)}


def is_written(folder: pathlib.Path) -> bool:
    """True once the layout and the program are complete; XLA generates machine code after that."""
    return any(folder.glob(_NEXT))


def read(folder: pathlib.Path) -> tuple[Layout, str]:
    """The layout and the optimised HLO text of the last program that the compiler tried."""

    def last(pattern: str) -> str:
        return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns).read_text()

    return parse(last(_ASSIGNMENT)), last(_PROGRAM)


def parse(assignment: str) -> Layout:
    """Parses XLA's dump of a buffer assignment; counts only the device's main memory."""
    sums: collections.Counter[str] = collections.Counter()
    for line in assignment.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation is None or ", color " in allocation[2]:
            continue
        size, kinds = int(allocation[1]), allocation[2]
        argument, output = ", parameter " in kinds, "maybe-live-out" in kinds
        sums["reserved"] += size
        sums["arguments"] += size * argument
        sums["outputs"] += size * output
        sums["temporaries"] += size * (not argument and not output)
    return Layout(sums["reserved"], sums["arguments"], sums["outputs"], sums["temporaries"])


def needed(error: str) -> int | None:
    """Bytes that a program needs, from the compiler's out-of-memory error; None for other errors."""
    # XLA's TPU compiler fails either before the memory layout or after it.
    before = re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", error)
    after = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", error)
    found = before or after
    if "RESOURCE_EXHAUSTED" not in error or found is None:
        return None
    return math.ceil(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
