"""Kernels of a compiled training step, read from its optimised HLO text: kind, part, bytes, estimated cycles.

Reads text of XLA's TPU and GPU compilers: their matmuls are fusions, or calls of cuBLAS and cuDNN.
"""

from collections.abc import Iterator
import dataclasses
import functools
import re

from benchmarks.program import traced_step
from taskexpert_jax.compile import traffic
from taskexpert_jax.compile.traffic import Instruction, bytes_of, operands_of

MIB = 2**20
MOVES = {"copy", "transpose"}
SLICES = {"dynamic-slice", "dynamic-update-slice"}
FREE = {"parameter", "bitcast", "reshape", "tuple", "get-tuple-element"}
CONTROL = {"constant", "while", "call", "conditional", "partition-id", "opt-barrier"}
NAMES = {"AllocateBuffer", "ConcatBitcast"}  # the TPU compiler's calls that only name memory
# Endings of op names that write one iteration's arrays into those of all iterations, and read them back.
SCANS = ("dynamic_update_slice", "dynamic_slice", "squeeze", "while")
SCAN_STARTS = ("._taps/broadcast_in_dim", "._assemble/broadcast_in_dim")  # initial values of these arrays
# Prefixes of a GPU's custom calls, and their kinds.
LIBRARIES = {
    "__cublas": "cuBLAS products",
    "__cudnn$conv": "cuDNN convolutions",
    "__cudnn$fmha": "cuDNN attention",
    "tpu_custom_call": "Pallas kernels",
}
PRODUCTS = {"cuBLAS products", "cuDNN convolutions", "cuDNN attention"}
UNNAMED = "without a name"


@dataclasses.dataclass(frozen=True)
class Step:
    """An executed instruction, its number of executions, and the operations that it fuses (itself if none)."""

    instruction: Instruction
    times: int
    inside: list[Instruction]

    @property
    def path(self) -> str:
        """Module names of the operation that it comes from."""
        return _found(r'op_name="([^"]*)"', self.instruction.rest)

    @property
    def part(self) -> str:
        """One of `traced_step.PARTS`, residuals of the scans, losses, or the optimiser and the rest.

        Operations that XLA adds often have no name: initial values of loops, copies into another layout.
        """
        if not self.path:
            return UNNAMED
        if "(MultiTaskModel)" in self.path:
            in_loop = "/while" in self.path and self.path.endswith(SCANS)
            if in_loop or self.path.endswith(SCAN_STARTS):
                return "kept by the scans for the backward pass"
            return traced_step.part_of(self.path)
        if "(_resize)" in self.path:
            return "upsampling to image size"
        return "losses" if "jvp(" in self.path else "optimiser, the rest"

    @property
    def cycles(self) -> int:
        """The TPU compiler's estimate over all executions; 0 without one."""
        return self.times * int(_found(r'"estimated_cycles":"(\d+)"', self.instruction.rest) or 0)

    @functools.cached_property
    def opcodes(self) -> set[str]:
        """Opcodes of its array operations, without scalar arithmetic such as a loop's counter."""
        return {of.opcode for of in self.inside if "[]" not in of.type} - FREE - {"constant", "broadcast"}

    @property
    def moves(self) -> bool:
        """True for a kernel that only copies or transposes an array."""
        return bool(self.opcodes) and self.opcodes <= MOVES and not self.fills

    @property
    def fills(self) -> bool:
        """True for a kernel that only fills an array with one value."""
        made = {of.opcode for of in self.inside}
        return "broadcast" in made and made <= {"broadcast", "constant", "copy", "tuple", "bitcast"}

    @property
    def slices(self) -> bool:
        """True for a kernel that only writes an array into a larger one, or reads it back."""
        return bool(self.opcodes & SLICES) and self.opcodes <= MOVES | SLICES

    @property
    def kind(self) -> str:
        """Printed kind of the kernel; empty if nothing runs."""
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


def executed(hlo: str) -> Iterator[Step]:
    """Every instruction that a program executes, with all branches of a conditional."""
    computations, entry = traffic.parse(hlo)

    def of(name: str, times: int) -> Iterator[Step]:
        for instruction in computations.get(name, {}).values():
            called = list(traffic.called_by(instruction))
            if instruction.opcode == "fusion":
                yield Step(instruction, times, [inside for fused in called for inside in computations[fused].values()])
                continue
            yield Step(instruction, times, [instruction])
            turns = traffic.turns_of(instruction, computations[name], computations) if called else 1
            for inner in called:
                yield from of(inner, times * (turns or 1))

    return of(entry, 1)


class Program:
    """A program's steps in order, and its instructions by name."""

    def __init__(self, text: str) -> None:
        self.steps = list(executed(text))
        self.instructions = {of.name: of for step in self.steps for of in (step.instruction, *step.inside)}

    def _type(self, name: str) -> str:
        return self.instructions[name].type if name in self.instructions else ""

    def bytes(self, step: Step) -> int:
        """Bytes that one execution of a step writes; only the updated slice of an array changed in place."""
        updates = [of for of in step.inside if of.opcode == "dynamic-update-slice"]
        types = [self._type(operands_of(of)[1]) for of in updates] or [step.instruction.type]
        if step.kind in PRODUCTS:
            types = [re.sub(r"\b[su]8\[\d+\]", "", of) for of in types]  # the library's scratch memory
        return sum(map(bytes_of, types))

    def moved(self, step: Step) -> int:
        """Bytes that one execution of a step writes and reads: its result and the used part of each operand, once."""
        if step.instruction.opcode in SLICES:
            return 2 * self.bytes(step)
        names = operands_of(step.instruction)
        return self.bytes(step) + sum(self._used(step, place, name) for place, name in enumerate(names))

    def _used(self, step: Step, place: int, name: str) -> int:
        """Bytes read of an operand: all, or the slices taken from it; none of an array that is updated in place."""
        whole = bytes_of(self._type(name))
        parameters = {of.name for of in step.inside if of.opcode == "parameter" and of.rest.startswith(f"{place})")}
        used = 0
        for of in step.inside:
            operands = operands_of(of)
            if of.opcode == "bitcast" and parameters & set(operands):
                parameters.add(of.name)
            elif of.opcode in ("slice", "dynamic-slice") and operands[0] in parameters:
                used += bytes_of(of.type)
            elif parameters & set(operands[of.opcode == "dynamic-update-slice" :]):
                return whole
        return min(used, whole) if parameters else whole


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
