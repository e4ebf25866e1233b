"""The roofline estimate of a training step on TPUs: FLOPs and bytes counted from the trace, ceilings by data sheets.

  python benchmarks/roofline.py --size=vit_l16 --benchmark=pascal_context --batch=8
  python benchmarks/roofline.py --size=vit_l16 --benchmark=pascal_context --batch=8 --attention=fused
  python benchmarks/roofline.py --size=vit_l16 --benchmark=pascal_context --widths=384,448,480,512

A part takes the longer of its arithmetic at the bfloat16 rate, padded (`padding`; three or six passes for float32 at a
high precision), and its bytes at the memory's rate; parts follow one another. The bytes are

- operands and result of each product, each once. A program that keeps some of them on the chip moves less;
- what the scans keep for the backward pass (`scan_traffic`), each array written once and read once, unless a product
  writes or reads it anyway. XLA writes these for certain: nothing is fused across the turns of a loop;
- the optimiser's.

What norms, activations, upsampling and losses move besides is not counted: a program that does not fuse them moves
more. So the arithmetic alone is a bound for any program with these products, and the rest is an estimate.

`--attention=fused`: scores are never written, and computed once more in the backward pass: seven products where there
are six, five of them backward. The bytes left are those of a fused kernel: queries, keys, values and output in the
forward pass; in the backward pass these and the output's gradient are read, and three gradients written.
"""

import argparse
from collections.abc import Iterable
import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

from benchmarks import padding, scan_traffic, traced_products
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.tasks import from_config

PASSES = {"": 1, "high": 3, "highest": 6}  # of bfloat16 products in one of float32, by the precision asked for
NOTHING = padding.Matrices(0, 0, 0, 0)
PARTS = (*traced_products.PARTS, "optimiser")


@dataclasses.dataclass(frozen=True)
class Work:
    """A product of the step or, with `NOTHING` to multiply, an array that a scan keeps: over all times that it runs.

    bytes: moved. of_scores: how many of them are of the attention's N x N arrays. passes: over the matrix unit.
    """

    path: str
    matrices: padding.Matrices
    bytes: int
    of_scores: int = 0
    passes: int = 1

    @property
    def part(self) -> str:
        """One of `PARTS`."""
        return traced_products.part_of(self.path)


def work(jaxpr: Any, tokens: int) -> list[Work]:
    """Products and kept arrays of a traced step; tokens: N of its attention, with what stands before the patches."""

    def scores(path: str, arrays: Iterable[Any]) -> int:
        return sum(traced_products.bytes_of(of) for of in arrays if _is_scores(path, of.shape, tokens))

    found = []
    for eqn, path, times in traced_products.operations(jaxpr):
        if eqn.primitive.name in traced_products.PRIMITIVES:
            arrays = [var.aval for var in (*eqn.invars, *eqn.outvars)]
            size = times * sum(map(traced_products.bytes_of, arrays))
            passes = PASSES[traced_products.precision_of(eqn)] if str(arrays[0].dtype) == "float32" else 1
            found.append(Work(path, padding.matrices(eqn, times), size, times * scores(path, arrays), passes))
    for of in scan_traffic.kept(jaxpr):
        found.append(Work(of.path, NOTHING, of.bytes, of.bytes * _is_scores(of.path, of.shape, tokens)))
    return found


def _is_scores(path: str, shape: tuple[int, ...], tokens: int) -> bool:
    return traced_products.part_of(path) == "attention of tokens" and shape.count(tokens) >= 2


def fused(found: list[Work], tokens: int) -> list[Work]:
    """The same with scores that stay on the chip, and are computed once more in the backward pass."""
    again = [
        dataclasses.replace(of, bytes=0, of_scores=0)
        for of in found
        if of.of_scores and (of.matrices.rows, of.matrices.columns) == (tokens, tokens) and "transpose(" not in of.path
    ]
    return [*(dataclasses.replace(of, bytes=of.bytes - of.of_scores, of_scores=0) for of in found), *again]


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds by part that a device's data sheet allows: arithmetic, arithmetic with padding, memory."""

    arithmetic: dict[str, float]
    padded: dict[str, float]
    memory: dict[str, float]

    @property
    def longer(self) -> dict[str, float]:
        """By part, the longer of arithmetic with padding and memory."""
        return {part: max(self.padded[part], self.memory[part]) for part in PARTS}

    @property
    def seconds(self) -> float:
        """Of all parts, one after the other."""
        return sum(self.longer.values())

    def limit(self, part: str) -> str:
        """What the part's time is of."""
        return "arithmetic" if self.padded[part] > self.memory[part] else "bytes"


def bound(found: list[Work], parameters: int, device: str) -> Bound:
    """The estimate for one of `padding.SIDES`; see the module's text."""
    rate, bandwidth = traced_products.DATA_SHEETS[device]
    arithmetic, padded, memory = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
    for of in found:
        arithmetic[of.part] += of.matrices.flops / rate
        padded[of.part] += of.passes * of.matrices.padded(padding.SIDES[device]) / rate
        memory[of.part] += of.bytes / bandwidth
    memory["optimiser"] += traced_products.OPTIMISER_BYTES * parameters / bandwidth
    return Bound(arithmetic, padded, memory)


def devices_table(found: list[Work], counts: budget.Budget, images: int) -> str:
    """Markdown: a line a device; ms of arithmetic, with padding, of bytes, the bound, its MFU, what takes longest.

    MFU: model FLOPs, six for each multiply-add of the forward pass, a second, over the data sheet's.
    """
    lines = ["| device | arithmetic | with padding | bytes | bound, ms | MFU | takes longest |", "|---" * 7 + "|"]
    for device in padding.SIDES:
        of = bound(found, counts.total_parameters, device)
        part = max(of.longer, key=lambda part: of.longer[part])
        rate = 6 * counts.total_computed * images / of.seconds
        cells = [device, *(f"{1e3 * sum(by.values()):.1f}" for by in (of.arithmetic, of.padded, of.memory))]
        cells += [f"{1e3 * of.seconds:.1f}", f"{100 * rate / traced_products.DATA_SHEETS[device][0]:.0f} %"]
        lines.append(f"| {' | '.join(cells)} | {part}: {1e3 * of.longer[part]:.1f} ms, {of.limit(part)} |")
    return "\n".join(lines)


def parts_table(found: list[Work], parameters: int) -> str:
    """Markdown: GB of a part's products and of what scans keep of it; by device the longer of the two, in ms."""
    lines = [f"| part | GB of products | GB kept by scans | {' | '.join(padding.SIDES)} |"]
    lines.append("|---" * (3 + len(padding.SIDES)) + "|")
    bounds = [bound(found, parameters, device) for device in padding.SIDES]
    for part in PARTS:
        own = [of for of in found if of.part == part]
        kept = sum(of.bytes for of in own if of.matrices == NOTHING)
        others = sum(of.bytes for of in own) - kept
        others += traced_products.OPTIMISER_BYTES * parameters * (part == "optimiser")
        cells = [f"{others / 1e9:.1f}", f"{kept / 1e9:.1f}"]
        cells += [f"{1e3 * of.longer[part]:.1f} {of.limit(part)}" for of in bounds]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_config(args: argparse.Namespace, width: int = 0) -> tuple[list[Work], budget.Budget]:
    """The work of the command line's training step and the model's budget; width: D, if not the size's own."""
    config = traced_products.BENCHMARKS[args.benchmark].get_config(args.size)
    config.batch_size, config.model.unroll = args.batch, "no"
    config.model.feature_width = width or config.model.feature_width
    model = taskexpert.from_config(config, from_config(config))
    tokens = math.prod(model.grid) + model.backbone.extra_tokens
    found = work(traced_products.trace_train_step(config).jaxpr.jaxpr, tokens)
    return (fused(found, tokens) if args.attention == "fused" else found), budget.count(model)


def widths_table(args: argparse.Namespace) -> str:
    """Markdown: feature widths D, the model's budget with them, what they pad, and the bound of a step in ms."""
    sides = sorted(set(padding.SIDES.values()))
    names = ["D", "parameters, M", "multiply-adds, G", "computed, G", *(f"padding to {side}" for side in sides)]
    names += [f"bound on {device}" for device in padding.SIDES]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for width in map(int, args.widths.split(",")):
        found, counts = of_config(args, width)
        flops = sum(of.matrices.flops for of in found)
        sizes = (counts.total_parameters / 1e6, counts.total_multiply_adds / 1e9, counts.total_computed / 1e9)
        cells = [str(width), *(f"{size:.0f}" for size in sizes)]
        cells += [f"{100 * (sum(of.matrices.padded(side) for of in found) / flops - 1):.1f} %" for side in sides]
        cells += [f"{1e3 * bound(found, counts.total_parameters, device).seconds:.1f}" for device in padding.SIDES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the tables of a size on a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_l16", help="of configs/defaults.py")
    parser.add_argument("--benchmark", choices=tuple(traced_products.BENCHMARKS), default="pascal_context")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--attention", choices=("xla", "fused"), default="xla")
    parser.add_argument("--widths", default="", help="compare these feature widths, in place of the tables of one")
    args = parser.parse_args()
    if args.widths:
        print(widths_table(args))
        return
    found, counts = of_config(args)
    print(devices_table(found, counts, args.batch), end="\n\n")
    print(parts_table(found, counts.total_parameters))


if __name__ == "__main__":
    main()
