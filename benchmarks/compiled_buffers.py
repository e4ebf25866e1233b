"""When a compiled program needs the most memory, and which maps of full image size are alive then.

Read from two texts that XLA dumps: where each array lies in memory, and from which to which step it is needed. Both are
written by XLA's TPU and GPU compilers.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import itertools
import math
import pathlib
import re

from benchmarks import compiled_text

_ASSIGNMENT = "*after_optimizations-buffer-assignment.txt"
_RANGES = "*after_optimizations-live-range.txt"
_ALLOCATION = re.compile(r"allocation (\d+): size (\d+)(.*)")
_VALUE = re.compile(r" value: <\d+ ([\w.\-]+)((?:\{[\d,]*\})?)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_RANGE = re.compile(r"    ([\w.\-]+)(\{[\d,]*\}):(\d+)-(\d+)$")
PARTS = ("upsampling to image size", "losses")  # where maps of image size come from


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the memory that is set aside for temporaries: the step that makes it, type, place and lifetime."""

    maker: str
    type: str
    start: int
    end: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is in use at one step of a program: the step's place, bytes, and those of float32 maps of image size.

    maps: the arrays of those, one for each place in memory.
    """

    step: int
    bytes: int
    full_size: int
    maps: tuple[Array, ...]


def read(folder: pathlib.Path) -> tuple[int, list[Array]]:
    """Bytes that are in use from the first step to the last, and the temporary arrays, of the last program there."""

    def last(pattern: str) -> str:
        return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns).read_text()

    return parse(last(_ASSIGNMENT), last(_RANGES))


def parse(assignment: str, ranges: str) -> tuple[int, list[Array]]:
    """The same of the two texts."""
    lives = {found[1] + found[2].replace("{}", ""): found for found in map(_RANGE.match, ranges.splitlines()) if found}
    always, temporary, arrays = 0, False, []
    for line in assignment.splitlines():
        if allocation := _ALLOCATION.match(line):
            other_memory = ", color " in allocation[3] or ", thread-local" in allocation[3]
            temporary = "preallocated-temp" in allocation[3] and not other_memory
            always += 0 if temporary or other_memory else int(allocation[2])
        elif temporary and (value := _VALUE.match(line)):
            name, index, size, offset, kind = value.groups()
            life = lives.get(name + index.replace("{}", ""))
            if life and not kind.startswith("("):
                arrays.append(Array(name, kind, int(offset), int(offset) + int(size), int(life[3]), int(life[4])))
    return always, arrays


def moments(
    always: int, arrays: list[Array], program: compiled_text.Program, pixels: int, channels: int
) -> Iterator[Moment]:
    """What is in use at each step that makes a temporary array.

    pixels: of all images of a device; channels: of all tasks, the most that a map of image size can have.
    """
    full = [of for of in arrays if _is_full_size(of, program, pixels, channels)]
    for step in sorted({of.first for of in arrays}):
        used = _covered([of for of in arrays if of.first <= step <= of.last])
        maps = [of for of in full if of.first <= step <= of.last]
        places = {(of.start, of.end): of for of in maps}
        yield Moment(step, always + used, _covered(maps), tuple(places.values()))


def channels_of(array: Array, pixels: int) -> int:
    """How many channels a map of image size has, whatever the order of its dimensions."""
    return _elements(array) // pixels


def tasks_of(count: int, channels: Mapping[str, int]) -> str:
    """The fewest tasks that have so many channels together: XLA resizes the maps of several in one product."""
    for number in range(1, len(channels) + 1):
        fitting = [names for names in itertools.combinations(channels, number) if _sum(names, channels) == count]
        if fitting:
            return " or ".join(" + ".join(names) for names in fitting)
    return "no sum of tasks"


def _sum(names: tuple[str, ...], channels: Mapping[str, int]) -> int:
    return sum(channels[name] for name in names)


def _is_full_size(array: Array, program: compiled_text.Program, pixels: int, channels: int) -> bool:
    if not array.type.startswith("f32["):
        return False
    whole, rest = divmod(_elements(array), pixels)
    return rest == 0 and 0 < whole <= channels and program.step_of[array.maker].part in PARTS


def _elements(array: Array) -> int:
    dims = re.match(r"\w+\[([\d,]*)\]", array.type)
    return math.prod(int(side) for side in dims[1].split(",") if side) if dims else 0


def _covered(arrays: list[Array]) -> int:
    """Bytes of the places that arrays take, those that several share once."""
    total, reached = 0, 0
    for array in sorted(arrays, key=lambda of: of.start):
        total += max(0, array.end - max(array.start, reached))
        reached = max(reached, array.end)
    return total
