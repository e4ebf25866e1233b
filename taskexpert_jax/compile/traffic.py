"""Inter-device traffic of one execution of a compiled program, from its optimised HLO text.

A collective in a loop counts once per iteration; all branches of a conditional count. A split collective counts once:
`-start` and `-done`, or several fusions with the same channel, into which XLA's TPU compiler splits a collective to
overlap it with computation.

Traffic between slices, over the data-centre network (DCN), is counted apart. XLA's TPU compiler writes the program of
one slice: its collectives stay within the slice, and exchanges with other slices are `send`s. Other compilers know no
slices: a collective with a group that spans slices counts as a whole.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import NamedTuple

from taskexpert_jax.compile import groups

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # types without their width after the first letter
_ARRAY = re.compile(r"\b(pred|token|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\]")
_BROKEN = re.compile(r"^(  .*)((?:\n(?!  |\}$).*)+)", re.MULTILINE)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$", re.MULTILINE)
_ATTRIBUTES = "calls|to_apply|branch_computations|true_computation|false_computation|condition|body"
_CALLED = re.compile(rf"\b(?:{_ATTRIBUTES})=\{{?([^,}}]*(?:, ?%[^,}}]*)*)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic of one kind of collective in one execution of a program, per device.

    Attributes:
      count: number of executions.
      bytes: size of the operands or the results, whichever is larger (the gathered or the unscattered array).
      sent: bytes that the device sends with ring algorithms: (n - 1) / n of `bytes` for groups of n devices, twice that
        for an all-reduce.
    """

    count: int = 0
    bytes: int = 0
    sent: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.bytes + other.bytes, self.sent + other.sent)

    def times(self, turns: int) -> "Traffic":
        """The traffic of `turns` executions."""
        return Traffic(self.count * turns, self.bytes * turns, self.sent * turns)


class Instruction(NamedTuple):
    """One HLO instruction: its name, result type, opcode, and the rest of the line after the opcode."""

    name: str
    type: str
    opcode: str
    rest: str


Computation = dict[str, Instruction]  # by name, in program order
Computations = dict[str, Computation]


class Counted(NamedTuple):
    """Traffic of a program by kind of collective; only kinds that occur.

    Attributes:
      within: traffic within a slice.
      between: traffic between slices.
      uncounted_loops: number of loops with collectives and unknown trip count; they count as one iteration.
    """

    within: dict[str, Traffic]
    between: dict[str, Traffic]
    uncounted_loops: int


def count(hlo: str, slices: Sequence[int]) -> Counted:
    """Traffic of a program. slices: the slice of each partition of the program, in their order."""
    computations, entry = parse(hlo)
    begun_in = _begun_in(computations)
    uncounted = set()

    @functools.cache
    def of(name: str) -> Mapping[tuple[str, bool], Traffic]:  # by kind, and whether it is between slices
        total: dict[tuple[str, bool], Traffic] = collections.defaultdict(Traffic)
        channels = set()
        for place, instruction in _with_fused(name, computations):
            if kind := _kind(instruction.opcode):
                # XLA's TPU compiler expresses a reduce-scatter as a fusion of an all-reduce and a slice. Such a fusion
                # is a complete collective, and all that were merged from several have channel 1.
                scattered = place.startswith("all-reduce-scatter")
                channel = None if scattered else re.search(r"channel_id=(\d+)", instruction.rest)
                if channel and (channel[1] in channels or begun_in.get(channel[1], name) != name):
                    continue
                channels |= {channel[1]} if channel else set()
                kind = "reduce-scatter" if scattered else kind
                spans, traffic = _traffic(kind, instruction, computations[place], slices)
                total[kind, spans] += traffic
                continue
            if instruction.opcode == "send" and (transfer := groups.between_slices(instruction.rest)):
                total[transfer.kind, True] += _between(transfer, instruction, computations[place])
            turns = turns_of(instruction, computations[place], computations)
            for called in called_by(instruction):
                if turns is None and of(called):
                    uncounted.add((name, instruction.name))
                for key, traffic in of(called).items():
                    total[key] += traffic.times(turns or 1)
        return total

    found = sorted(of(entry).items())
    within, between = ({kind: of_kind for (kind, spans), of_kind in found if spans is side} for side in (False, True))
    return Counted(within, between, len(uncounted))


def parse(hlo: str) -> tuple[Computations, str]:
    """The computations of a program by name, and the name of its entry computation."""
    found: Computations = {}
    entry = ""
    whole = _BROKEN.sub(lambda line: line[0].replace("\n", ""), hlo)  # attributes of a Pallas kernel have line breaks
    for is_entry, name, body in _COMPUTATION.findall(whole):
        found[name] = {fields[0]: Instruction(*fields) for fields in _INSTRUCTION.findall(body)}
        entry = name if is_entry else entry
    return found, entry


def called_by(instruction: Instruction) -> Iterator[str]:
    """The computations that an instruction calls."""
    if instruction.opcode not in ("async-done", "async-update"):  # these repeat the call of their start
        for names in _CALLED.findall(instruction.rest):
            yield from re.findall(r"[\w.\-]+", names)


def turns_of(instruction: Instruction, computation: Computation, computations: Computations) -> int | None:
    """Number of times that an instruction of `computation` executes its callees; None for an unknown trip count.

    XLA annotates some loops with `known_trip_count`. For others it follows from the counter's first value, step and
    limit.
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
    first = _constant(_element(computation[operands_of(instruction)[0]], place, computation), computation) or 0
    added = _element(next(reversed(body.values())), place, body)
    steps = [_constant(body[name], body) for name in operands_of(added)] if added and added.opcode == "add" else []
    step = next((step for step in steps if step), None)
    return None if step is None else max(0, math.ceil((last - first) / step))


def _element(instruction: Instruction, index: int, computation: Computation) -> Instruction | None:
    """The operand of a `tuple` instruction at an index; None for other instructions."""
    return computation[operands_of(instruction)[index]] if instruction.opcode == "tuple" else None


def _constant(instruction: Instruction | None, computation: Computation) -> int | None:
    while instruction and instruction.opcode in ("copy", "bitcast"):
        instruction = computation[operands_of(instruction)[0]]
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
    """Channel -> computation in which a split collective starts; its other parts may be in loops inside it."""
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
    """The instructions of a computation and of its fusions, each with the name of the computation that contains it."""
    for instruction in computations.get(name, {}).values():
        if instruction.opcode == "fusion":
            for fused in called_by(instruction):
                yield from _with_fused(fused, computations)
        else:
            yield name, instruction


def _kind(opcode: str) -> str | None:
    """The kind of collective that this opcode completes (the opcode itself, or its `-done`); None if there is none."""
    kind = opcode.removesuffix("-done").removeprefix("ragged-")
    return kind if kind in KINDS else None


def _traffic(
    kind: str, instruction: Instruction, computation: Computation, slices: Sequence[int]
) -> tuple[bool, Traffic]:
    """True if a collective spans slices, and its traffic."""
    described = instruction
    if instruction.opcode.endswith("-done"):  # the start has the groups
        described = computation[operands_of(instruction)[0]]
    found = groups.of(described.rest, len(slices))
    spans = any(len({slices[device] for device in group}) > 1 for group in found)
    size = bytes_of(instruction.type)
    if kind == "reduce-scatter" and described.opcode.startswith("reduce-scatter"):
        size *= len(found[0])  # its result is one shard
    return spans, Traffic(1, size, _sent(kind, size, len(found[0])))


def _between(transfer: groups.Transfer, send: Instruction, computation: Computation) -> Traffic:
    """Traffic of an exchange between slices, given what the device sends to its host."""
    size = bytes_of(computation[operands_of(send)[0]].type)
    if transfer.kind == "all-gather":
        size *= transfer.slices  # one shard is sent
    return Traffic(1, size, _sent(transfer.kind, size, transfer.slices))


def _sent(kind: str, size: int, group: int) -> int:
    share = 1.0 if kind == "collective-permute" else (group - 1) / group
    return round(size * share * (2 if kind == "all-reduce" else 1))
