"""The input that weights were trained with, as far as their file or the JSON next to it records it.

Nothing depends on these records but a line of the report and the reading of ambiguous position embeddings, so JSON of
another form, or damaged, is no error: nothing is recorded.
"""

from collections.abc import Mapping
import pathlib
from typing import Any, NamedTuple

from taskexpert_jax import json_file, storage
from taskexpert_jax.errors import StoreError

_MOST_BYTES = 8 * 2**20  # of a JSON file; with the names of 21 843 classes it has 2 MB


class Input(NamedTuple):
    """Input that a file's model was trained with; None where it is not recorded.

    mean, std: per channel, for RGB in [0, 1]. size: height and width in pixels. source: where these are recorded.
    model_size: height and width of the images that the model is built for, from the file's metadata or config.json.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    source: str = ""
    model_size: tuple[int, int] | None = None


def recorded_input(where: str, metadata: Mapping[str, str]) -> Input:
    """Mean, std and image sizes from a file's metadata, or from the JSON of timm or Hugging Face in the same folder."""
    folder = storage.path(where).parent
    names = ("preprocessor_config.json", "config.json")
    records = {"metadata": {key: _parsed(text) for key, text in metadata.items()}}
    records |= {name: _read_json(folder / name) for name in names}
    inputs = [_input(fields, source) for source, fields in records.items()]
    found = next((each for each in inputs if each.mean and each.std), Input())
    sizes = [_model_size(records[source]) for source in ("metadata", "config.json")]
    return found._replace(model_size=next((size for size in sizes if size), None))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or none that can be read."""
    try:
        small = path.is_file() and path.stat().st_size <= _MOST_BYTES
        return json_file.parse(path.read_bytes(), dict) if small else {}
    except StoreError:
        raise
    except (OSError, ValueError):
        return {}


def _parsed(text: str) -> Any:
    """The value of a JSON text; None if it is malformed."""
    try:
        return json_file.parse(text.encode())
    except ValueError:
        return None


def _input(record: Mapping[str, Any], source: str) -> Input:
    """Input from timm's fields (mean, std, input_size, or in pretrained_cfg) or Hugging Face's (image_mean, ...)."""
    fields = _fields(record)
    mean, std = (_channels(fields.get(name) or fields.get(f"image_{name}")) for name in ("mean", "std"))
    if std and min(std) <= 0:
        std = None
    sizes = (_size(fields.get(name)) for name in ("input_size", "crop_size", "size"))
    return Input(mean, std, next((size for size in sizes if size), None), source)


def _model_size(record: Mapping[str, Any]) -> tuple[int, int] | None:
    """Image size of timm's fields (input_size) or of Hugging Face's (image_size)."""
    fields = _fields(record)
    return _size(fields.get("input_size")) or _size(fields.get("image_size"))


def _fields(record: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = record.get("pretrained_cfg")
    return inner if isinstance(inner, dict) else record


def _channels(value: Any) -> tuple[float, ...] | None:
    """Three finite numbers, else None."""
    if not isinstance(value, list) or len(value) != 3 or not all(type(each) in (int, float) for each in value):
        return None
    # Comparison, because an integer may be too large for a float.
    return tuple(map(float, value)) if all(abs(each) < 1e9 for each in value) else None


def _size(value: Any) -> tuple[int, int] | None:
    """Height and width from H, [H, W], [C, H, W], {"height": H, "width": W} or {"shortest_edge": H}, else None."""
    if isinstance(value, dict):
        value = [value.get(key, value.get("shortest_edge")) for key in ("height", "width")]
    sides = value[-2:] if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(type(side) is int and 0 < side < 10**6 for side in sides):
        return None
    return (sides[0], sides[1])
