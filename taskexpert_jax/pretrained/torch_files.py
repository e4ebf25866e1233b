"""Reads the zip format of `torch.save` without PyTorch and without running anything that the file names.

The pickle in it is a program for a stack machine. Python's unpickler calls what the program names and allocates what
it asks for; this one knows dicts, lists, tuples, plain values and tensors, and has no call.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import pickletools
from typing import Any

import jax.numpy as jnp
import numpy as np

from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.pretrained.zipped import Archive

_TYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": np.dtype(jnp.bfloat16), "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip

# Keys of the tensors in a PyTorch file that holds more than a state dict.
_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")
_MOST_NESTED = 8

# Tensors that repeat values of a smaller storage (stride 0) may have this many.
_MOST_REPEATED = 2**20


def read(data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a file by name: read-only views, in the file's dtype.

    Raises:
      UserError: objects other than tensors, or a form that is not supported.
      Exception: any, if the file is damaged.
    """
    if not data.startswith(b"PK"):
        raise UserError(
            "not in PyTorch's zip format: saved before PyTorch 1.6, or not by PyTorch; load it in PyTorch and save its "
            "state dict again"
        )
    with Archive(data, stored=True) as archive:
        indices = [name for name in archive.names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(indices) != 1:
            raise UserError(f"{len(indices)} members named data.pkl, not one: not written by torch.save")
        folder = indices[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.names and archive.read(f"{folder}byteorder") != b"little":
            raise UserError("written on a big-endian machine; save it again on a little-endian one")
        storages: dict[str, np.ndarray] = {}

        def storage(reference: Any) -> np.ndarray:
            """Values of one storage; tensors may share it."""
            _, kind, key, _, count = reference
            if not (isinstance(kind, _Global) and isinstance(key, str)):
                raise ValueError("a storage without type or name")
            if kind.name not in _TYPES:
                raise UserError(f"a tensor is of type {shown(kind.name)}; supported: {', '.join(_TYPES)}")
            if key not in storages:
                storages[key] = np.frombuffer(archive.read(f"{folder}data/{key}"), _TYPES[kind.name])
            if len(storages[key]) < count:
                raise ValueError(f"a storage has {len(storages[key])} of {count} values")
            return storages[key]

        content = _unpickled(archive.read(indices[0]), storage)
    return _state_dict(content)


def _state_dict(content: Any) -> dict[str, np.ndarray]:
    """The dict of tensors in a PyTorch file's content, which may be nested in other dicts."""
    for _ in range(_MOST_NESTED):  # a dict may contain itself
        if not isinstance(content, dict) or any(isinstance(value, np.ndarray) for value in content.values()):
            break
        inner = [key for key in _STATE_DICT_KEYS if isinstance(content.get(key), dict)]
        if len(inner) != 1:
            keys = ", ".join(map(shown, list(content)[:8])) or "none"
            raise UserError(
                f"no tensors at the top level, and not exactly one of the keys {', '.join(_STATE_DICT_KEYS)} but "
                f"{len(inner)} (keys: {keys}); save only the state dict"
            )
        content = content[inner[0]]
    else:
        raise UserError(f"dicts nested more than {_MOST_NESTED} deep without a tensor; save only the state dict")
    if not isinstance(content, dict):
        raise UserError(f"contains a {type(content).__name__}, not a dict of tensors; save only the state dict")
    other = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, np.ndarray))]
    if other:
        raise UserError(f"entries that are not tensors: {', '.join(map(shown, other[:4]))}; save only the state dict")
    return content


# --- the pickle ---


@dataclasses.dataclass(frozen=True)
class _Global:
    """A class or function that the pickle names."""

    module: str
    name: str


_ORDERED_DICT = _Global("collections", "OrderedDict")
_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Global("torch._utils", "_rebuild_parameter")

_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_VALUES = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
)  # fmt: skip


class _Machine:
    """The pickle's stack and memo. Every operation takes time and memory in proportion to its bytes."""

    def __init__(self, storage: Callable[[Any], np.ndarray]) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._storage = storage

    def run(self, operation: str, argument: Any) -> None:
        """Runs one operation other than STOP."""
        if operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation]())
        elif operation in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > 64:
                raise ValueError("an integer of more than 64 bits")
            self.stack.append(argument)
        elif operation in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if argument is None else argument] = self.stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif operation == "MARK":
            self._marks.append(len(self.stack))
        elif operation == "GLOBAL":
            self.stack.append(_known(*argument.split(" ", 1)))
        elif operation == "STACK_GLOBAL":
            self.stack.append(_known(*self._popped(2)))
        elif operation == "BINPERSID":
            self.stack.append(self._storage(self.stack.pop()))
        elif operation in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self._popped(int(operation[5:])) if operation[5:] else self._marked()))
        elif operation in ("SETITEM", "SETITEMS"):
            _add_items(self._popped(2) if operation == "SETITEM" else self._marked(), self.stack[-1])
        elif operation in ("APPEND", "APPENDS"):
            items = self._popped(1) if operation == "APPEND" else self._marked()
            if not isinstance(self.stack[-1], list):
                raise ValueError("items for no list")
            self.stack[-1].extend(items)
        elif operation == "REDUCE":
            self.stack.append(_made(*self._popped(2)))
        elif operation == "BUILD":  # attributes, such as a state dict's `_metadata`
            self.stack.pop()
        elif operation not in ("PROTO", "FRAME"):
            raise UserError(
                f"its pickle has the operation {operation}, which tensors do not need; save only the state dict"
            )

    def _popped(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("a pickle that takes more than it has")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def _marked(self) -> list[Any]:
        return self._popped(len(self.stack) - self._marks.pop())


def _unpickled(data: bytes, storage: Callable[[Any], np.ndarray]) -> Any:
    """The content of a pickle; `storage` gives the values of a storage from its reference."""
    machine = _Machine(storage)
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "STOP":
            return machine.stack.pop()
        machine.run(operation.name, argument)
    raise ValueError("a pickle without an end")


def _known(module: Any, name: Any) -> _Global:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a class without a name")
    found = _Global(module, name)
    if found in (_ORDERED_DICT, _TENSOR, _PARAMETER) or (module == "torch" and name.endswith("Storage")):
        return found
    raise UserError(
        f"contains {shown(f'{module}.{name}')}, which is not a tensor: loading it could run code. If you trust the "
        "file, run in PyTorch torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE), or with another key"
    )


def _add_items(items: list[Any], to: Any) -> None:
    """Adds keys and values that alternate; keys are plain, because hashing nested tuples may take for ever."""
    keys, values = items[::2], items[1::2]
    if not isinstance(to, dict) or len(keys) != len(values):
        raise ValueError("items for no dict")
    for key in keys:
        if not isinstance(key, str | int | float | None):
            raise UserError(f"a dict has a key of type {type(key).__name__}; save only the state dict")
    to.update(zip(keys, values, strict=True))


def _made(function: Any, arguments: Any) -> Any:
    """The result of the three calls that tensors need."""
    if not (isinstance(function, _Global) and isinstance(arguments, tuple) and len(arguments) <= 8):
        raise ValueError("a call of no function")
    if function == _ORDERED_DICT and not arguments:
        return {}
    if function == _TENSOR:
        return _tensor(*arguments)
    if function == _PARAMETER and arguments:
        return arguments[0]
    raise UserError(f"contains {function.name} with values in it; save only the state dict")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A strided view of the storage; bounds are checked here because NumPy would read beyond them."""
    if not (isinstance(storage, np.ndarray) and isinstance(size, tuple) and len(size) <= 32):
        raise ValueError("a tensor without storage or shape")
    if not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *size, *stride)):
        raise ValueError("a tensor with a negative or very large size")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and last >= len(storage):
        raise ValueError("a tensor extends beyond its storage")
    if count > max(len(storage), _MOST_REPEATED):
        raise UserError(
            f"a tensor of shape {size} repeats the {len(storage)} values of its storage; save it again as "
            "tensor.contiguous()"
        )
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
