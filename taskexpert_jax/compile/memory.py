"""Memory that a program needs on each device.

For a TPU it is read from the text that XLA dumps while it compiles: `memory_analysis` of a compiled program counts more
temporaries than the block that the compiler lays out and compares with the device's memory.
"""

import collections
import dataclasses
import math
import pathlib
import re
from typing import Any

_ASSIGNMENT = "*.after_optimizations-buffer-assignment.txt"
_PROGRAM = "*.after_optimizations.txt"
_NEXT = "*.after_optimizations_after_buffer_assignment.txt"  # written once the two above are whole
_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*)")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Bytes on each device.

    Attributes:
      reserved: set aside for the whole program: arguments, results that do not take their place, and temporaries.
      arguments: parameters, optimiser state and batch.
      outputs: results, in the place of arguments or not.
      temporaries: all else, gaps included.
    """

    reserved: int
    arguments: int
    outputs: int
    temporaries: int


def of_analysis(sizes: Any) -> Layout:
    """The layout in a compiled program's `memory_analysis`."""
    arguments, outputs = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
    reserved = arguments + outputs - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    return Layout(reserved, arguments, outputs, sizes.temp_size_in_bytes)


def options(folder: pathlib.Path) -> dict[str, str]:
    """Compiler options that make XLA write a program's layout to an empty folder."""
    return {"xla_dump_to": str(folder)}


def is_written(folder: pathlib.Path) -> bool:
    """True once the layout and the program are complete; XLA makes machine code after that."""
    return any(folder.glob(_NEXT))


def read(folder: pathlib.Path) -> tuple[Layout, str]:
    """The layout, and the optimised program as HLO text: of the last program, where the compiler tried several."""

    def last(pattern: str) -> str:
        return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns).read_text()

    return parse(last(_ASSIGNMENT)), last(_PROGRAM)


def parse(assignment: str) -> Layout:
    """The layout in the device's main memory, from XLA's dump of a buffer assignment."""
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
    """Bytes that a compiler's error asks for, if it is the error of a program that is too large for its device."""
    # XLA's TPU compiler fails either before it has laid out the memory, or after.
    before = re.search(r"total memory required for HLO temporaries \(([\d.]+)([KMGT])\)", error)
    after = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", error)
    found = before or after
    if "RESOURCE_EXHAUSTED" not in error or found is None:
        return None
    return math.ceil(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
