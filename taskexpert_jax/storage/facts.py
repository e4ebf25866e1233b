"""Metadata of objects."""

from typing import NamedTuple


class Facts(NamedTuple):
    """Metadata of an object that the store keeps: size in bytes, CRC-32C, time of the last write, generation."""

    size: int
    crc32c: int
    updated: float  # seconds since 1970, by the store's clock
    generation: int
