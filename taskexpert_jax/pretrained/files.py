"""Reads weight files: .npz, .safetensors, and PyTorch's .pth, .pt or .bin without executing code from the pickle.

Paths are local or `gs://` (through etils.epath). Tensors keep the file's dtype, bfloat16 included.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
import io
import json
import math
import pickle
from typing import Any, NamedTuple
import zipfile

from etils import epath
import jax.numpy as jnp
import numpy as np
import safetensors

from taskexpert_jax.errors import UserError

Tensors = dict[str, np.ndarray]
Metadata = Mapping[str, str]

_BFLOAT16 = np.dtype(jnp.bfloat16)
_SAFETENSORS_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": _BFLOAT16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_TORCH_TYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip

# Keys of the tensors in a PyTorch file that holds more than a state dict.
_STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")


class Refused(Exception):
    """Raised for a file whose content is not only tensors, or in a form that is not supported."""


class Input(NamedTuple):
    """Input that a file's model was trained with; None where it is not recorded.

    mean, std: per channel, for RGB in [0, 1]. size: height and width in pixels. source: where this is recorded.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    source: str = ""


def read(where: str) -> tuple[Tensors, Metadata]:
    """The tensors of a file by name, and its metadata (empty unless .safetensors).

    Raises:
      UserError: a missing or damaged file, an unknown format, or a PyTorch file with objects other than tensors. The
        message names the object, and no code of the file is run.
    """
    path = epath.Path(where)
    readers: Mapping[str, Callable[[bytes], tuple[Tensors, Metadata]]] = {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        **dict.fromkeys((".pth", ".pt", ".bin"), _read_torch),
    }
    if path.suffix not in readers:
        raise UserError(
            f"config.model.pretrained={where}: give a file ending in {', '.join(readers)}, or the directory of a run "
            "of this project (with config.json and checkpoints/)"
        )
    try:
        data = path.read_bytes()
    except (OSError, ImportError) as error:
        raise UserError(f"config.model.pretrained={where} cannot be read: {error}") from None
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{where} is a Git LFS pointer, not the file itself: fetch the file (git lfs pull)")
    try:
        return readers[path.suffix](data)
    except Refused as error:
        raise UserError(f"{where}: {error}") from None
    except (zipfile.BadZipFile, safetensors.SafetensorError, pickle.UnpicklingError, ValueError, KeyError, EOFError,
            TypeError, IndexError, AttributeError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} is damaged or not a {path.suffix} file ({reason}): download it again") from None


def _read_npz(data: bytes) -> tuple[Tensors, Metadata]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}, {}


def _read_safetensors(data: bytes) -> tuple[Tensors, Metadata]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {}
    for name, of in safetensors.deserialize(data):
        if of["dtype"] not in _SAFETENSORS_TYPES:
            raise Refused(f"tensor {name} has dtype {of['dtype']}; supported: {', '.join(_SAFETENSORS_TYPES)}")
        tensors[name] = np.frombuffer(of["data"], _SAFETENSORS_TYPES[of["dtype"]]).reshape(of["shape"])
    return tensors, header.get("__metadata__", {})


def _read_torch(data: bytes) -> tuple[Tensors, Metadata]:
    if not data.startswith(b"PK"):
        raise Refused(
            "not in PyTorch's zip format: saved before PyTorch 1.6, or not by PyTorch; load it in PyTorch and save its "
            "state dict again"
        )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (index,) = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        folder = index.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise Refused("written on a big-endian machine; save it again on a little-endian one")
        content = _TensorUnpickler(archive, folder).load()
    return _state_dict(content), {}


def _state_dict(content: Any) -> Tensors:
    """The dict of tensors in a PyTorch file's content, which may be nested in other dicts."""
    while isinstance(content, dict) and not any(isinstance(value, np.ndarray) for value in content.values()):
        inner = [key for key in _STATE_DICT_KEYS if isinstance(content.get(key), dict)]
        if len(inner) != 1:
            keys = ", ".join(map(str, list(content)[:8])) or "none"
            raise Refused(
                f"no tensors at the top level, and not exactly one of the keys {', '.join(_STATE_DICT_KEYS)} but "
                f"{len(inner)} (keys: {keys}); save only the state dict"
            )
        content = content[inner[0]]
    if not isinstance(content, dict):
        raise Refused(f"contains a {type(content).__name__}, not a dict of tensors; save only the state dict")
    other = [str(name) for name, value in content.items() if not isinstance(value, np.ndarray)]
    if other:
        raise Refused(f"entries that are not tensors: {', '.join(other[:4])}; save only the state dict")
    return {str(name): value for name, value in content.items()}


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler for dicts and tensors only; every other class or function is refused, so no foreign code can run."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """Our replacement for a PyTorch class or function of the pickle; raises Refused for all others."""
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _TORCH_TYPES:
            return name  # a string, because a pickle can modify any mutable object that it gets
        raise Refused(
            f"contains {module}.{name}, which is not a tensor: loading it could run code. If you trust the file, run "
            "in PyTorch torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE), or with another key"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, kind, key, _, count = pid
        storage = np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), _TORCH_TYPES[kind])
        if len(storage) < count:
            raise ValueError(f"storage {key} has {len(storage)} of {count} values")
        return storage


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """A copy of a strided view of the storage; bounds are checked here because NumPy would read beyond them."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset < 0 or min((*size, *stride), default=0) < 0 or (math.prod(size) and last >= len(storage)):
        raise ValueError("a tensor extends beyond its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False).copy()


def _rebuild_parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


def described_input(where: str, metadata: Metadata) -> Input:
    """Mean, std and image size from a file's metadata, or from the JSON of timm or Hugging Face in the same folder.

    Raises:
      UserError: malformed JSON.
    """
    folder = epath.Path(where).parent
    embedded = {key: metadata[key] for key in ("mean", "std", "input_size", "pretrained_cfg") if key in metadata}
    if embedded:
        return _input(_json("{" + ", ".join(f'"{k}": {v}' for k, v in embedded.items()) + "}", where), "metadata")
    for name in ("preprocessor_config.json", "config.json"):
        path = folder / name
        if path.exists():
            found = _input(_json(path.read_text(), str(path)), name)
            if found.mean:
                return found
    return Input()


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None


def _input(fields: Mapping[str, Any], source: str) -> Input:
    """Input from timm's fields (mean, std, input_size, or in pretrained_cfg) or Hugging Face's (image_mean, ...)."""
    fields = fields.get("pretrained_cfg") or fields
    mean, std = (fields.get(name) or fields.get(f"image_{name}") for name in ("mean", "std"))
    size: Any = fields.get("input_size") or fields.get("crop_size") or fields.get("size")
    if isinstance(size, Mapping):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
    size = (size, size) if isinstance(size, int) else tuple(size[-2:]) if size else None
    return Input(tuple(mean) if mean else None, tuple(std) if std else None, size, source)
