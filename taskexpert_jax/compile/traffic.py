"""Traffic between devices in one run of a compiled program, read from its optimised HLO text.

A collective inside a loop counts once for each turn of the loop. Of a conditional all branches count. A collective in
pieces counts once: `-start` and `-done`, or several fusions with the same channel, among which XLA's TPU compiler
divides a collective to hide it behind other work.
"""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # of types whose name does not end in their width
_ARRAY = re.compile(r"\b(pred|token|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\]")
_BROKEN = re.compile(r"^(  .*)((?:\n(?!  |\}$).*)+)", re.MULTILINE)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$", re.MULTILINE)
_ATTRIBUTES = "calls|to_apply|branch_computations|true_computation|false_computation|condition|body"
_CALLED = re.compile(rf"\b(?:{_ATTRIBUTES})=\{{?([^,}}]*(?:, ?%[^,}}]*)*)")


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
        """The traffic of that many runs."""
        return Traffic(self.count * turns, self.bytes * turns, self.sent * turns)


class Instruction(NamedTuple):
    """One line of a computation: its name, result type, operation, and all that follows the operation's name."""

    name: str
    type: str
    opcode: str
    rest: str


Computation = dict[str, Instruction]  # by name, in their order
Computations = dict[str, Computation]


def count(hlo: str, devices: int) -> tuple[dict[str, Traffic], int]:
    """Traffic by kind of collective, only kinds that occur, of a program for `devices` devices.

    The second value is the number of loops with collectives whose number of turns is unknown; they count as one turn.
    """
    computations, entry = parse(hlo)
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
            turns = turns_of(instruction, computations[place], computations)
            for called in called_by(instruction):
                if turns is None and of(called):
                    uncounted.add((name, instruction.name))
                for kind, traffic in of(called).items():
                    total[kind] += traffic.times(turns or 1)
        return total

    return dict(sorted(of(entry).items())), len(uncounted)


def parse(hlo: str) -> tuple[Computations, str]:
    """The computations of a program by name, and the name of the one that it begins with."""
    found: Computations = {}
    entry = ""
    whole = _BROKEN.sub(lambda line: line[0].replace("\n", ""), hlo)  # the text of a Pallas kernel has line breaks
    for is_entry, name, body in _COMPUTATION.findall(whole):
        found[name] = {fields[0]: Instruction(*fields) for fields in _INSTRUCTION.findall(body)}
        entry = name if is_entry else entry
    return found, entry


def called_by(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction runs."""
    if instruction.opcode not in ("async-done", "async-update"):  # their start names the same
        for names in _CALLED.findall(instruction.rest):
            yield from re.findall(r"[\w.\-]+", names)


def turns_of(instruction: Instruction, beside: Computation, computations: Computations) -> int | None:
    """How often an instruction of the computation `beside` runs what it calls; None for a loop of unknown length.

    XLA notes the length of some loops (`known_trip_count`). Of others it follows from the counter's first value, its
    step and its limit.
    """
    if instruction.opcode != "while":
        return 1
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest):
        return int(known[1])
    named = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", instruction.rest))
    condition, body = computations[named["condition"]], computations[named["body"]]
    tests = [of for of in condition.values() if of.opcode == "compare" and "direction=LT" in of.rest]
    if len(tests) != 1:
        return None
    counter, limit = (condition[name] for name in operands_of(tests[0]))
    index = re.search(r"index=(\d+)", counter.rest)
    last = _constant(limit, condition)
    if index is None or last is None:
        return None
    place = int(index[1])
    first = _constant(_element(beside[operands_of(instruction)[0]], place, beside), beside) or 0
    added = _element(next(reversed(body.values())), place, body)
    steps = [_constant(body[name], body) for name in operands_of(added)] if added and added.opcode == "add" else []
    step = next((step for step in steps if step), None)
    return None if step is None else max(0, math.ceil((last - first) / step))


def _element(made: Instruction, index: int, beside: Computation) -> Instruction | None:
    """The element of a tuple at an index."""
    return beside[operands_of(made)[index]] if made.opcode == "tuple" else None


def _constant(instruction: Instruction | None, beside: Computation) -> int | None:
    while instruction and instruction.opcode in ("copy", "bitcast"):
        instruction = beside[operands_of(instruction)[0]]
    value = re.match(r"-?\d+(?=\))", instruction.rest) if instruction and instruction.opcode == "constant" else None
    return int(value[0]) if value else None


def operands_of(instruction: Instruction) -> list[str]:
    """The names of an instruction's operands."""
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def bytes_of(type_text: str) -> int:
    """Bytes of all arrays in an HLO type such as `(f32[8,16]{1,0}, bf16[])`."""
    total = 0
    for dtype, shape in _ARRAY.findall(type_text):
        bits = 8 if dtype.startswith("f8") else _BITS.get(dtype) if dtype in _BITS else int(dtype[1:])
        total += math.prod(int(side) for side in shape.split(",") if side) * (bits or 0)
    return math.ceil(total / 8)


def _begun_in(computations: Computations) -> dict[str, str]:
    """Channel -> the computation in which a collective begins whose pieces may stand in loops inside it."""
    return {
        channel[1]: name
        for name, instructions in computations.items()
        for start in instructions.values()
        if start.opcode == "fusion" and start.name.startswith("async-collective-start")
        for fused in called_by(start)
        for _, inside in _with_fused(fused, computations)
        if (channel := re.search(r"channel_id=(\d+)", inside.rest))
    }


def _with_fused(name: str, computations: Computations) -> Iterator[tuple[str, Instruction]]:
    """The instructions of a computation and of its fusions, each with the name of the computation that it stands in."""
    for instruction in computations.get(name, {}).values():
        if instruction.opcode == "fusion":
            for fused in called_by(instruction):
                yield from _with_fused(fused, computations)
        else:
            yield name, instruction


def _kind(opcode: str) -> str | None:
    """The kind of collective that ends with this operation: the operation itself, or the `-done` of one in pieces."""
    kind = opcode.removesuffix("-done").removeprefix("ragged-")
    return kind if kind in KINDS else None


def _traffic(kind: str, instruction: Instruction, beside: Computation, devices: int) -> Traffic:
    described = instruction
    if instruction.opcode.endswith("-done"):  # the groups stand in the start
        described = beside[operands_of(instruction)[0]]
    group = _group_size(described.rest, devices)
    size = bytes_of(instruction.type)
    if kind == "reduce-scatter" and described.opcode.startswith("reduce-scatter"):
        size *= group  # its result is one shard
    share = 1.0 if kind == "collective-permute" else (group - 1) / group
    return Traffic(1, size, round(size * share * (2 if kind == "all-reduce" else 1)))


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
