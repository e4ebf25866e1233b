"""Where XLA's TPU compiler puts a program's arrays in a device's memory, read from the text that it dumps on its way.

`memory_analysis` of a compiled program does not tell: for a TPU its temporaries are more than the block that the
compiler lays out and holds against the memory that there is.
"""

import collections
from collections.abc import Mapping
import dataclasses
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
      arguments: what the program is given.
      outputs: what it gives back, in the place of arguments or not.
      own_outputs: those that do not take the place of arguments.
      temporaries: all else, the gaps included.
    """

    arguments: int
    outputs: int
    own_outputs: int
    temporaries: int

    @property
    def reserved(self) -> int:
        """What the device sets aside for the whole program."""
        return self.arguments + self.own_outputs + self.temporaries


def of_analysis(sizes: Any) -> Layout:
    """The layout as a compiled program's `memory_analysis` tells it."""
    outputs = sizes.output_size_in_bytes
    return Layout(sizes.argument_size_in_bytes, outputs, outputs - sizes.alias_size_in_bytes, sizes.temp_size_in_bytes)


def options(folder: pathlib.Path) -> Mapping[str, Any]:
    """The compiler options that make XLA write one program's layout to a folder, which must have no other's."""
    return {"xla_dump_to": str(folder)}


def is_written(folder: pathlib.Path) -> bool:
    """Whether the layout and the program are there, complete; making machine code of it comes after that."""
    return any(folder.glob(_NEXT))


def read(folder: pathlib.Path) -> tuple[Layout, str]:
    """The layout, and the optimised program as HLO text.

    Where the compiler made several programs, because the first was too large for it, that is the last.
    """

    def last(pattern: str) -> str:
        return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns).read_text()

    return parse(last(_ASSIGNMENT)), last(_PROGRAM)


def parse(assignment: str) -> Layout:
    """The layout in the main memory of the device, of XLA's dump of a buffer assignment."""
    sums: collections.Counter[str] = collections.Counter()
    for line in assignment.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation is None or ", color " in allocation[2]:
            continue
        size, kinds = int(allocation[1]), allocation[2]
        argument, output = ", parameter " in kinds, "maybe-live-out" in kinds
        sums["arguments"] += size * argument
        sums["outputs"] += size * output
        sums["own_outputs"] += size * (output and not argument)
        sums["temporaries"] += size * (not argument and not output)
    return Layout(sums["arguments"], sums["outputs"], sums["own_outputs"], sums["temporaries"])
