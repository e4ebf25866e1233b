"""The training step as XLA makes it for a TPU or an H100 or H200, without having one: memory, products, copies.

  python benchmarks/compiled_program.py --size=vit_l16 --benchmark=pascal_context --topology=v5e:2x2 --devices=1
  python benchmarks/compiled_program.py --size=vit_l16 --benchmark=pascal_context --topology=h200:1 --batch=8

Needs libtpu (requirements-tpu.txt), or JAX's CUDA plugin (requirements-cuda.txt). Of the optimised program's text
(`compiled_text`), loops counted as often as they run:

- memory a device, which maps of image size it holds at its peak, and whether the state is updated in its own place;
- products whose operands are float32, and of a GPU's convolutions which are bfloat16 with their channels last;
- copies and transpositions of more than 1 MiB, and what the loops keep for the backward pass;
- what runs, by part; what updates the state; collectives, and whether there is work beside them;
- of GPUs what the kernels read and write, each operand and result once;
- of TPUs the compiler's own estimate of the cycles of what it fused. It is an estimate, and leaves out what waits.

XLA's GPU compiler cannot time kernels without a GPU: there the algorithms of cuBLAS and cuDNN are not chosen, and
products that it might give to Triton are all given to cuBLAS.
"""

import argparse
import collections
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

import jax

from benchmarks import compiled_buffers, compiled_text, traced_products
from benchmarks.compiled_text import MIB, Program, Step
from taskexpert_jax import tasks
from taskexpert_jax.compile import collectives, memory_layout, topologies

# Cycles a second: the data sheet's bfloat16 rate over what the matrix units of a chip do in a cycle.
CLOCKS = {"v4": 275e12 / (8 * 128**2 * 2), "v5e": 197e12 / (4 * 128**2 * 2), "v6e": 918e12 / (4 * 256**2 * 2)}
FINISHED = "finished.txt"  # only in this text are the TPU compiler's estimates of cycles
SIZES = "sizes.json"  # the layout as the GPU compiler's analysis has it
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}  # it would be timed
LONGEST = 20  # rows of a list


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_l16", help="of configs/defaults.py")
    parser.add_argument("--benchmark", choices=tuple(traced_products.BENCHMARKS), default="pascal_context")
    parser.add_argument("--batch", type=int, default=0, help="images a step; default: one a device")
    parser.add_argument("--topology", default="v5e:2x2", help="of taskexpert_jax/compile/topologies.py")
    parser.add_argument("--devices", type=int, default=0, help="how many of it; default: all")
    parser.add_argument("--fsdp", type=int, default=1, help="config.mesh.fsdp")
    parser.add_argument("--attention", default="auto", help="config.model.attention")
    parser.add_argument("--remat", action="store_true", help="config.model.remat")
    parser.add_argument("--feature_width", type=int, default=0, help="config.model.feature_width; default: the size's")
    parser.add_argument("--whole", action="store_true", help="compile to the end, as is always done for GPUs")
    parser.add_argument("--unroll", choices=("yes", "no"), default="no", help="config.model.unroll")
    parser.add_argument("--text", type=pathlib.Path, help="write the optimised program there")
    parser.add_argument("--read", type=pathlib.Path, help="such a text, in place of compiling")
    parser.add_argument("--into", type=pathlib.Path, help=argparse.SUPPRESS)  # the compiling process's folder
    return parser.parse_args()


def devices_of(args: argparse.Namespace) -> int:
    """How many devices the command line asks for."""
    return args.devices or math.prod(int(side) for side in args.topology.split(":")[1].split("x"))


def config_of(args: argparse.Namespace) -> Any:
    """The shipped config with the command line's fields."""
    config = traced_products.BENCHMARKS[args.benchmark].get_config(args.size)
    config.batch_size, config.mesh.fsdp = args.batch or devices_of(args), args.fsdp
    config.model.attention, config.model.remat, config.model.unroll = args.attention, args.remat, args.unroll
    config.model.feature_width = args.feature_width or config.model.feature_width
    return config


def compile_into(args: argparse.Namespace) -> None:
    """Compiles the step; XLA writes the optimised program to `args.into` on its way."""
    jax.config.update("jax_enable_compilation_cache", False)  # a kept program leaves no notes
    gpu = topologies.platform_of(args.topology) == "cuda"
    devices = topologies.devices(args.topology)[: devices_of(args)]
    started = time.monotonic()
    lowered = traced_products.trace_train_step(config_of(args), devices).lower()
    traced = time.monotonic()
    options = {**memory_layout.options(args.into), **(GPU_OPTIONS if gpu else {})}
    compiled = lowered.compile(compiler_options=options)
    print(f"traced and lowered in {traced - started:.1f} s, compiled in {time.monotonic() - traced:.1f} s")
    layout = memory_layout.of_analysis(compiled.memory_analysis())
    (args.into / SIZES).write_text(json.dumps(vars(layout)))
    (args.into / FINISHED).write_text(compiled.as_text())


def optimised(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The optimised program's text and lines on its memory; of TPUs from a process that is ended once it wrote them."""
    gpu = topologies.platform_of(args.topology) == "cuda"
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        command = [sys.executable, __file__, *sys.argv[1:], f"--into={folder}"]
        with subprocess.Popen(command) as compiler:
            while compiler.poll() is None and (gpu or args.whole or not memory_layout.is_written(folder)):
                time.sleep(0.2)
            compiler.kill()
        if compiler.returncode > 0:
            sys.exit(compiler.returncode)
        if gpu:
            layout = memory_layout.Layout(**json.loads((folder / SIZES).read_text()))
            text = (folder / FINISHED).read_text()
        else:
            layout, text = memory_layout.read(folder)
        lines = [*memory_lines(layout), *peak_lines(args, folder, Program(text))]
        finished = folder / FINISHED
        return finished.read_text() if finished.exists() else text, lines


def memory_lines(layout: memory_layout.Layout) -> list[str]:
    """The sizes that `--mode=compile` reports."""
    sizes = {"arguments": layout.arguments, "temporaries": layout.temporaries, "reserved": layout.reserved}
    return ["MiB a device: " + ", ".join(f"{name} {size / MIB:.0f}" for name, size in sizes.items())]


def peak_lines(args: argparse.Namespace, folder: pathlib.Path, program: Program) -> list[str]:
    """How much is in use at the peak, and the float32 maps of image size in the device's memory then."""
    config = config_of(args)
    channels = {task.name: task.channels for task in tasks.from_config(config)}
    pixels = config.batch_size // devices_of(args) * math.prod(config.dataset.image_size)
    always, arrays = compiled_buffers.read(folder)
    moments = list(compiled_buffers.moments(always, arrays, program, pixels, sum(channels.values())))
    peak, most = (max(moments, key=key) for key in (lambda of: of.bytes, lambda of: of.full_size))
    lines = [
        f"{peak.bytes / MIB:.0f} MiB are in use at the peak, {peak.full_size / MIB:.0f} of them float32 maps of image "
        f"size; the most of those at once are {most.full_size / MIB:.0f} MiB, with {most.bytes / MIB:.0f} in use"
    ]
    for array in sorted(peak.maps, key=lambda of: of.start - of.end):
        count = compiled_buffers.channels_of(array, pixels)
        of = compiled_buffers.tasks_of(count, channels) if count > 1 else "one value a pixel"
        path = program.step_of[array.maker].path
        lines.append(f"  {(array.end - array.start) / MIB:8.1f} MiB, {count} channels ({of}): {path[-70:]}")
    return lines


def donation_lines(program: Program) -> list[str]:
    """How many arrays of the state are updated in their own place, and by how many kernels."""
    arrays = collections.Counter(step.kind or step.instruction.opcode for step, _ in program.writers)
    steps = {step.instruction.name: step for step, _ in program.writers}
    kernels = collections.Counter(step.kind or step.instruction.opcode for step in steps.values())
    copied = sum(copied for _, copied in program.writers)
    return [
        f"{len(program.aliased)} results are written in the place of arguments, {copied} of them by a copy",
        *(
            f"  {count} are {'what they were' if kind == 'parameter' else f'computed by {kernels[kind]} {kind}'}"
            for kind, count in arrays.most_common()
        ),
    ]


def product_lines(program: Program) -> list[str]:
    """Products with a float32 factor, and the convolutions of a GPU, by their layout."""
    counts = collections.Counter[str]()
    convolutions = [product for product in program.products if product.kind.startswith("__cudnn$conv")]
    for product in program.products:
        counts[product.step.part] += product.step.times * product.float32
    lines = [f"products with a float32 operand: {dict(+counts) or 'none'}"]
    if convolutions:
        count = sum(product.step.times for product in convolutions)
        last = sum(product.step.times for product in convolutions if product.channels_last)
        lines.append(f"cuDNN convolutions: {count}, of them bfloat16 with channels last: {last}")
    return lines


def move_lines(program: Program) -> list[str]:
    """Copies and transpositions over 1 MiB, what loops keep, and what is only written as zeros."""
    large = [step for step in program.steps if step.kind and program.bytes(step) >= MIB]
    moved = [step for step in large if step.moves]
    turned = [step for step in large if "transpose" in step.opcodes and not step.moves]
    sums = {
        "slices written to the arrays of a loop's turns, or taken out of them": [step for step in large if step.slices],
        "arrays filled with one value": [step for step in large if step.fills],
    }
    return [
        *list_of(program, "copies and transpositions over 1 MiB", moved),
        *list_of(program, "kernels over 1 MiB that transpose beside other work", turned),
        *(f"{title}: {total(program, steps) / MIB:.0f} MiB" for title, steps in sums.items()),
    ]


def total(program: Program, steps: list[Step]) -> int:
    """Bytes that steps write in all their runs."""
    return sum(step.times * program.bytes(step) for step in steps)


def list_of(program: Program, title: str, steps: list[Step]) -> list[str]:
    """Steps by what they write, the largest first."""
    lines = [f"{title}: {total(program, steps) / MIB:.0f} MiB in all"]
    for step in sorted(steps, key=lambda step: -total(program, [step]))[:LONGEST]:
        kind = step.instruction.type.split("{")[0]
        size = total(program, [step]) / MIB
        lines.append(f"  {size:8.1f} MiB, {step.times} x {kind} {step.part}: {step.path[-90:]}")
    return lines


def kernel_lines(program: Program) -> list[str]:
    """Markdown: a GPU's kernels, by part and kind."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for step in program.steps:
        counts[step.part, step.kind] += step.times * bool(step.kind)
    kinds = sorted({kind for _, kind in +counts})
    parts = dict.fromkeys(part for part, _ in +counts)
    lines = ["", f"| part | {' | '.join(kinds)} | all |", "|---" * (2 + len(kinds)) + "|"]
    for part in parts:
        row = [counts[part, kind] for kind in kinds]
        lines.append(f"| {part} | {' | '.join(str(count or '') for count in row)} | {sum(row)} |")
    row = [sum(counts[part, kind] for part in parts) for kind in kinds]
    return [*lines, f"| all | {' | '.join(map(str, row))} | {sum(row)} |"]


def traffic_lines(program: Program) -> list[str]:
    """Markdown: what a GPU's kernels read and write, by part."""
    products: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    for step in program.steps:
        (products if step.kind in compiled_text.PRODUCTS else others)[step.part] += (
            step.times * program.moved(step) * bool(step.kind)
        )
    parts = sorted({*products, *others}, key=lambda part: -others[part])
    lines = ["", "| GB read and written | cuBLAS and cuDNN | other kernels |", "|---|---|---|"]
    lines += [f"| {part} | {products[part] / 1e9:.1f} | {others[part] / 1e9:.1f} |" for part in parts]
    lines.append(f"| all | {products.total() / 1e9:.1f} | {others.total() / 1e9:.1f} |")
    bandwidths = {name: traced_products.DATA_SHEETS[name][1] for name in ("H100 SXM", "H200")}
    times = (f"{1e3 * others.total() / rate:.1f} ms on an {name}" for name, rate in bandwidths.items())
    return [*lines, "", f"at the memory's rate by data sheet the other kernels take {' and '.join(times)}"]


def collective_lines(program: Program, text: str, devices: int) -> list[str]:
    """Collectives by kind, and by what runs beside them."""
    traffic = collectives.count(text, devices).traffic
    lines = [f"{kind}: {of.count} x, {of.bytes / MIB:.1f} MiB" for kind, of in traffic.items()]
    beside: collections.Counter[tuple[str, str]] = collections.Counter()
    sizes: collections.Counter[tuple[str, str]] = collections.Counter()
    for one in compiled_text.sent(program):
        beside[one.kind, one.beside] += one.times
        sizes[one.kind, one.beside] += one.times * one.bytes
    for (kind, work), count in sorted(beside.items()):
        lines.append(f"  {kind} with {work} beside it: {count} x, which make {sizes[kind, work] / MIB:.1f} MiB")
    return lines or ["collectives: none"]


def cycle_lines(program: Program, clock: float) -> list[str]:
    """Markdown: the TPU compiler's estimate of cycles by part; nothing where it gives none."""
    by_part: collections.Counter[str] = collections.Counter()
    moving: collections.Counter[str] = collections.Counter()
    for step in program.steps:
        by_part[step.part] += step.cycles
        moving[step.part] += step.cycles * step.moves
    if not by_part.total():  # only a program compiled to the end has the estimates
        return []
    lines = ["", "| part | million cycles | of them copies | ms |", "|---|---|---|---|"]
    for part, cycles in [*by_part.most_common(), ("all", by_part.total())]:
        copied = moving.total() if part == "all" else moving[part]
        lines.append(f"| {part} | {cycles / 1e6:.2f} | {copied / 1e6:.2f} | {1e3 * cycles / clock:.1f} |")
    return lines


def report(text: str, devices: int, clock: float) -> list[str]:
    """Everything that the program's text says, for people. clock: cycles a second of a TPU; 0 for GPUs."""
    program = Program(text)
    return [
        *donation_lines(program),
        *product_lines(program),
        *move_lines(program),
        *collective_lines(program, text, devices),
        *(cycle_lines(program, clock) if clock else [*kernel_lines(program), *traffic_lines(program)]),
    ]


def main() -> None:
    """Prints the report of the command line's program."""
    args = parse()
    if args.into:
        compile_into(args)
        return
    text, lines = (args.read.read_text(), []) if args.read else optimised(args)
    if args.text:
        args.text.write_text(text)
    clock = CLOCKS.get(args.topology.split(":")[0], 0.0)
    print("\n".join([*lines, *report(text, devices_of(args), clock)]))


if __name__ == "__main__":
    main()
