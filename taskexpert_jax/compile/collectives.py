"""What a compiled program sends between devices, read from its optimised HLO text.

A collective inside a loop is counted once for each turn of the loop: XLA notes the number of turns beside the loop
(`known_trip_count`), or it follows from the counter's start and step and the limit in the loop's condition. Of a
conditional all branches are counted. What runs in pieces is counted once: `-start` and `-done`, or several fusions with
the same channel, among which XLA's TPU compiler divides a collective to hide it behind other work.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # of types whose name does not end in their width
_ARRAY = re.compile(r"\b(pred|token|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\]")
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) )?(?:-> .* )?\{$")
_NAME = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|branch_computations|true_computation|false_computation)=\{?([^,}]*(?:, ?%[^,}]*)*)"
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in one run of a program, as one device sees them.

    Attributes:
      count: how often such a collective runs.
      bytes: of the arrays that they take or make, whichever are larger: what is gathered, or what is scattered.
      sent: bytes that the device sends where the devices of a group stand in a ring: (n - 1) / n of `bytes` for groups
        of n devices, twice that for an all-reduce.
    """

    count: int = 0
    bytes: int = 0
    sent: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)

    def times(self, turns: int) -> "Traffic":
        """That of so many runs."""
        return Traffic(self.count * turns, self.bytes * turns, self.sent * turns)


class Instruction(NamedTuple):
    """One line of a computation: its name, result type, operation, and all that follows the operation's name."""

    name: str
    type: str
    opcode: str
    rest: str


Computations = dict[str, list[Instruction]]


@dataclasses.dataclass(frozen=True)
class Found:
    """Of a program: traffic by kind, only kinds that occur, and the loops whose number of turns is not known.

    Those count as one turn each.
    """

    traffic: dict[str, Traffic]
    uncounted_loops: int


def count(hlo: str, devices: int) -> Found:
    """The collectives of a program for `devices` devices, given its optimised HLO text."""
    computations, entry = _computations(hlo)
    begun_in = _begun_in(computations)
    uncounted = set()

    @functools.cache
    def of(name: str) -> Mapping[str, Traffic]:
        total: dict[str, Traffic] = collections.defaultdict(Traffic)
        channels = set()
        for place, instruction in _with_fused(name, computations):
            if kind := _kind(instruction.opcode):
                # XLA's TPU compiler writes a reduce-scatter as a fusion of an all-reduce and the choice of a shard.
                # Such a fusion is whole, and all that were merged of several have channel 1.
                scattered = place.startswith("all-reduce-scatter")
                channel = None if scattered else re.search(r"channel_id=(\d+)", instruction.rest)
                if channel and (channel[1] in channels or begun_in.get(channel[1], name) != name):
                    continue
                channels |= {channel[1]} if channel else set()
                kind = "reduce-scatter" if scattered else kind
                total[kind] += _traffic(kind, instruction, computations[place], devices)
                continue
            turns = _turns(instruction, computations[place], computations) if instruction.opcode == "while" else 1
            for called in _called(instruction):
                if turns is None and of(called):
                    uncounted.add((name, instruction.name))
                for kind, traffic in of(called).items():
                    total[kind] += traffic.times(turns or 1)
        return total

    traffic = dict(sorted(of(entry).items()))
    return Found(traffic, len(uncounted))


def _begun_in(computations: Computations) -> dict[str, str]:
    """Channel -> the computation in which a collective begins whose pieces may stand in loops inside it."""
    return {
        channel[1]: name
        for name, instructions in computations.items()
        for start in instructions
        if start.opcode == "fusion" and start.name.startswith("async-collective-start")
        for fused in _called(start)
        for _, inside in _with_fused(fused, computations)
        if (channel := re.search(r"channel_id=(\d+)", inside.rest))
    }


def executed(hlo: str) -> Iterator[tuple[Instruction, int, list[Instruction]]]:
    """Every instruction that a program runs: itself, how often, and what it fuses (itself where it fuses nothing).

    Of a conditional those of all branches; loops of unknown length are taken to turn once.
    """
    computations, entry = _computations(hlo)

    def of(name: str, times: int) -> Iterator[tuple[Instruction, int, list[Instruction]]]:
        for instruction in computations.get(name, []):
            called = list(_called(instruction))
            if instruction.opcode == "fusion":
                yield instruction, times, [inside for fused in called for inside in computations[fused]]
                continue
            yield instruction, times, [instruction]
            loop = instruction.opcode == "while"
            turns = _turns(instruction, computations[name], computations) if loop else 1
            for inner in called:
                yield from of(inner, times * (turns or 1))

    yield from of(entry, 1)


def _with_fused(name: str, computations: Computations) -> Iterator[tuple[str, Instruction]]:
    """The instructions of a computation and of its fusions, each with the name of the computation that it stands in."""
    for instruction in computations.get(name, []):
        if instruction.opcode == "fusion":
            for fused in _called(instruction):
                yield from _with_fused(fused, computations)
        else:
            yield name, instruction


def _computations(hlo: str) -> tuple[Computations, str]:
    """Name -> instructions of every computation, and the name of the one that the program begins with."""
    found: Computations = {}
    current, entry = None, ""
    for line in _whole_lines(hlo):
        if line == "}":
            current = None
        elif current is None and line.endswith("{") and (header := _HEADER.match(line)):
            current = found.setdefault(header[1], [])
            if line.startswith("ENTRY"):
                entry = header[1]
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return found, entry


def _whole_lines(hlo: str) -> Iterator[str]:
    """The lines of a program, an instruction in one: the text that comes with a Pallas kernel has line breaks."""
    parts: list[str] = []
    for line in hlo.splitlines():
        broken = parts and parts[0].startswith("  ") and not line.startswith("  ") and line != "}"
        if parts and not broken:
            yield "".join(parts)
            parts = []
        parts.append(line)
    yield "".join(parts)


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if name is None:
        return None
    end = _end_of_type(line, name.end())
    opcode = _OPCODE.match(line, end)
    return Instruction(name[1], line[name.end() : end], opcode[1], line[opcode.end() :]) if opcode else None


def _end_of_type(line: str, start: int) -> int:
    """Where a type ends that begins at `start`: a tuple at its closing parenthesis, an array at the next space."""
    if line[start] != "(":
        end = line.find(" ", start)
        return len(line) if end < 0 else end
    depth = 0
    for index in range(start, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if depth == 0:
            return index + 1
    return len(line)


def _kind(opcode: str) -> str | None:
    """The kind of collective that ends with this operation: the operation itself, or the `-done` of one in pieces."""
    kind = opcode.removesuffix("-done").removeprefix("ragged-")
    return kind if kind in KINDS else None


def _called(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs; the reduction that a collective or a reduce names does no traffic."""
    if instruction.opcode in ("async-done", "async-update"):
        return
    if instruction.opcode == "while":
        yield from _named(instruction, ("condition", "body"))
        return
    for names in _CALLED.findall(instruction.rest):
        yield from re.findall(r"[\w.\-]+", names)


def _turns(loop: Instruction, beside: Sequence[Instruction], computations: Computations) -> int | None:
    """How often a loop runs: as XLA notes it, or from its counter's start, step and limit; None where nothing says."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition, body = (computations.get(name, []) for name in _named(loop, ("condition", "body")))
    tests = [i for i in condition if i.opcode == "compare" and "direction=LT" in i.rest]
    if len(tests) != 1 or len(_operands(tests[0])) != 2:
        return None
    counter, limit = (_find(condition, name) for name in _operands(tests[0]))
    index = re.search(r"index=(\d+)", counter.rest) if counter and counter.opcode == "get-tuple-element" else None
    last = _constant(limit, condition)
    if index is None or last is None:
        return None
    first = _constant(_element(_find(beside, _operands(loop)[0]), int(index[1]), beside), beside) or 0
    result = next((i for i in reversed(body) if i.opcode == "tuple"), None)
    added = _element(result, int(index[1]), body)
    steps = [_constant(_find(body, name), body) for name in _operands(added)] if added and added.opcode == "add" else []
    step = next((step for step in steps if step), None)
    return None if step is None else max(0, math.ceil((last - first) / step))


def _find(instructions: Sequence[Instruction], name: str) -> Instruction | None:
    return next((i for i in instructions if i.name == name), None)


def _element(made: Instruction | None, index: int, beside: Sequence[Instruction]) -> Instruction | None:
    """What a tuple was made of at an index."""
    if made is None or made.opcode != "tuple":
        return None
    return _find(beside, _operands(made)[index])


def _constant(instruction: Instruction | None, beside: Sequence[Instruction]) -> int | None:
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = _find(beside, _operands(instruction)[0])
    value = re.match(r"-?\d+(?=\))", instruction.rest) if instruction and instruction.opcode == "constant" else None
    return int(value[0]) if value else None


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _named(instruction: Instruction, attributes: Sequence[str]) -> list[str]:
    """The computations that an instruction names in these attributes."""
    return [name for key in attributes for name in re.findall(rf"{key}=%?([\w.\-]+)", instruction.rest)]


def _traffic(kind: str, instruction: Instruction, beside: Sequence[Instruction], devices: int) -> Traffic:
    described = instruction
    if instruction.opcode.endswith("-done"):  # the groups stand in the start
        described = _find(beside, _operands(instruction)[0]) or instruction
    group = _group_size(described.rest, devices)
    size = bytes_of(instruction.type)
    if kind == "reduce-scatter" and described.opcode.startswith("reduce-scatter"):
        size *= group  # its result is one shard
    share = 1.0 if kind == "collective-permute" else (group - 1) / group
    return Traffic(1, size, round(size * share * (2 if kind == "all-reduce" else 1)))


def bytes_of(type_text: str) -> int:
    """Bytes of all arrays in an HLO type such as `(f32[8,16]{1,0}, bf16[])`."""
    total = 0
    for dtype, shape in _ARRAY.findall(type_text):
        bits = 8 if dtype.startswith("f8") else _BITS.get(dtype) if dtype in _BITS else int(dtype[1:])
        total += math.prod(int(side) for side in shape.split(",") if side) * (bits or 0)
    return math.ceil(total / 8)


def _group_size(attributes: str, devices: int) -> int:
    """Devices in one group; XLA writes groups as lists, as an iota `[groups,size]<=[...]`, or as axes of a mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    return devices
