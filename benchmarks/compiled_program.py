"""The training step as XLA's TPU compiler makes it, without a TPU: memory, copies, and where its cycles go.

  python benchmarks/compiled_program.py --size=vit_l16 --benchmark=pascal_context --topology=v5e:2x2 --devices=1

Needs libtpu (requirements-tpu.txt). Of the optimised program's text, loops counted as often as they run:

- memory a device, and whether every array of the state is updated in its own place;
- products whose operands are float32, collectives, and copies and transpositions of more than 1 MiB;
- the compiler's own estimate of the cycles of what it fused, by part. It is an estimate, and leaves out what waits.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

from benchmarks import traced_products
from taskexpert_jax import collectives, memory_layout, topologies

MIB = 2**20
# Cycles a second: the data sheet's bfloat16 rate over what the matrix units of a chip do in a cycle.
CLOCKS = {"v4": 275e12 / (8 * 128**2 * 2), "v5e": 197e12 / (4 * 128**2 * 2), "v6e": 918e12 / (4 * 256**2 * 2)}
FINISHED = "finished.txt"  # only in this text are the estimates of cycles
MOVES = {"copy", "transpose"}
# How the names end of what writes a turn's arrays to those of all turns, and takes them out again.
SCANS = ("dynamic_update_slice", "dynamic_slice", "squeeze", "while")
FREE = {"parameter", "bitcast", "reshape", "tuple", "get-tuple-element"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_l16", help="of configs/defaults.py")
    parser.add_argument("--benchmark", choices=("nyud", "pascal_context"), default="pascal_context")
    parser.add_argument("--batch", type=int, default=0, help="images a step; default: one a device")
    parser.add_argument("--topology", default="v5e:2x2", help="TPUs of taskexpert_jax/topologies.py")
    parser.add_argument("--devices", type=int, default=0, help="how many of it; default: all")
    parser.add_argument("--attention", default="xla", help="config.model.attention")
    parser.add_argument("--remat", action="store_true", help="config.model.remat")
    parser.add_argument("--feature_width", type=int, default=0, help="config.model.feature_width; default: the size's")
    parser.add_argument("--whole", action="store_true", help="compile to the end, and say how long that took")
    parser.add_argument("--unroll", choices=("yes", "no"), default="no", help="config.model.unroll")
    parser.add_argument("--text", type=pathlib.Path, help="write the optimised program there")
    parser.add_argument("--read", type=pathlib.Path, help="such a text, in place of compiling")
    parser.add_argument("--into", type=pathlib.Path, help=argparse.SUPPRESS)  # the compiling process's folder
    return parser.parse_args()


def config_of(args: argparse.Namespace, devices: int) -> Any:
    """The shipped config with the command line's fields."""
    config = traced_products.BENCHMARKS[args.benchmark].get_config(args.size)
    config.batch_size = args.batch or devices
    config.model.attention, config.model.remat, config.model.unroll = args.attention, args.remat, args.unroll
    config.model.feature_width = args.feature_width or config.model.feature_width
    return config


def compile_into(args: argparse.Namespace) -> None:
    """Compiles the step; XLA writes the optimised program to `args.into` on its way."""
    devices = topologies.devices(args.topology)
    devices = devices[: args.devices or len(devices)]
    started = time.monotonic()
    lowered = traced_products.trace_train_step(config_of(args, len(devices)), devices).lower()
    traced = time.monotonic()
    compiled = lowered.compile(compiler_options=dict(memory_layout.options(args.into)))
    print(f"traced and lowered in {traced - started:.1f} s, compiled in {time.monotonic() - traced:.1f} s")
    (args.into / FINISHED).write_text(compiled.as_text())


def optimised(args: argparse.Namespace) -> tuple[memory_layout.Layout, str]:
    """Layout and text of the optimised program, from a process that is ended once it has written them."""
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        command = [sys.executable, __file__, *sys.argv[1:], f"--into={folder}"]
        with subprocess.Popen(command) as compiler:
            while compiler.poll() is None and (args.whole or not memory_layout.is_written(folder)):
                time.sleep(0.2)
            compiler.kill()
        if compiler.returncode > 0:
            sys.exit(compiler.returncode)
        layout, text = memory_layout.read(folder)
        finished = folder / FINISHED
        return layout, finished.read_text() if finished.exists() else text


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that runs, how often, and the operations that it fuses, itself if none."""

    instruction: collectives.Instruction
    times: int
    inside: list[collectives.Instruction]

    @property
    def path(self) -> str:
        """Names of the modules it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.instruction.rest)
        return found[1] if found else ""

    @property
    def part(self) -> str:
        """One of `traced_products.PARTS`, or what the scans keep, or losses, or the optimiser and the rest."""
        if "(TaskExpert)" in self.path:
            if "/while" in self.path and self.path.endswith(SCANS):
                return "kept by the scans for the backward pass"
            return traced_products.part_of(self.path)
        return "losses" if "jvp(" in self.path else "optimiser, the rest"

    @property
    def cycles(self) -> int:
        """By the compiler's estimate, of all its runs; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.instruction.rest)
        return self.times * int(found[1]) if found else 0

    @property
    def moves(self) -> bool:
        """Whether it does nothing but to write an array again, in another order or not."""
        opcodes = {of.opcode for of in self.inside} - FREE
        return bool(opcodes) and opcodes <= MOVES

    @property
    def bytes(self) -> int:
        return self.times * collectives.bytes_of(self.instruction.type)


def aliased(text: str) -> str:
    """How many of the program's results take the place of what it was given."""
    header = text.split("\n", 1)[0]
    return f"{len(re.findall(r'(?:may|must)-alias', header))} results are written in the place of arguments"


def float32_products(found: list[Step]) -> collections.Counter[str]:
    """Part -> products in the program with a float32 operand, by count."""
    counts: collections.Counter[str] = collections.Counter()
    for step in found:
        types = {of.name: of.type for of in step.inside}
        for of in step.inside:
            if of.opcode in ("dot", "convolution"):
                operands = re.findall(r"%([\w.\-]+)", of.rest.split(")")[0])
                if any(types.get(name, "").startswith("f32") for name in operands):
                    counts[step.part] += step.times
    return counts


def report(layout: memory_layout.Layout | None, text: str, devices: int, clock: float) -> str:
    """Everything, for people."""
    found = [Step(*of) for of in collectives.executed(text)]
    lines = [aliased(text)]
    if layout:
        sizes = {"arguments": layout.arguments, "temporaries": layout.temporaries, "reserved": layout.reserved}
        lines.append("MiB a device: " + ", ".join(f"{name} {size / MIB:.0f}" for name, size in sizes.items()))
    for kind, traffic in collectives.count(text, devices).traffic.items():
        lines.append(f"{kind}: {traffic.count} x, {traffic.bytes / MIB:.1f} MiB")
    lines.append(f"products with a float32 operand: {dict(float32_products(found)) or 'none'}")
    moved = [step for step in found if step.moves and collectives.bytes_of(step.instruction.type) >= MIB]
    lines.append(f"copies and transpositions over 1 MiB: {sum(step.bytes for step in moved) / MIB:.0f} MiB in all")
    for step in sorted(moved, key=lambda step: -step.bytes)[:20]:
        kind = step.instruction.type.split("{")[0]
        lines.append(f"  {step.bytes / MIB:8.1f} MiB, {step.times} x {kind} {step.part}: {step.path[-90:]}")
    by_part: collections.Counter[str] = collections.Counter()
    moving: collections.Counter[str] = collections.Counter()
    for step in found:
        by_part[step.part] += step.cycles
        moving[step.part] += step.cycles * step.moves
    if not by_part.total():  # only a program compiled to the end has the estimates
        return "\n".join(lines)
    lines += ["", "| part | million cycles | of them copies | ms |", "|---|---|---|---|"]
    for part, cycles in [*by_part.most_common(), ("all", by_part.total())]:
        copied = moving.total() if part == "all" else moving[part]
        lines.append(f"| {part} | {cycles / 1e6:.2f} | {copied / 1e6:.2f} | {1e3 * cycles / clock:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the report of the command line's program."""
    args = parse()
    if args.into:
        compile_into(args)
        return
    layout, text = (None, args.read.read_text()) if args.read else optimised(args)
    if args.text:
        args.text.write_text(text)
    print(report(layout, text, args.devices or 4, CLOCKS[args.topology.split(":")[0]]))


if __name__ == "__main__":
    main()
