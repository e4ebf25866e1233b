"""Reads weight files: .npz, .safetensors, and PyTorch's .pth, .pt or .bin without executing code from the pickle.

Tensors keep the file's dtype, bfloat16 included. Files come from the internet: whatever their bytes, reading gives
tensors or one line, in time and memory that are proportional to the file.
"""

from collections.abc import Callable, Mapping
import io
import json
import warnings

import jax.numpy as jnp
import numpy as np
import safetensors

from taskexpert_jax import storage
from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.pretrained import torch_files
from taskexpert_jax.pretrained.zipped import Archive
from taskexpert_jax.runs.hub import WEIGHT_SUFFIXES

Tensors = dict[str, np.ndarray]
Metadata = Mapping[str, str]

_SAFETENSORS_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.dtype(jnp.bfloat16),
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")  # the same tensors, if both are there
_LONGEST_NAME = 300


def find(where: str) -> str | None:
    """The weight file: `where` itself, or the one of a folder as of Hugging Face; None for a folder without any.

    Raises:
      UserError: the folder has several weight files, or one that is split into shards.
    """
    folder = storage.path(where)
    try:
        if not folder.is_dir():
            return where
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"config.model.pretrained={where} cannot be read: {error.strerror}") from None
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    chosen = [name for name in _HUGGING_FACE if name in weights][:1] or weights
    if "checkpoints" in names or not chosen:
        return None
    if len(chosen) > 1:
        sharded = any(name.endswith(".index.json") for name in names)
        listed = f"{', '.join(map(shown, chosen[:4]))}{', ...' if len(chosen) > 4 else ''}"
        raise UserError(
            f"config.model.pretrained={where} is a folder with {len(chosen)} weight files ({listed}): "
            + ("save the model in one file (max_shard_size of save_pretrained)" if sharded else "give one of them")
        )
    return str(folder / chosen[0])


def read(where: str) -> tuple[Tensors, Metadata]:
    """The tensors of a file by name, and its metadata (empty unless .safetensors).

    Raises:
      UserError: a missing or damaged file, an unknown format, a file that expands to far more than its size, or a
        PyTorch file with objects other than tensors. The message names the object, and no code of the file is run.
    """
    path = storage.path(where)
    readers: Mapping[str, Callable[[bytes], tuple[Tensors, Metadata]]] = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        **dict.fromkeys((".pth", ".pt", ".bin"), _read_torch),
    }
    if path.suffix not in readers:
        raise UserError(
            f"config.model.pretrained={where}: give a file ending in {', '.join(WEIGHT_SUFFIXES)}, a folder with such "
            "a file, or the directory of a run of this project (with config.json and checkpoints/)"
        )
    try:
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise UserError(f"config.model.pretrained={where} cannot be read: {_reason(error)}") from None
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{where} is a Git LFS pointer, not the file itself: fetch the file (git lfs pull)")
    try:
        tensors, metadata = readers[path.suffix](data)
        unprintable = [name for name in tensors if not name.isprintable() or len(name) > _LONGEST_NAME]
        if unprintable:
            raise UserError(f"the name of a tensor is no name: {shown(unprintable[0])}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # decoders of damaged files raise anything
        raise UserError(
            f"{where} is damaged or not a {path.suffix} file ({_reason(error)}): download it again"
        ) from None
    return tensors, metadata


def _reason(error: Exception) -> str:
    """An exception in a few words of one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next(iter(text.splitlines()), "") if not isinstance(error, KeyError) else f"no entry {error}"
    return "".join(letter if letter.isprintable() else "?" for letter in first[:200]) or type(error).__name__


def _read_npz(data: bytes) -> tuple[Tensors, Metadata]:
    with Archive(data, stored=False) as archive:
        return {name.removesuffix(".npy"): _array(name, archive.read(name)) for name in archive.names}, {}


def _array(name: str, content: bytes) -> np.ndarray:
    """The array of an .npy file: a view, because NumPy's reader allocates whatever size the header states."""
    stream = io.BytesIO(content)
    if not content.startswith(np.lib.format.MAGIC_PREFIX):
        raise UserError(f"contains {shown(name)}, which is not a NumPy array")
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise UserError(f"{shown(name)} is of the .npy version {version}, which weights do not need; save it again")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings(action="ignore"):  # of headers that look as if written by Python 2
        shape, by_column, dtype = read_header(stream)
    if min(shape, default=0) < 0:
        raise ValueError("an array of negative size")
    if dtype.kind not in "fiubcV" or dtype.fields is not None or dtype.itemsize == 0:
        raise UserError(f"{shown(name)} has dtype {shown(dtype)}, which is not a number")
    return np.ndarray(shape, dtype, content, stream.tell(), order="F" if by_column else "C")


def _read_safetensors(data: bytes) -> tuple[Tensors, Metadata]:
    tensors = {}
    for name, of in safetensors.deserialize(data):
        if of["dtype"] not in _SAFETENSORS_TYPES:
            raise UserError(
                f"tensor {shown(name)} has dtype {shown(of['dtype'])}; supported: {', '.join(_SAFETENSORS_TYPES)}"
            )
        tensors[name] = np.frombuffer(of["data"], _SAFETENSORS_TYPES[of["dtype"]]).reshape(of["shape"])
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return tensors, header.get("__metadata__") or {}


def _read_torch(data: bytes) -> tuple[Tensors, Metadata]:
    return torch_files.read(data), {}
