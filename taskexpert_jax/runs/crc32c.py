"""CRC-32C, the checksum that object stores keep of each object, of files on a disk."""

import pathlib
from typing import Any

import numba
import numpy as np

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed
_BLOCK = 1 << 22  # bytes read at a time


def of_file(path: pathlib.Path) -> int:
    """CRC-32C of a file's content.

    Raises:
      OSError: it cannot be read.
    """
    value: Any = np.uint32(0xFFFFFFFF)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = _updated(value, np.frombuffer(block, np.uint8), _TABLE)
    return int(value) ^ 0xFFFFFFFF


def _table() -> np.ndarray:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(_POLYNOMIAL), values >> 1)
    return values


_TABLE = _table()


@numba.njit(cache=True)
def _updated(value: Any, data: np.ndarray, table: np.ndarray) -> Any:  # np.uint32
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ (value >> np.uint32(8))
    return value
