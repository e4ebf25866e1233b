"""The matrix products and convolutions of a traced training step, by part and dtype: what there is to compute.

  python benchmarks/traced_products.py --size=vit_l16 --benchmark=pascal_context

Nothing is compiled or run, so it needs no accelerator. Loops are counted as often as they run, which XLA's own cost
analysis does not; `budget` counts the same model by formulas.
"""

import argparse
from collections.abc import Iterator, Sequence
import dataclasses
import math
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed

import jax

from configs import nyud, pascal_context
from taskexpert_jax.compile import steps as compilation
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, state, tally
from taskexpert_jax.training.step import make_train_step

BENCHMARKS = {"nyud": nyud, "pascal_context": pascal_context}
# bfloat16 FLOP/s (dense) and bytes/s of memory, by the makers' data sheets; no device was asked.
DATA_SHEETS = {
    "H100 SXM": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "TPU v4": (275e12, 1.228e12),
    "TPU v5e": (197e12, 0.819e12),
    "TPU v6e": (918e12, 1.64e12),
}
PRIMITIVES = ("dot_general", "conv_general_dilated")
# Of each parameter, by Adam with clipping: the gradient is read for its norm; then gradient, moments and parameter are
# read, and the last three written; all float32.
OPTIMISER_BYTES = 4 * (1 + 4 + 3)

# The first that has one of its names among the modules of a product's path, in this order.
PARTS = {
    "attention of tokens": ("attend",),
    "backbone, the rest": ("patches", "blocks"),
    "experts": ("experts",),
    "memory": ("vmap(read)", "read", "write"),
    "gates, assembling": ("mixture",),
    "heads, upsampling": ("upsample",),
    "heads": ("head",),
    "upsampling to image size": ("",),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """One `dot_general` or `conv_general_dilated` of a program.

    path: names of the modules it was written in. dtypes: of its two operands. precision: what is asked for float32
      operands: "" is what an accelerator takes by itself, TF32 or one bfloat16 pass; "high" is TF32 or three passes,
      "highest" float32 or six.
    flops: two for each multiply-add. bytes: of both operands and the result, each once. Both over all times that the
      loops around it run.
    """

    path: str
    primitive: str
    dtypes: tuple[str, str]
    precision: str
    flops: int
    bytes: int

    @property
    def part(self) -> str:
        """One of `PARTS`."""
        return part_of(self.path)

    @property
    def kind(self) -> str:
        """The operands' dtypes, and the precision where it is asked for: for people."""
        words = " x ".join(dict.fromkeys(self.dtypes))
        return f"{words}, {self.precision} precision" if self.precision and "float32" in self.dtypes else words


def part_of(path: str) -> str:
    """The part of `PARTS` that an operation with this path belongs to."""
    words = path.split("/")
    names = {word.split("_")[0] if word.startswith(("head_", "write_", "read_")) else word for word in words}
    return next((part for part, known in PARTS.items() if names & set(known)), list(PARTS)[-1])


def operations(jaxpr: Any, path: str = "", times: int = 1) -> Iterator[tuple[Any, str, int]]:
    """All equations of a jaxpr and of those inside it, the modules that each was written in, and how often it runs.

    Of the branches of a conditional, every one.
    """
    for eqn in jaxpr.eqns:
        here = f"{path}/{eqn.source_info.name_stack}"
        yield eqn, here, times
        inner = times * _turns(eqn)
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from operations(part, here, inner)


def products(jaxpr: Any) -> Iterator[Product]:
    """All products of a jaxpr and of those inside it."""
    for eqn, path, times in operations(jaxpr):
        if eqn.primitive.name in PRIMITIVES:
            left, right = (str(var.aval.dtype) for var in eqn.invars)
            counts = times * _flops(eqn), times * sum(bytes_of(var.aval) for var in (*eqn.invars, *eqn.outvars))
            yield Product(path, eqn.primitive.name, (left, right), precision_of(eqn), *counts)


def precision_of(eqn: Any) -> str:
    """What a product asks for: "", "high" or "highest"."""
    asked = str(eqn.params["precision"])
    return next((name for name in ("highest", "high") if name.upper() in asked), "")


def _turns(eqn: Any) -> int:
    """How often what is inside an operation runs."""
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _flops(eqn: Any) -> int:
    left, right = (var.aval.shape for var in eqn.invars)
    size = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        return 2 * size * math.prod(left[axis] for axis in contracted)
    _, in_features, *window = eqn.params["dimension_numbers"].rhs_spec
    return 2 * size * math.prod(right[axis] for axis in (in_features, *window))


def bytes_of(array: Any) -> int:
    """Bytes of an array of this shape and dtype."""
    return math.prod(array.shape) * array.dtype.itemsize


def trace_train_step(config: Any, devices: Sequence[Any] | None = None) -> Any:
    """The training step of `make_train_step` for a config, traced: on this process's first device, or on others."""
    tasks = from_config(config)
    devices = jax.devices()[:1] if devices is None else devices
    model, tx = taskexpert.from_config(config, tasks, devices[0]), optimizer.build(config)
    mesh = sharding.make_mesh(config.mesh, {}, devices=devices)
    _, abstract, shardings = state.abstract_and_shardings(model, tx, mesh, config.seed)
    batch = compilation.abstract_batch(tasks, config.batch_size, tuple(config.dataset.image_size), mesh)
    with sharding.use(mesh):
        step: Any = make_train_step(model, tx, config, mesh, shardings)
        seen = jax.eval_shape(lambda: tally.empty(tasks))
        return step.trace(abstract, seen, batch)


def table(found: list[Product], batch_size: int) -> str:
    """Markdown: GFLOP of an image's training step by part and by the operands' dtypes, and their share."""
    rows: dict[tuple[str, str], int] = {}
    for product in found:
        key = (product.part, product.kind)
        rows[key] = rows.get(key, 0) + product.flops
    total = sum(rows.values())
    lines = ["| part | operands | GFLOP an image | share |", "|---|---|---|---|"]
    for (part, kind), flops in sorted(rows.items(), key=lambda row: (list(PARTS).index(row[0][0]), row[0][1])):
        lines.append(f"| {part} | {kind} | {flops / batch_size / 1e9:.2f} | {100 * flops / total:.2f} % |")
    return "\n".join([*lines, f"| all | | {total / batch_size / 1e9:.1f} | 100 % |"])


def floors(found: list[Product], parameters: int) -> str:
    """Markdown: TFLOP and GB of a step by part, and the shortest time that the data sheets allow, in ms.

    A product takes the longer of its arithmetic at the bfloat16 rate and its bytes at the memory's rate; whatever else
    a step does is taken to cost nothing. The arithmetic is a bound for any program. The bytes are not: they are those
    of a program that reads each product's operands from memory and writes its result there, more than where results
    stay on the chip (fused attention), less than where other operations read them again. It predicts no time.
    """
    lines = [f"| part | TFLOP | GB | {' | '.join(DATA_SHEETS)} |", "|---" * (3 + len(DATA_SHEETS)) + "|"]
    totals = [0.0] * (2 + len(DATA_SHEETS))
    for part in (*PARTS, "optimiser"):
        own = [(p.flops, p.bytes) for p in found if p.part == part]
        own = [(0, OPTIMISER_BYTES * parameters)] if part == "optimiser" else own
        row = [sum(flops for flops, _ in own) / 1e12, sum(size for _, size in own) / 1e9]
        for rate, bandwidth in DATA_SHEETS.values():
            row.append(1e3 * sum(max(flops / rate, size / bandwidth) for flops, size in own))
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        lines.append(_row(part, row))
    return "\n".join([*lines, _row("all", totals)])


def _row(part: str, values: list[float]) -> str:
    return f"| {part} | {values[0]:.2f} | " + " | ".join(f"{value:.1f}" for value in values[1:]) + " |"


def main() -> None:
    """Prints the tables of a size on a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="vit_l16", help="of configs/defaults.py")
    parser.add_argument("--benchmark", choices=("nyud", "pascal_context"), default="pascal_context")
    parser.add_argument("--batch", type=int, default=8, help="images a step")
    args = parser.parse_args()
    config = BENCHMARKS[args.benchmark].get_config(args.size)
    config.batch_size, config.model.unroll = args.batch, "no"
    found = list(products(trace_train_step(config).jaxpr.jaxpr))
    model = taskexpert.from_config(config, from_config(config))
    parameters = sum(budget.count_parameters(model).values())
    print(f"{table(found, args.batch)}\n\n{floors(found, parameters)}")


if __name__ == "__main__":
    main()
