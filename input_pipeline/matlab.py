"""MATLAB files of version 5, read by SciPy after a check of what SciPy's compiled reader does not survive."""

import io
import struct
from typing import Any
import warnings
import zlib

import numpy as np
import scipy.io

from taskexpert_jax.images import decoder_errors

MOST_BYTES = 2**29  # of a file, decompressed; an image of PASCAL-Part with a hundred parts has 20 MB
MOST_CONTAINERS = 500  # cells and structs of a file; SciPy's reader recurses, and at some 5000 levels the stack ends
warnings.filterwarnings("ignore", category=scipy.io.matlab.MatReadWarning)  # names no file: a variable occurs twice
_HEADER, _TAG = 128, 8  # bytes of the file header and of an element's tag
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_CONTAINERS = (1, 2, 3, 16, 17)  # classes of matrices that hold others: cell, struct, object, function, opaque


def read_variable(content: bytes, name: str) -> np.ndarray | None:
    """Variable `name` of a MATLAB file, structs as arrays of objects by field; None if the file has none of that name.

    Raises:
      ValueError: another kind of file, a damaged one, or one beyond the limits above.
    """
    with decoder_errors():
        order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(content[124:_HEADER])
        if order is None:
            raise ValueError("is no MATLAB file of version 5")
        plain = _decompressed(content, order)
        if _containers(plain, order) > MOST_CONTAINERS:
            raise ValueError(f"has more than {MOST_CONTAINERS} cells and structs")
        stored: dict[str, Any] = scipy.io.loadmat(io.BytesIO(plain), variable_names=[name])
        found = stored.get(name)
        if found is not None and not isinstance(found, np.ndarray):
            raise ValueError(f"{name} cannot be read")  # SciPy returns a text about it
        return found


def _decompressed(content: bytes, order: str) -> bytes:
    """The file with its compressed variables replaced by what they hold."""
    parts, at, size = [content[:_HEADER]], _HEADER, 0
    while at < len(content):
        kind, length = struct.unpack_from(f"{order}II", content, at)
        end = at + _TAG + length
        if end > len(content):
            raise ValueError("is cut short")
        if kind == _COMPRESSED:
            stream = zlib.decompressobj()
            parts.append(stream.decompress(content[at + _TAG : end], MOST_BYTES - size))
            if not stream.eof or stream.unused_data:
                raise ValueError(f"is damaged, or holds more than {MOST_BYTES >> 20} MiB")
        else:
            parts.append(content[at:end])
        size += len(parts[-1])
        at = end
    return b"".join(parts)


def _containers(plain: bytes, order: str) -> int:
    """Upper bound of the number of matrices that hold others, wherever they stand: the sizes of a file may lie."""
    tag = struct.pack(f"{order}I", _MATRIX)
    to_class = 2 * _TAG + (0 if order == "<" else 3)  # from a matrix's tag to the byte of its class
    count, at = 0, plain.find(tag, _HEADER)
    while at >= 0 and count <= MOST_CONTAINERS:
        count += plain[at + to_class : at + to_class + 1] in {bytes([number]) for number in _CONTAINERS}
        at = plain.find(tag, at + 1)
    return count
