"""Weight files that are damaged, hostile or of another form get one line; nothing of them is run."""

import json
import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.pretrained import files as weight_files
from taskexpert_jax.pretrained import recorded
from tests.pretrained import weight_layouts
from tests.pretrained.tiny_vit import VIT, WRITERS, read


class Attack:
    """A malicious pickle: creates a directory when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pth_file_runs_no_code(tmp_path):
    trace = tmp_path / "trace"
    weight_layouts.write_torch(tmp_path / "x.pth", {"model": {"a": np.ones(1)}, "args": Attack(str(trace))})
    with pytest.raises(UserError, match=r"x\.pth.*\w+\.mkdir"):
        read(tmp_path / "x.pth")
    assert not trace.exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    for size, stride in (((2,), (1000,)), ((-1,), (1,)), ((9,), (1,))):
        weight_layouts.write_torch(tmp_path / "x.pth", {"a": np.ones(8)}, sizes={"a": (size, stride)})
        with pytest.raises(UserError, match=r"x\.pth"):
            weight_files.read(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, r"x\.pth.*\ba\b"),
        ({"model": {"a": np.ones(1)}, "state_dict": {"a": np.ones(1)}}, r"state_dict.*\b2\b"),
        ([1], r"x\.pth.*\blist\b"),
        ({"a": np.ones(1), "epoch": 3}, r"\bepoch\b"),
    ],
)
def test_pth_files_of_other_things_are_refused(content, message, tmp_path):
    weight_layouts.write_torch(tmp_path / "x.pth", content)
    with pytest.raises(UserError, match=message):
        weight_files.read(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.pth", b"\x80\x02\x8a", r"x\.pth.*\b1\.6\b"),
        ("x.pth", b"PK\x03\x04", r"x\.pth"),
        ("x.npz", b"PK\x03\x04", r"x\.npz"),
        ("x.safetensors", b"\xff" * 20, r"x\.safetensors"),
        ("x.safetensors", b"", r"x\.safetensors"),
        ("x.npz", b"version https://git-lfs.github.com/spec/v1", r"x\.npz.*git lfs pull"),
        ("x.h5", b"", r"\.npz, \.safetensors, \.pth, \.pt, \.bin"),
    ],
)
def test_damaged_files_and_other_formats_get_one_line(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as refusal:
        read(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused(tmp_path):
    for name in ("augreg.npz", "timm.pth", "timm.safetensors"):
        WRITERS[name](tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_no_file_there(tmp_path):
    with pytest.raises(UserError, match=r"pretrained=.*nothing\.npz.*No such file"):
        read(tmp_path / "nothing.npz")


def test_directories_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.npz, \.safetensors"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        read(tmp_path)


# --- hostile files ---


def npz(path, members, **options):
    """An .npz with `members`: name -> bytes of the .npy file."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(header, data=b""):
    """An .npy file of version 1.0 with this text as its header."""
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data


def pth(path, pickled):
    """A PyTorch file with one storage of four values and this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())


# The pickle's persistent id of that storage.
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0\x30X\3\0\0\0cpuK\4tQ"


def tensor(size, stride):
    """A pickled tensor of that storage; size and stride are pickled tuples."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\0" + size + stride + b"\x89}tR"


def peak_of_refusal(path, message):
    """Refusal of a file by `message`; the most memory that this took, in MiB."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as refusal:
            weight_files.read(str(path))
        assert "\n" not in str(refusal.value)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_a_good_pickle_of_this_file_is_read(tmp_path):
    pth(tmp_path / "x.pth", b"\x80\2}X\1\0\0\0a" + tensor(b"K\2K\2\x86", b"K\1K\2\x86") + b"s.")
    tensors, _ = weight_files.read(str(tmp_path / "x.pth"))
    np.testing.assert_array_equal(tensors["a"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"}q\0X\5\0\0\0modelh\0s.", "nested"),  # a dict that contains itself
        (b"(" * 20_000 + b"l" * 20_000 + b".", "x.pth"),
        (b"]" * 20_000 + b"a" * 19_999 + b".", "contains a list"),
        (b"]r\xff\xff\xff\x7f.", "contains a list"),  # memo of 2^31 entries, for Python's unpickler
        (b"\x96" + (2**40).to_bytes(8, "little") + b".", "x.pth"),  # a bytearray of 1 TiB
        (b"}K\0" + b"q\0h\0\x86" * 60 + b"Ns.", "key of type tuple"),  # hashing it takes 2^60 steps
        (b"(" + b"K\0" + b"q\0h\0\x86" * 60 + b"tQ.", "x.pth"),  # as a reference to a storage
        (b"K\0" + b"q\0h\0\x86" * 60 + b"q\1h\1\x93.", "x.pth"),  # as the name of a class
        (b"}X\1\0\0\0a" + tensor(b"J\0\0\0\x7f\x85", b"K\0\x85") + b"s.", "repeats the 4 values"),  # 8 GiB
        (b"}X\1\0\0\0a" + tensor(b"\x8a\x09" + b"\1" * 9 + b"\x85", b"K\0\x85") + b"s.", "64 bits"),
        (b"}X\3\0\0\0a\nbNs.", r"'a\\nb'"),
        (b"}X\1\0\0\0\n" + tensor(b"K\2\x85", b"K\1\x85") + b"s.", "name of a tensor"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aNsb.", "_Global"),  # an attribute of our function
        (b"c__builtin__\neval\n(X\1\0\0\x001tR.", r"__builtin__\.eval"),
        (b"(X\1\0\0\x001i__builtin__\neval\n.", "INST"),
        (b"X\2\0\0\0osX\6\0\0\0system\x93X\1\0\0\x001\x85R.", r"os\.system"),
        (b"\x82\1.", "EXT1"),
        (b"s.", "x.pth"),
        (b"0.", "x.pth"),
        (b"", "x.pth"),
    ],
)
def test_pickles_that_ask_for_too_much_are_refused_at_no_cost(pickled, message, tmp_path):
    pth(tmp_path / "x.pth", pickled)
    assert peak_of_refusal(tmp_path / "x.pth", message) < 20


def test_files_that_expand_are_refused_before_they_do(tmp_path):
    zeros = bytes(48 * 2**20)
    npz(tmp_path / "x.npz", {"a.npy": npy(b"", zeros)}, compression=zipfile.ZIP_DEFLATED, compresslevel=1)
    data = (tmp_path / "x.npz").read_bytes()
    assert peak_of_refusal(tmp_path / "x.npz", "expands from .* MiB to 48 MiB.*numpy.savez") < 2
    # The same with a directory that states 100 bytes.
    stated, actual = (100).to_bytes(4, "little"), (len(zeros) + 10).to_bytes(4, "little")
    assert data.count(actual) == 2
    (tmp_path / "x.npz").write_bytes(data.replace(actual, stated))
    assert peak_of_refusal(tmp_path / "x.npz", "damaged") < 2


def test_headers_that_state_more_than_there_is_are_refused_at_no_cost(tmp_path):
    for header in (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        b"{'descr': '<U1000000000', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000,)}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        b"(" * 9000,
        b"{'descr': ",
        b"\xff",
    ):
        npz(tmp_path / "x.npz", {"a.npy": npy(header, bytes(8))})
        assert peak_of_refusal(tmp_path / "x.npz", r"x\.npz") < 10
    npz(tmp_path / "x.npz", {"readme.txt": b"text"})
    peak_of_refusal(tmp_path / "x.npz", "readme.txt', which is not a NumPy array")


def test_archives_that_are_encrypted_or_compressed_otherwise_are_refused(tmp_path):
    npz(tmp_path / "x.npz", {"a.npy": b"1"}, compression=zipfile.ZIP_BZIP2)
    assert peak_of_refusal(tmp_path / "x.npz", "another method") < 10
    npz(tmp_path / "x.pth", {"x/data.pkl": b"}."}, compression=zipfile.ZIP_DEFLATED)
    assert peak_of_refusal(tmp_path / "x.pth", "save it again uncompressed") < 10
    npz(tmp_path / "x.npz", {"a.npy": b"1"})
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of encryption
    (tmp_path / "x.npz").write_bytes(data)
    assert peak_of_refusal(tmp_path / "x.npz", "encrypted") < 10
    npz(tmp_path / "x.npz", {"a.npy": b"1", "b.npy": b"1"})
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes().replace(b"b.npy", b"a.npy"))
    assert peak_of_refusal(tmp_path / "x.npz", "same name") < 10


# --- values ---


def test_codes_of_quantised_weights_are_refused_by_name(tmp_path):
    for dtype in (np.int8, np.uint8, np.complex64):
        tensors = weight_layouts.timm(VIT)
        tensors["blocks.1.mlp.fc1.weight"] = tensors["blocks.1.mlp.fc1.weight"].astype(dtype)
        np.savez(tmp_path / "x.npz", **tensors)
        expected = f"! blocks.1.mlp.fc1.weight: {np.dtype(dtype)} in the file: codes of quantised weights?"
        with pytest.raises(UserError, match=re.escape(expected)):
            read(tmp_path / "x.npz")
    tensors = weight_layouts.timm(VIT) | {"head.weight": np.ones(3, np.int8)}  # not used
    np.savez(tmp_path / "x.npz", **tensors)
    read(tmp_path / "x.npz")


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    tensors = weight_layouts.timm(VIT)
    tensors["blocks.1.mlp.fc1.weight"][0, :3] = [np.nan, np.nan, np.inf]
    tensors["pos_embed"] = tensors["pos_embed"].astype(np.float64)
    tensors["pos_embed"][0, 0, 0] = -1e300
    np.savez(tmp_path / "x.npz", **tensors)
    with pytest.raises(UserError) as refusal:
        read(tmp_path / "x.npz", class_token=True)
    assert (
        "x.npz: 2 tensors have values that are not finite in float32: "
        "pos_embed (0 nan, 1 inf), blocks.1.mlp.fc1.weight (2 nan, 1 inf); "
    ) in str(refusal.value)


# --- folders ---


def test_a_folder_of_hugging_face_is_read(tmp_path):
    WRITERS["hugging_face.safetensors"](tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTModel"], "image_size": 64}))
    (tmp_path / "optimizer.pt").write_bytes(b"")
    report = read(tmp_path).report
    assert f"loaded 67 of 67 tensors of {tmp_path}/model.safetensors (Hugging Face ViTModel)" in report


def test_folders_without_the_one_weight_file_are_refused(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"2 weight files \('model-00001-of-00002.*\): give one"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"2 weight files .*: save the model in one file"):
        read(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTModel"], "image_size": 64}))
    with pytest.raises(UserError, match=r"no weight file, and is no run of this project: .*config\.json"):
        read(tmp_path)


# --- JSON next to the file ---


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '["list"]', "null", "1", "[" * 100_000, "\x00", '"mean"', "1" * 5000,
        '{"mean": null}', '{"mean": "0.5", "std": "0.5"}', '{"mean": [0.5], "std": [0.5]}',
        '{"mean": [1, 2, "3"], "std": [1, 1, 1]}', '{"mean": [NaN, 0, 0], "std": [1, 1, 1]}',
        '{"mean": [Infinity, 0, 0], "std": [1, 1, 1]}', '{"mean": [0, 0, 0], "std": [0, 1, 1]}',
        '{"mean": {"a": 1}, "std": {"a": 1}}', '{"pretrained_cfg": [1]}', '{"pretrained_cfg": {"mean": 3}}',
        f'{{"mean": [1{"0" * 400}, 0, 0], "std": [1, 1, 1]}}',
        '{"size": {"height": 3}}', '{"size": {"longest_edge": 3}}', '{"image_size": "64"}', '{"input_size": [[3]]}',
    ],
)  # fmt: skip
def test_json_of_another_form_next_to_the_file_is_no_error(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "preprocessor_config.json").write_text(text)
    assert recorded.recorded_input(str(tmp_path / "x.npz"), {"mean": text, "pretrained_cfg": text}) == recorded.Input()


def test_json_that_cannot_be_read_is_no_error(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"mean": "\xff"}')
    (tmp_path / "preprocessor_config.json").mkdir()
    assert recorded.recorded_input(str(tmp_path / "x.npz"), {}) == recorded.Input()
