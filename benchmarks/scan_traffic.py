"""The arrays that the loops of a traced program keep: bytes that are moved besides those of its products.

What a scan stacks turn by turn (among it all that the backward pass needs of the forward one) is written to memory
once, and what it takes turn by turn is read once: XLA fuses nothing across the turns of a loop.
"""

import collections
from collections.abc import Iterator
import dataclasses
from typing import Any

from jax.extend.core import Literal

from benchmarks import traced_products

# They give what they are given, in another shape, order or dtype, or by a name (`checkpoint_name`).
_SAME = {
    "convert_element_type",
    "copy",
    "expand_dims",
    "name",
    "reduce_precision",
    "reshape",
    "rev",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
_COUNTED = {*traced_products.PRIMITIVES, "scan"}


@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that a scan stacks (written) or takes turn by turn (read), over all turns.

    path: names of the modules that make it or, where it is read, first use it.
    """

    path: str
    shape: tuple[int, ...]
    bytes: int
    written: bool


@dataclasses.dataclass(frozen=True)
class _Operation:
    """An equation among those of a loop's body, the calls in it written out."""

    name: str
    path: str
    inputs: list[Any]
    outputs: list[Any]


def kept(jaxpr: Any) -> Iterator[Kept]:
    """What the scans of a jaxpr keep and take, but for what a product, or a scan inside, writes or reads anyway."""
    for eqn, path, times in traced_products.operations(jaxpr):
        if eqn.primitive.name == "scan":
            yield from _of_scan(eqn, path, times)


def _of_scan(eqn: Any, path: str, times: int) -> Iterator[Kept]:
    body = eqn.params["jaxpr"].jaxpr
    carried, consts = eqn.params["num_carry"], eqn.params["num_consts"]
    names: dict[Any, Any] = {var: object() for var in body.invars}
    flow = _Flow(list(_written_out(body, path, names)))
    for inner, outer in zip(body.invars[consts + carried :], eqn.invars[consts + carried :], strict=True):
        users = flow.users(names[inner])
        if users and not any(user.name in _COUNTED for user in users):
            yield Kept(users[0].path, outer.aval.shape, times * traced_products.bytes_of(outer.aval), written=False)
    for inner, outer in zip(body.outvars[carried:], eqn.outvars[carried:], strict=True):
        value = None if isinstance(inner, Literal) else names[inner]
        maker = flow.maker(value)
        if not (maker and maker.name in _COUNTED):
            near = flow.makers.get(value) or maker or next(iter(flow.users(value)), None)
            where = near.path if near else path
            yield Kept(where, outer.aval.shape, times * traced_products.bytes_of(outer.aval), written=True)


class _Flow:
    """Who makes and who uses the values of a loop's body, looking through what leaves a value as it is."""

    def __init__(self, found: list[_Operation]):
        self.makers = {value: operation for operation in found for value in operation.outputs}
        self._users: dict[Any, list[_Operation]] = collections.defaultdict(list)
        for operation in found:
            for value in operation.inputs:
                self._users[value].append(operation)

    def maker(self, value: Any) -> _Operation | None:
        """None for what the body is given."""
        maker = self.makers.get(value)
        return self.maker(maker.inputs[0]) if maker and maker.name in _SAME else maker

    def users(self, value: Any) -> list[_Operation]:
        direct = self._users.get(value, [])
        return [user for first in direct for user in (self.users(first.outputs[0]) if first.name in _SAME else [first])]


def _written_out(jaxpr: Any, path: str, names: dict[Any, Any]) -> Iterator[_Operation]:
    """The operations of a jaxpr, calls replaced by what they call; `names` is given a value for each variable."""
    for eqn in jaxpr.eqns:
        here = f"{path}/{eqn.source_info.name_stack}"
        inputs = [None if isinstance(var, Literal) else names.get(var) for var in eqn.invars]
        called = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr") if key in eqn.params), None)
        called = getattr(called, "jaxpr", called)
        if eqn.primitive.name == "scan" or called is None or len(called.invars) != len(inputs):
            outputs: list[Any] = [object() for _ in eqn.outvars]
            yield _Operation(eqn.primitive.name, here, inputs, outputs)
        else:
            inside = dict(zip(called.invars, inputs, strict=True))
            yield from _written_out(called, here, inside)
            outputs = [None if isinstance(var, Literal) else inside.get(var) for var in called.outvars]
        names.update(zip(eqn.outvars, outputs, strict=True))
