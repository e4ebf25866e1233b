"""What a compiled training step runs, read from its optimised HLO text.

Products, copies and kernels by the parts of `traced_products.PARTS`, loops counted as often as they run; which kernels
write the state; and which collectives have work beside them. For XLA's TPU and GPU compilers, whose products are
fusions, and calls of cuBLAS and cuDNN.
"""

from collections.abc import Iterator
import dataclasses
import functools
import re

from benchmarks import traced_products
from taskexpert_jax.compile import collectives
from taskexpert_jax.compile.collectives import Instruction

MIB = 2**20
MOVES = {"copy", "transpose"}
SLICES = {"dynamic-slice", "dynamic-update-slice"}
FREE = {"parameter", "bitcast", "reshape", "tuple", "get-tuple-element"}
CONTROL = {"constant", "while", "call", "conditional", "partition-id", "opt-barrier"}
NAMES = {"AllocateBuffer", "ConcatBitcast"}  # of the TPU compiler for places in memory, as calls that do nothing
# How the names end of what writes a turn's arrays to those of all turns, and takes them out again.
SCANS = ("dynamic_update_slice", "dynamic_slice", "squeeze", "while")
SCAN_STARTS = ("._taps/broadcast_in_dim", "._assemble/broadcast_in_dim")  # and of these arrays before the first turn
# How the names begin of a GPU's calls, and what they are.
LIBRARIES = {
    "__cublas": "cuBLAS products",
    "__cudnn$conv": "cuDNN convolutions",
    "__cudnn$fmha": "cuDNN attention",
    "tpu_custom_call": "Pallas kernels",
}
PRODUCTS = {"cuBLAS products", "cuDNN convolutions", "cuDNN attention"}
# What hands on a result; a TPU's copies in two halves bring it from its fast memory.
PASSING = {"get-tuple-element", "bitcast", "copy", "copy-start", "copy-done"}
UNNAMED = "without a name"
CHANNELS_LAST = "b01f_o01i->b01f"


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that runs, how often, and the operations that it fuses, itself if none."""

    instruction: Instruction
    times: int
    inside: list[Instruction]

    @property
    def path(self) -> str:
        """Names of the modules it comes from."""
        return _found(r'op_name="([^"]*)"', self.instruction.rest)

    @property
    def part(self) -> str:
        """One of `traced_products.PARTS`, or what the scans keep, or losses, or the optimiser and the rest.

        What XLA adds on its own often has no name: first values of loops, copies into another layout.
        """
        if not self.path:
            return UNNAMED
        if "(TaskExpert)" in self.path:
            in_loop = "/while" in self.path and self.path.endswith(SCANS)
            if in_loop or self.path.endswith(SCAN_STARTS):
                return "kept by the scans for the backward pass"
            return traced_products.part_of(self.path)
        if "(_resize)" in self.path:
            return "upsampling to image size"
        return "losses" if "jvp(" in self.path else "optimiser, the rest"

    @property
    def cycles(self) -> int:
        """By the TPU compiler's estimate, of all its runs; 0 where it gives none."""
        return self.times * int(_found(r'"estimated_cycles":"(\d+)"', self.instruction.rest) or 0)

    @functools.cached_property
    def opcodes(self) -> set[str]:
        """What it does to arrays; arithmetic of single numbers, such as a loop's counter, is left out."""
        return {of.opcode for of in self.inside if "[]" not in of.type} - FREE - {"constant", "broadcast"}

    @property
    def moves(self) -> bool:
        """Whether it does nothing but to write an array again, in another order or not."""
        return bool(self.opcodes) and self.opcodes <= MOVES and not self.fills

    @property
    def fills(self) -> bool:
        """Whether it writes one value everywhere, and reads no array."""
        made = {of.opcode for of in self.inside}
        return "broadcast" in made and made <= {"broadcast", "constant", "copy", "tuple", "bitcast"}

    @property
    def slices(self) -> bool:
        """Whether it does nothing but to write an array into a larger one, or take it out again."""
        return bool(self.opcodes & SLICES) and self.opcodes <= MOVES | SLICES

    @property
    def kind(self) -> str:
        """What runs, for people; empty where nothing does."""
        opcode = self.instruction.opcode
        if opcode in FREE | CONTROL or opcode.endswith(("-start", "-update", "-done")):
            return ""
        if opcode == "custom-call":
            target = _found(r'custom_call_target="([^"]*)"', self.instruction.rest)
            known = (name for start, name in LIBRARIES.items() if target.startswith(start))
            return "" if target in NAMES else next(known, target)
        triton = '"kind":"__triton' in self.instruction.rest
        if self.opcodes & {"dot", "convolution"}:
            return "Triton products" if triton else "fused products"
        if self.fills:
            return "fills"
        if self.moves:
            return "copies"
        if self.slices:
            return "slices"
        return "other Triton kernels" if triton else "other kernels"


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two arrays.

    kind: `dot` or `convolution`, or the target of a GPU's call. operands, result: HLO types with their layouts.
    labels: a convolution's dimensions.
    """

    step: Step
    kind: str
    operands: tuple[str, ...]
    result: str
    labels: str

    @property
    def float32(self) -> bool:
        """Whether a factor is float32."""
        return any(of.startswith("f32") for of in self.operands)

    @property
    def channels_last(self) -> bool:
        """Whether its arrays are bfloat16, and have the channels of a place beside each other in memory."""
        types = (*self.operands, self.result)
        return self.labels == CHANNELS_LAST and all(re.match(r"bf16\[[\d,]*\]\{3,2,1,0", of) for of in types)


class Program:
    """The steps of a program in their order, and its instructions by name."""

    def __init__(self, text: str) -> None:
        self.header = text.split("\n", 1)[0]
        self.steps = [Step(*of) for of in collectives.executed(text)]
        self.instructions = {of.name: of for step in self.steps for of in (step.instruction, *step.inside)}
        self.step_of = {step.instruction.name: step for step in self.steps}

    @functools.cached_property
    def products(self) -> list[Product]:
        """All products. XLA's GPU compiler makes sums of elementwise products of some small ones: they are missing."""
        return [product for step in self.steps for product in self._products(step)]

    def _products(self, step: Step) -> Iterator[Product]:
        for of in step.inside:
            target = _found(r'custom_call_target="([^"]*)"', of.rest)
            call = of.opcode == "custom-call" and step.kind in PRODUCTS
            if call or of.opcode in ("dot", "convolution"):
                operands = tuple(self._type(name) for name in operands_of(of)[:2])
                result = of.type.removeprefix("(").split(" ")[0]
                yield Product(step, target or of.opcode, operands, result, _found(r"dim_labels=([\w>\-]+)", of.rest))

    def _type(self, name: str) -> str:
        return self.instructions[name].type if name in self.instructions else ""

    @functools.cached_property
    def aliased(self) -> list[int]:
        """The places of the results that are written over what the program was given."""
        return [int(place) for place in re.findall(r"\{(\d+)\}: \(\d+, \{[\d,]*\}, (?:may|must)-alias\)", self.header)]

    @functools.cached_property
    def writers(self) -> list[tuple[Step, bool]]:
        """What computes each such result, and whether a copy brings it from there to its place.

        Of what passes through a loop it is the loop.
        """
        found = []
        results = operands_of(self.steps[-1].instruction)
        for place in self.aliased:
            made, copied = self.instructions[results[place]], False
            while made.opcode in PASSING:
                copied |= made.opcode == "copy"
                made = self.instructions[operands_of(made)[0]]
            found.append((self.step_of[made.name], copied))
        return found

    def bytes(self, step: Step) -> int:
        """Of what a run of a step writes: its result; of an array that it changes in one place, what it puts there."""
        updates = [of for of in step.inside if of.opcode == "dynamic-update-slice"]
        types = [self._type(operands_of(of)[1]) for of in updates] or [step.instruction.type]
        if step.kind in PRODUCTS:
            types = [re.sub(r"\b[su]8\[\d+\]", "", of) for of in types]  # the library's scratch memory
        return sum(map(collectives.bytes_of, types))

    def moved(self, step: Step) -> int:
        """Bytes that a run of a step writes and reads: its result once, and of each operand what it uses, once."""
        if step.instruction.opcode in SLICES:
            return 2 * self.bytes(step)
        names = operands_of(step.instruction)
        return self.bytes(step) + sum(self._used(step, place, name) for place, name in enumerate(names))

    def _used(self, step: Step, place: int, name: str) -> int:
        """Of an operand of a step: all of it, or the slices that it cuts out; nothing of what it writes into."""
        whole = collectives.bytes_of(self._type(name))
        parameters = {of.name for of in step.inside if of.opcode == "parameter" and of.rest.startswith(f"{place})")}
        used = 0
        for of in step.inside:
            operands = operands_of(of)
            if of.opcode == "bitcast" and parameters & set(operands):
                parameters.add(of.name)
            elif of.opcode in ("slice", "dynamic-slice") and operands[0] in parameters:
                used += collectives.bytes_of(of.type)
            elif parameters & set(operands[of.opcode == "dynamic-update-slice" :]):
                return whole
        return min(used, whole) if parameters else whole


@dataclasses.dataclass(frozen=True)
class Sent:
    """A collective: its kind, how often it runs, bytes of what it makes, and what runs between its start and its end.

    beside: "a product", "other kernels" alone, or "nothing": the device waits.
    """

    kind: str
    times: int
    bytes: int
    beside: str


def sent(program: Program) -> list[Sent]:
    """The collectives of a program; one that the TPU compiler divides among several fusions counts once."""
    at = {step.instruction.name: place for place, step in enumerate(program.steps)}
    ends = {
        operands_of(step.instruction)[0]: step.instruction
        for step in program.steps
        if step.instruction.opcode.endswith("-done")
    }
    found: dict[str, list[Sent]] = {}
    started = ""  # an `async-start` whose computation comes next
    for step in program.steps:
        if step.instruction.opcode == "async-start":
            started = step.instruction.name
        elif step.kind and step.instruction.opcode not in collectives.KINDS:
            started = ""
        for of in step.inside:
            kind = of.opcode.removesuffix("-start")
            if kind not in collectives.KINDS:
                continue
            called = _found(r"calls=%?([\w.\-]+)", step.instruction.rest)
            start, started = of.name if of.opcode.endswith("-start") else started, ""
            end, work = ends.get(start), []
            if end:
                work = program.steps[at[start] + 1 : at[end.name]]
            elif called.startswith("async_collective_fusion"):
                work = [step]
            scattered = called.startswith("all-reduce-scatter")
            channel = "" if scattered else _found(r"channel_id=(\d+)", of.rest)
            made = collectives.bytes_of(end.type if end else of.type)
            one = Sent("reduce-scatter" if scattered else kind, step.times, made, _busiest(work))
            found.setdefault(channel or of.name, []).append(one)
    return [_whole(pieces) for pieces in found.values()]


def _busiest(work: list[Step]) -> str:
    kinds = {step.kind for step in work if step.instruction.opcode in ("fusion", "custom-call", "convolution", "dot")}
    if any("products" in kind or "convolutions" in kind or "attention" in kind for kind in kinds):
        return "a product"
    return "other kernels" if kinds - {""} else "nothing"


def _whole(pieces: list[Sent]) -> Sent:
    """A collective of its pieces: some of them run several times for one of it, in a loop of their own."""
    order = ("a product", "other kernels", "nothing")
    beside = min((piece.beside for piece in pieces), key=order.index)
    return dataclasses.replace(min(pieces, key=lambda piece: piece.times), beside=beside)


def operands_of(instruction: Instruction) -> list[str]:
    """The names of what an instruction takes."""
    return re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
