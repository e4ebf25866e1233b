"""MATLAB files: equal to what SciPy reads; damage that ends SciPy in a segmentation fault is an error."""

from collections.abc import Callable
import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io

from input_pipeline import matlab

HEADER = b"MATLAB 5.0".ljust(124) + b"\0\1IM"


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def head(of_class: int, name: bytes) -> bytes:
    """Flags, dimensions 1x1 and name of a matrix."""
    return element(6, struct.pack("<II", of_class, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, name)


def nested(depth: int) -> bytes:
    """A variable `a`: cells in cells, and a number in the innermost."""
    content = b"".join([head(6, b""), element(9, struct.pack("<d", 7))])
    parts = [content]
    size = len(content)
    for _ in range(depth - 1):
        tag, cell = struct.pack("<II", 14, size), head(1, b"")
        parts.append(cell + tag)
        size += len(cell + tag)
    inner = struct.pack("<II", 14, size) + b"".join(reversed(parts))
    return HEADER + element(14, head(1, b"a") + inner)


def packed(content: bytes) -> bytes:
    """The file with its variable compressed."""
    plain = zlib.compress(content[128:])
    return HEADER + struct.pack("<II", 15, len(plain)) + plain


def written(values: object, *, do_compression: bool = False) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, {"b": 1.5, "a": values}, do_compression=do_compression)
    return file.getvalue()


def assert_same(ours: np.ndarray, other: np.ndarray) -> None:
    """Equal to SciPy's array; text has one character per element, SciPy's one string per row."""
    if other.dtype.kind == "U":
        assert "".join(ours.ravel()) == "".join(other.ravel())
        return
    assert ours.shape == other.shape and ours.dtype == other.dtype
    if other.dtype.kind != "O" and not other.dtype.names:
        np.testing.assert_array_equal(ours, other)
    for mine, theirs in zip(ours.flat, other.flat, strict=True) if other.dtype.hasobject else ():
        for field in other.dtype.names or (...,):
            assert_same(mine if field is ... else mine[field], theirs if field is ... else theirs[field])


@pytest.mark.parametrize("do_compression", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        np.arange(12, dtype=np.uint16).reshape(3, 4),
        np.float32([[[0.5, np.nan], [2, 3]]]),
        np.zeros((0, 0)),
        np.array([[True, False]]),
        "grün",
        np.array([["text", np.eye(2)], [np.zeros((0, 3)), np.int8([[1]])]], object),
        {"name": "head", "mask": np.eye(3, dtype=np.uint8), "in": {"other": 7}},
        np.array([[(1, "x"), (2, "yy"), (3, "")]], [("number", object), ("text", object)]),
    ],
)
def test_variables_equal_those_of_scipy(values: object, do_compression: bool) -> None:
    content = written(values, do_compression=do_compression)
    found = matlab.read_variable(content, "a")
    assert found is not None and matlab.read_variable(content, "c") is None
    assert_same(found, scipy.io.loadmat(io.BytesIO(content))["a"])


def test_cells_in_cells_are_read_up_to_the_limit() -> None:
    found = matlab.read_variable(nested(32), "a")
    for _ in range(32):
        assert found is not None
        found = found[0, 0]
    assert found == 7


@pytest.mark.parametrize("form", [bytes, packed])
def test_cells_nested_too_deeply_are_refused(form: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ValueError, match="more than 32 levels"):
        matlab.read_variable(form(nested(20_000)), "a")


def test_numbers_of_an_unknown_type_are_refused() -> None:
    content = written(np.uint8([[1, 2, 3, 4, 5, 6, 7, 8, 9]]))
    assert content.count(struct.pack("<II", 2, 9)) == 1
    with pytest.raises(ValueError, match="unknown type 128"):
        matlab.read_variable(content.replace(struct.pack("<II", 2, 9), struct.pack("<II", 128, 9)), "a")


def test_a_small_file_that_expands_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = written(np.zeros((1000, 1000)), do_compression=True)
    assert len(content) < 10_000
    monkeypatch.setattr(matlab, "MOST_BYTES", 2**20)
    with pytest.raises(ValueError, match="holds more than 1 MiB"):
        matlab.read_variable(content, "a")
    first = len(zlib.decompress(content[136 : 136 + struct.unpack_from("<I", content, 132)[0]]))
    monkeypatch.setattr(matlab, "MOST_BYTES", first)  # nothing is left for the second variable
    with pytest.raises(ValueError, match="holds more than"):
        matlab.read_variable(content, "a")
    matrices = HEADER + element(14, head(1, b"a") + struct.pack("<II", 14, 0) * 100_001)
    assert len(packed(matrices)) < 10_000
    monkeypatch.undo()
    with pytest.raises(ValueError, match="more than 100000 matrices"):
        matlab.read_variable(packed(matrices), "a")
