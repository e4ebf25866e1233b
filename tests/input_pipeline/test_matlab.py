"""MATLAB files: what SciPy's reader does not survive is refused before it reads."""

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


def nested(depth: int, *, honest: bool = True) -> bytes:
    """A variable `a`, cells in cells; unless honest, each says that it is 8 bytes long."""
    inner = head(6, b"") + element(9, struct.pack("<d", 7))
    cell = head(1, b"")
    tags = [struct.pack("<II", 14, len(inner) + level * (8 + len(cell)) if honest else 8) for level in range(depth)]
    content = head(1, b"a") + (b"".join(tag + cell for tag in reversed(tags[1:])) + tags[0]) + inner
    return HEADER + element(14, content)


def written(*, do_compression: bool, **variables: object) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=do_compression)
    return file.getvalue()


def test_cells_in_cells_are_read_up_to_the_limit() -> None:
    found = matlab.read_variable(nested(100), "a")
    for _ in range(100):
        assert found is not None
        found = found[0, 0]
    assert found == 7


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("compressed", [True, False])
def test_cells_nested_too_deeply_are_refused(honest: bool, compressed: bool) -> None:
    content = nested(20_000, honest=honest)  # a segmentation fault of SciPy
    if compressed:
        packed = zlib.compress(content[128:])
        content = HEADER + struct.pack("<II", 15, len(packed)) + packed
    with pytest.raises(ValueError, match="more than 500 cells and structs"):
        matlab.read_variable(content, "a")


def test_a_small_file_that_expands_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = written(do_compression=True, a=np.zeros((1000, 1000)))
    assert len(content) < 10_000
    monkeypatch.setattr(matlab, "MOST_BYTES", 2**20)
    with pytest.raises(ValueError, match="holds more than 1 MiB"):
        matlab.read_variable(content, "a")


@pytest.mark.parametrize("do_compression", [True, False])
def test_one_variable_of_several_is_read(do_compression: bool) -> None:
    content = written(do_compression=do_compression, b=np.eye(3), a=np.uint8([[1, 2]]))
    np.testing.assert_array_equal(matlab.read_variable(content, "a"), [[1, 2]])
    np.testing.assert_array_equal(matlab.read_variable(content, "b"), np.eye(3))
    assert matlab.read_variable(content, "c") is None
