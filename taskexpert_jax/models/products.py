"""Matmuls and convolutions of a traced program, and their FLOPs.

XLA's own count has the body of a scan once; this one multiplies by the scan's length.
"""

from collections.abc import Iterator
import dataclasses
import math
from typing import Any

PRIMITIVES = ("dot_general", "conv_general_dilated")


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
    def kind(self) -> str:
        """The operands' dtypes and the requested precision, for printing."""
        words = " x ".join(dict.fromkeys(self.dtypes))
        return f"{words}, {self.precision} precision" if self.precision and "float32" in self.dtypes else words


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
