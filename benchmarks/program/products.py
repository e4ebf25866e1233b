"""Matmuls and convolutions of a traced training step, by part and dtype.

Nothing is compiled or run. Every iteration of a loop counts, unlike in XLA's cost analysis; `budget` counts the same
model by formulas.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from taskexpert_jax.compile.steps import build, tracers
from taskexpert_jax.parallel import sharding

PRIMITIVES = ("dot_general", "conv_general_dilated")
# Part -> module names; the first part with one of its names in a product's path counts.
PARTS = {
    "attention of tokens": ("attend",),
    "backbone, the rest": ("patches", "blocks"),
    "experts": ("experts",),
    "memory": ("vmap(read)", "read", "write", "blend"),
    "gates, assembling": ("mixture",),
    "heads, upsampling": ("upsample",),
    "heads": ("head",),
    "upsampling to image size": ("",),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """One `dot_general` or `conv_general_dilated` of a program.

    path: names of the modules that it is in.
    dtypes: of its two operands.
    precision: requested for float32 operands: "" is the device's default, TF32 or one bfloat16 pass; "high" is TF32 or
      three passes, "highest" float32 or six.
    flops: two per multiply-add, over all iterations of the loops around it.
    """

    path: str
    primitive: str
    dtypes: tuple[str, str]
    precision: str
    flops: int

    @property
    def part(self) -> str:
        """One of `PARTS`."""
        return part_of(self.path)

    @property
    def kind(self) -> str:
        """The operands' dtypes and the requested precision, for printing."""
        words = " x ".join(dict.fromkeys(self.dtypes))
        return f"{words}, {self.precision} precision" if self.precision and "float32" in self.dtypes else words


def part_of(path: str) -> str:
    """The part of `PARTS` of an operation with this path."""
    words = path.split("/")
    of_tasks = ("head_", "write_", "blend_", "read_")
    names = {word.split("_")[0] if word.startswith(of_tasks) else word for word in words}
    return next((part for part, known in PARTS.items() if names & set(known)), list(PARTS)[-1])


def products(jaxpr: Any, path: str = "", times: int = 1) -> Iterator[Product]:
    """All products of a jaxpr and its inner jaxprs, with every branch of a conditional.

    path: the modules that the jaxpr is in. times: number of its executions.
    """
    for eqn in jaxpr.eqns:
        here = f"{path}/{eqn.source_info.name_stack}"
        if eqn.primitive.name in PRIMITIVES:
            left, right = (str(var.aval.dtype) for var in eqn.invars)
            yield Product(here, eqn.primitive.name, (left, right), precision_of(eqn), times * _flops(eqn))
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from products(part, here, times * _iterations(eqn))


def precision_of(eqn: Any) -> str:
    """The requested precision of a product: "", "high" or "highest"."""
    asked = str(eqn.params["precision"])
    return next((name for name in ("highest", "high") if name.upper() in asked), "")


def _iterations(eqn: Any) -> int:
    """Number of executions of an operation's inner jaxpr."""
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


def trace_train_step(config: ConfigDict, devices: Sequence[Any] | None = None) -> Any:
    """Traces the training step of a config, on this process's first device or the given ones."""
    mesh, model = build(config, jax.devices()[:1] if devices is None else devices)
    trace = tracers(config, model, mesh)["train"]
    with sharding.use(mesh):
        return trace()
