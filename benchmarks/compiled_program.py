"""Kernels of the training step, compiled by XLA for an absent TPU or GPU: number, bytes and cycles by part.

  python benchmarks/compiled_program.py --config=configs/pascal_context.py:vit_l16 --topology=v5e:2x2 --devices=1 \
      --config.batch_size=1
  python benchmarks/compiled_program.py --config=configs/pascal_context.py:vit_l16 --topology=h200:1

Needs libtpu (the extra `tpu`) or JAX's CUDA plugin (the extra `cuda`). In addition to the memory and
collectives of `--mode=compile` it reports, with every iteration of a loop counted:

- copies and transpositions of more than 1 MiB, and the residuals that loops keep for the backward pass;
- for GPUs the number of kernels by part and kind, and the bytes that they read and write, each operand and result once;
- for TPUs the compiler's estimate of cycles by part, without waits.

XLA's GPU compiler cannot time kernels without a GPU: it chooses no algorithms for cuBLAS and cuDNN, and gives every
matmul to cuBLAS, none to Triton.
"""

import collections
from collections.abc import Sequence
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

from absl import app, flags
from ml_collections import config_flags

from benchmarks.program import text, traced_step
from benchmarks.program.text import MIB, Program, Step
from taskexpert_jax.compile import topologies
from taskexpert_jax.compile.fit import GPU_OPTIONS

LONGEST = 20  # rows of a list


def move_lines(program: Program) -> list[str]:
    """Copies and transpositions over 1 MiB, residuals of loops, and arrays filled with one value."""
    large = [step for step in program.steps if step.kind and program.bytes(step) >= MIB]
    moved = [step for step in large if step.moves]
    turned = [step for step in large if "transpose" in step.opcodes and not step.moves]
    sums = {
        "slices written to the arrays of a loop's turns, or taken out of them": [step for step in large if step.slices],
        "arrays filled with one value": [step for step in large if step.fills],
    }
    return [
        *list_of(program, "copies and transpositions over 1 MiB", moved),
        *list_of(program, "kernels over 1 MiB that transpose and do other work", turned),
        *(f"{title}: {total(program, steps) / MIB:.0f} MiB" for title, steps in sums.items()),
    ]


def total(program: Program, steps: list[Step]) -> int:
    """Bytes that steps write, over all their executions."""
    return sum(step.times * program.bytes(step) for step in steps)


def list_of(program: Program, title: str, steps: list[Step]) -> list[str]:
    """Lines for the steps that write most, the largest first."""
    lines = [f"{title}: {total(program, steps) / MIB:.0f} MiB in all"]
    for step in sorted(steps, key=lambda step: -total(program, [step]))[:LONGEST]:
        kind = step.instruction.type.split("{")[0]
        size = total(program, [step]) / MIB
        lines.append(f"  {size:8.1f} MiB, {step.times} x {kind} {step.part}: {step.path[-90:]}")
    return lines


def kernel_lines(program: Program) -> list[str]:
    """Markdown table of a GPU's kernels by part and kind."""
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


def byte_lines(program: Program) -> list[str]:
    """Markdown table of the bytes that a GPU's kernels read and write, by part."""
    libraries: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    for step in program.steps:
        (libraries if step.kind in text.PRODUCTS else others)[step.part] += (
            step.times * program.moved(step) * bool(step.kind)
        )
    parts = sorted({*libraries, *others}, key=lambda part: -others[part])
    lines = ["", "| GB read and written | cuBLAS and cuDNN | other kernels |", "|---|---|---|"]
    lines += [f"| {part} | {libraries[part] / 1e9:.1f} | {others[part] / 1e9:.1f} |" for part in parts]
    return [*lines, f"| all | {libraries.total() / 1e9:.1f} | {others.total() / 1e9:.1f} |"]


def cycle_lines(program: Program) -> list[str]:
    """Markdown table of the TPU compiler's estimate of cycles by part."""
    by_part: collections.Counter[str] = collections.Counter()
    moving: collections.Counter[str] = collections.Counter()
    for step in program.steps:
        by_part[step.part] += step.cycles
        moving[step.part] += step.cycles * step.moves
    lines = ["", "| part | million cycles | of them copies |", "|---|---|---|"]
    lines += [f"| {part} | {n / 1e6:.2f} | {moving[part] / 1e6:.2f} |" for part, n in by_part.most_common()]
    return [*lines, f"| all | {by_part.total() / 1e6:.2f} | {moving.total() / 1e6:.2f} |"]


def main(argv: Sequence[str]) -> None:
    """Prints the report for the config and topology of the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    topology = flags.FLAGS.topology
    devices = topologies.devices(topology)[: flags.FLAGS.devices]
    gpu = topologies.platform_of(topology) == "cuda"
    lowered = traced_step.trace_train_step(flags.FLAGS.config, devices).lower()
    program = Program(lowered.compile(compiler_options=GPU_OPTIONS if gpu else {}).as_text())
    tables = [*kernel_lines(program), *byte_lines(program)] if gpu else cycle_lines(program)
    print("\n".join([*move_lines(program), *tables]))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file and variant, as for main.py.")
    flags.DEFINE_string("topology", "v5e:2x2", "One of taskexpert_jax/compile/topologies.py.")
    flags.DEFINE_integer("devices", None, "Number of its devices to use; default: all.")
    flags.mark_flag_as_required("config")
    app.run(main)
