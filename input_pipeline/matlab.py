"""Reader of MATLAB files of version 5: real arrays, text, cells and structs.

SciPy's reader ends the process with a segmentation fault on some damaged files, and on cells that are nested deeply.
Format: "MAT-File Format", The MathWorks, version 5; the arrays equal those of `scipy.io.loadmat`, text apart, which
stays an array of characters.
"""

from collections.abc import Iterator
import math
import struct
from typing import NamedTuple
import zlib

import numpy as np

from taskexpert_jax.images import decoder_errors

MOST_BYTES = 2**29  # of a file, decompressed; an image of PASCAL-Part with a hundred parts has 20 MB
MOST_MATRICES = 100_000  # of a compressed variable; each takes some hundred bytes as an array
MOST_LEVELS = 32  # of cells and structs in each other; PASCAL-Part has 3
_HEADER = 128  # bytes
# Types of elements.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_ORDERS = {"<": "-le", ">": "-be"}  # in the names of UTF-16 and 32
# Classes of matrices.
_CELL, _STRUCT, _CHAR, _FIRST_NUMERIC, _LAST_NUMERIC = 1, 2, 4, 6, 15
_IS_COMPLEX = 0x800

Elements = Iterator[tuple[int, memoryview]]  # types and contents


class _Head(NamedTuple):
    of_class: int
    shape: tuple[int, ...]
    name: str


def read_variable(content: bytes, name: str) -> np.ndarray | None:
    """Variable `name` of a file, None if there is none; structs are arrays with fields, cells arrays of objects.

    Raises:
      ValueError: another kind of file, a damaged one, or one beyond the limits above.
    """
    with decoder_errors():
        order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(content[124:_HEADER])
        if order is None:
            raise ValueError("is no MATLAB file of version 5")
        for variable in _variables(memoryview(content)[_HEADER:], order):
            elements = _elements(variable, order)
            head = _head(elements, order)
            if head.name == name:
                return _value(head, elements, order, 0)
        return None


def _variables(content: memoryview, order: str) -> Iterator[memoryview]:
    """Contents of the file's variables, decompressed."""
    size = 0
    while content:
        kind, length = struct.unpack_from(f"{order}II", content)
        variable, content = content[8 : 8 + length], content[8 + length :]
        if len(variable) < length:
            raise ValueError("is cut short")
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()
            plain = stream.decompress(variable, max(MOST_BYTES - size, 1))  # 0 would be no limit
            if not stream.eof or stream.unused_data:
                raise ValueError(f"is damaged, or holds more than {MOST_BYTES >> 20} MiB")
            if plain.count(struct.pack(f"{order}I", _MATRIX)) > MOST_MATRICES:
                raise ValueError(f"holds more than {MOST_MATRICES} matrices")
            size += len(plain)
            kind, length = struct.unpack_from(f"{order}II", plain)
            variable = memoryview(plain)[8:]
        if kind != _MATRIX or length != len(variable):
            raise ValueError("has a variable that is no matrix")
        yield variable


def _elements(content: memoryview, order: str) -> Elements:
    """Elements that follow each other in a matrix."""
    at = 0
    while at < len(content):
        kind, length = struct.unpack_from(f"{order}II", content, at)
        start, after = at + 8, at + 8 + length + -length % 8
        if kind >> 16:  # up to 4 bytes of content in the tag itself
            kind, length, start, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if start + length > len(content) or start + length > after:
            raise ValueError("is cut short")
        yield kind, content[start : start + length]
        at = after


def _next(elements: Elements) -> tuple[int, memoryview]:
    found = next(elements, None)
    if found is None:
        raise ValueError("has a matrix without content")
    return found


def _numbers(elements: Elements, order: str) -> np.ndarray:
    kind, content = _next(elements)
    if kind not in _NUMBERS:
        raise ValueError(f"has numbers of the unknown type {kind}")
    return np.frombuffer(content, f"{order}{_NUMBERS[kind]}")


def _head(elements: Elements, order: str) -> _Head:
    flags, _ = _numbers(elements, order).tolist()
    if flags & _IS_COMPLEX:
        raise ValueError("has complex numbers")
    shape = tuple(_numbers(elements, order).tolist())
    if not shape or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"has a matrix of shape {shape[:9]}")
    return _Head(flags & 0xFF, shape, bytes(_next(elements)[1]).decode("latin-1"))


def _value(head: _Head, elements: Elements, order: str, level: int) -> np.ndarray:
    """Value of a matrix, whose further elements are given."""
    if level > MOST_LEVELS:
        raise ValueError(f"has cells and structs of more than {MOST_LEVELS} levels")
    if head.of_class in (_CELL, _STRUCT):
        fields = _fields(elements, order) if head.of_class == _STRUCT else [""]
        children = [_child(kind, content, order, level) for kind, content in elements]
        if len(children) != math.prod(head.shape) * len(fields):
            raise ValueError(f"has {len(children)} values in a matrix of shape {head.shape}")
        found = np.empty(len(children), object)
        found[:] = children
        columns = [found[number :: len(fields)].reshape(head.shape, order="F") for number in range(len(fields))]
        if head.of_class == _CELL:
            return columns[0]
        struct_array = np.empty(head.shape, [(field, object) for field in fields])
        for field, column in zip(fields, columns, strict=True):
            struct_array[field] = column
        return struct_array
    if head.of_class == _CHAR:
        kind, content = _next(elements)
        coding = _TEXTS[kind] + (_ORDERS[order] if _TEXTS[kind] in ("utf-16", "utf-32") else "")
        return np.array(list(bytes(content).decode(coding)), "U1").reshape(head.shape, order="F")
    if _FIRST_NUMERIC <= head.of_class <= _LAST_NUMERIC:
        return _numbers(elements, order).reshape(head.shape, order="F")
    raise ValueError(f"has a matrix of the class {head.of_class}, no numbers, text, cells or structs")


def _child(kind: int, content: memoryview, order: str, level: int) -> np.ndarray:
    if kind != _MATRIX:
        raise ValueError("has a value that is no matrix")
    if not content:
        return np.zeros((0, 0))
    elements = _elements(content, order)
    return _value(_head(elements, order), elements, order, level + 1)


def _fields(elements: Elements, order: str) -> list[str]:
    """Names of a struct's fields, which are stored with equal lengths."""
    (length,) = _numbers(elements, order).tolist()
    names = bytes(_next(elements)[1])
    if not 0 < length <= 64 or len(names) % length:
        raise ValueError("has fields without names")
    return [names[at : at + length].partition(b"\0")[0].decode("latin-1") for at in range(0, len(names), length)]
