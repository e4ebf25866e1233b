"""Seeded mutations of a file's bytes, for tests that damaged files of others end in one line."""

from collections.abc import Callable, Iterator
import re
import struct
import zlib

import numpy as np

# Sizes, counts and offsets that decoders get wrong: ends of ranges, and just beyond them.
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_TEXTS = (b"0", b"-1", b"4" * 30, b"1e999", b"nan", b"null", b"[]", b"{}", b'""', b"\xff\xfe", b"\0", b"\n", b"../..")


def mutations(seed: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Endless variants of the content `seed`, each with one to four edits; equal for equal states of `rng`."""
    while True:
        content = seed
        for _ in range(int(rng.integers(1, 5))):
            edit = _EDITS[int(rng.integers(len(_EDITS)))]
            content = edit(content, rng)
        yield content


def _place(content: bytes, rng: np.random.Generator) -> int:
    """A position; half of them are near the start, where headers are."""
    end = len(content) if rng.random() < 0.5 else min(len(content), 128)
    return int(rng.integers(end + 1))


def _span(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = _place(content, rng)
    return start, min(len(content), start + 2 ** int(rng.integers(0, 9)))


def _flip_bit(content: bytes, rng: np.random.Generator) -> bytes:
    if not content:
        return content
    at = min(_place(content, rng), len(content) - 1)
    return content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]


def _set_number(content: bytes, rng: np.random.Generator) -> bytes:
    size = 2 ** int(rng.integers(4))
    number = _NUMBERS[int(rng.integers(len(_NUMBERS)))] % 256**size
    at = _place(content, rng)
    order = "big" if rng.random() < 0.5 else "little"
    return content[:at] + number.to_bytes(size, order) + content[at + size :]


def _randomise(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = _span(content, rng)
    return content[:start] + rng.bytes(end - start) + content[end:]


def _truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: _place(content, rng)]


def _delete(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = _span(content, rng)
    return content[:start] + content[end:]


def _copy(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = _span(content, rng)
    at = _place(content, rng)
    return content[:at] + content[start:end] + content[at:]


def _repeat(content: bytes, rng: np.random.Generator) -> bytes:
    """Repeats a byte up to 32768 times, such as an opening bracket."""
    at = _place(content, rng)
    return content[:at] + content[at : at + 1] * 2 ** int(rng.integers(4, 16)) + content[at:]


def _set_text(content: bytes, rng: np.random.Generator) -> bytes:
    """Replaces a number or a word in a text."""
    found = list(re.finditer(rb"-?\d[\d.eE+-]*|[A-Za-z_]+|\"[^\"]*\"", content[:65536]))
    if not found:
        return content
    match = found[int(rng.integers(len(found)))]
    return content[: match.start()] + _TEXTS[int(rng.integers(len(_TEXTS)))] + content[match.end() :]


_EDITS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    _flip_bit, _set_number, _randomise, _truncate, _delete, _copy, _repeat, _set_text,
)  # fmt: skip


def with_png_checksums(content: bytes) -> bytes:
    """The content of a PNG file with right checksums, so that a mutation gets beyond them."""
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        if len(body) < 4 + length:
            break
        parts += [content[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(parts) + content[at:]
