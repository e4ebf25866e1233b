"""How much of a training step's arithmetic on a TPU is padding: counted from the traced program under a stated rule.

  python benchmarks/padding.py --size=vit_l16 --benchmark=pascal_context
  python benchmarks/padding.py --compiled=v5e:2x2     # the rule beside the compiler's estimates; needs libtpu, no TPU

**The rule.** A product is (rows, contracted) times (contracted, columns), as often as its batch dims and, for a
convolution, the places of its window say. The matrix unit holds a tile of one operand and streams rows of the other
through it: `contracted` and the shorter of the two free dims are raised to multiples of its side (128; 256 on v6e), the
longer one, which is streamed, to a multiple of 8. Sources: Cloud TPU performance guide, "Padding" and "Tensor
dimensions" (cloud.google.com/tpu/docs/performance-guide); How to Scale Your Model, "How to Think About TPUs"
(jax-ml.github.io/scaling-book/tpus); that the longer dim is the one streamed is ours, and agrees with `--compiled`. It
is a count under that rule, not a measurement, and it is loose:

- several free dims, or several contracted ones, are taken as one, and so are images and their places; batch dims are
  products of their own. A compiler may lay them out otherwise, with padding of its own, or put some together;
- a compiler may pack few contracted features more tightly (an image's three), and it may do with less than a whole tile
  of a long contracted dim: by its own estimates it sometimes does (`--compiled`);
- few rows leave the unit waiting for the next tile, which is not counted;
- float32 at a high precision takes three or six passes, which are not padding and are not counted here.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import os
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

import jax
import jax.numpy as jnp

from benchmarks import traced_products
from taskexpert_jax.compile import collectives, topologies

SIDES = {"TPU v4": 128, "TPU v5e": 128, "TPU v6e": 256}  # of the matrix unit
UNITS = {"TPU v4": 8, "TPU v5e": 4, "TPU v6e": 4}  # of a chip
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Matrices:
    """`count` products of (rows, contracted) times (contracted, columns)."""

    count: int
    rows: int
    columns: int
    contracted: int

    @property
    def flops(self) -> int:
        """Two for each multiply-add, without padding."""
        return 2 * self.count * self.rows * self.columns * self.contracted

    def padded(self, side: int) -> int:
        """FLOPs of matrix units with this side; the rule is in the module's text."""
        shorter, longer = sorted((self.rows, self.columns))
        return 2 * self.count * _up(longer, SUBLANES) * _up(shorter, side) * _up(self.contracted, side)

    def __str__(self) -> str:
        """The sizes of one: the longer free dim, the shorter one, the contracted one."""
        shorter, longer = sorted((self.rows, self.columns))
        return f"{longer} x {shorter} x {self.contracted}"


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def matrices(eqn: Any, times: int = 1) -> Matrices:
    """The matrix products in a `dot_general`, or in a `conv_general_dilated` without groups, that runs so often."""
    left, right, out = (var.aval.shape for var in (*eqn.invars, *eqn.outvars))
    if eqn.primitive.name == "dot_general":
        contracted, batch = (
            [math.prod(shape[axis] for axis in axes) for shape, axes in zip((left, right), pair, strict=True)]
            for pair in eqn.params["dimension_numbers"]
        )
        rows, columns = (math.prod(shape) // (contracted[0] * batch[0]) for shape in (left, right))
        return Matrices(times * batch[0], rows, columns, contracted[0])
    spec = eqn.params["dimension_numbers"]
    columns, features, *window = (right[axis] for axis in spec.rhs_spec)
    images, _, *places = (out[axis] for axis in spec.out_spec)
    if spec.lhs_spec[1] == 0:  # The gradient of a kernel: its "features" are the images, its "window" their places.
        return Matrices(times * math.prod(places), images, columns, features * math.prod(window))
    return Matrices(times * math.prod(window), images * math.prod(places), columns, features)


def products(jaxpr: Any) -> Iterator[tuple[str, Matrices]]:
    """The part of each product of a jaxpr, and its matrices."""
    for eqn, path, times in traced_products.operations(jaxpr):
        if eqn.primitive.name in traced_products.PRIMITIVES:
            yield traced_products.part_of(path), matrices(eqn, times)


def table(found: list[tuple[str, Matrices]], images: int) -> str:
    """Markdown: GFLOP of an image by part, what padding makes of them, what it adds to the part's and to all."""
    total = sum(of.flops for _, of in found)
    lines = _head("part")
    for part in traced_products.PARTS:
        own = [of for where, of in found if where == part]
        lines += [_row(part, own, images, total)] if own else []
    return "\n".join([*lines, _row("all", [of for _, of in found], images, total)])


def largest(found: list[tuple[str, Matrices]], images: int, count: int = 5) -> str:
    """Markdown: the products, by part and sizes, that padding to 128 adds most to."""
    groups: dict[str, list[Matrices]] = {}
    for part, of in found:
        groups.setdefault(f"{part}: {of}", []).append(of)
    added = {name: sum(of.padded(128) - of.flops for of in own) for name, own in groups.items()}
    total = sum(of.flops for _, of in found)
    names = sorted(groups, key=lambda name: -added[name])[:count]
    return "\n".join([*_head("product: free dims, contracted"), *(_row(of, groups[of], images, total) for of in names)])


def _head(first: str) -> list[str]:
    lines = f"| {first} | GFLOP an image |"
    for side in sorted(set(SIDES.values())):
        chips = ", ".join(name.removeprefix("TPU ") for name, of in SIDES.items() if of == side)
        lines += f" {chips}: padded to {side} | added to it | to all |"
    return [lines, "|---" * (lines.count("|") - 1) + "|"]


def _row(name: str, own: list[Matrices], images: int, total: int) -> str:
    flops = sum(of.flops for of in own)
    cells = [name, f"{flops / images / 1e9:.2f}"]
    for side in sorted(set(SIDES.values())):
        padded = sum(of.padded(side) for of in own)
        added = padded - flops
        cells += [f"{padded / images / 1e9:.2f}", f"{100 * added / flops:.1f} %", f"{100 * added / total:.2f} %"]
    return f"| {' | '.join(cells)} |"


def _convolution(maps: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    padding = "SAME" if stride == 1 else "VALID"
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(maps, kernel, (stride, stride), padding, dimension_numbers=numbers)


def _of_input(maps: jax.Array, kernel: jax.Array) -> jax.Array:
    # Not vjp, in whose trace the forward product would be another one.
    return jax.linear_transpose(lambda of: _convolution(of, kernel), maps)(maps)[0]


def _of_kernel(maps: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.linear_transpose(lambda of: _convolution(maps, of), kernel)(maps)[0]


def _gated_sum(gates: jax.Array, experts: jax.Array) -> jax.Array:
    return jnp.einsum("tbnk,kbnd->tbnd", gates, experts)


def _cases() -> Iterator[tuple[str, Callable[..., jax.Array], list[tuple[int, ...]]]]:
    """Name, function and operands' shapes of products of ViT-L's step and similar ones; eight images of 512x512."""
    for width in (384, 448, 480, 512):
        shapes = [(8, 128, 128, width), (3, 3, width, width)]
        yield f"3x3 convolution, D={width}", _convolution, shapes
        yield f"its gradient of the input, D={width}", _of_input, shapes
        yield f"its gradient of the kernel, D={width}", _of_kernel, shapes
    yield "MLP, 1024 x 4096", jnp.dot, [(8 * 1024, 1024), (1024, 4096)]
    patches = functools.partial(_convolution, stride=16)
    yield "patch embedding", patches, [(8, 512, 512, 3), (16, 16, 3, 1024)]
    yield "gated sum of the experts", _gated_sum, [(5, 8, 1024, 5), (5, 8, 1024, 480)]


def compiled(topology: str) -> str:
    """Markdown: of single products, padded FLOPs by the rule and by the TPU compiler's cycles, over those without.

    The cycles are the compiler's own estimate: of the fusion that has the product, and of all, most of which are copies
    to the layouts that it wants; a larger program may do without.
    """
    device = topologies.devices(topology)[0]
    name = f"TPU {topology.split(':')[0]}"
    a_cycle = 2 * UNITS[name] * SIDES[name] ** 2  # FLOPs
    lines = [f"| bfloat16 product on {name} | rule | its fusion | all cycles |", "|---" * 4 + "|"]
    for case, function, shapes in _cases():
        placed = jax.sharding.SingleDeviceSharding(device)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed) for shape in shapes]
        traced = jax.jit(function).trace(*arrays)
        ((_, of),) = products(traced.jaxpr.jaxpr)
        ratios = [of.padded(SIDES[name]) / of.flops]
        ratios += [a_cycle * cycles / of.flops for cycles in _cycles(traced.lower().compile().as_text() or "")]
        lines.append(f"| {case} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join(lines)


def _cycles(text: str) -> tuple[int, int]:
    """Of a program compiled for a TPU, estimated: of what has a product in it, and of all."""
    own, every = 0, 0
    for instruction, times, inside in collectives.executed(text):
        found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        cycles = times * int(found[1]) if found else 0
        every += cycles
        own += cycles if {"convolution", "dot"} & {of.opcode for of in inside} else 0
    return own, every


def main() -> None:
    """Prints the tables of a size on a benchmark, or of single products compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_l16", help="of configs/defaults.py")
    parser.add_argument("--benchmark", choices=tuple(traced_products.BENCHMARKS), default="pascal_context")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    parser.add_argument("--compiled", default="", help="a TPU topology, to compile single products for in place of it")
    args = parser.parse_args()
    if args.compiled:
        print(compiled(args.compiled))
        return
    config = traced_products.BENCHMARKS[args.benchmark].get_config(args.size)
    config.batch_size, config.model.unroll = args.batch, "no"
    found = list(products(traced_products.trace_train_step(config).jaxpr.jaxpr))
    print(f"{table(found, args.batch)}\n\n{largest(found, args.batch)}")


if __name__ == "__main__":
    main()
