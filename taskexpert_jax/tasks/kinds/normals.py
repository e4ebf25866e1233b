"""Surface normals: unit vectors in the camera's frame, x right, y down, z forward."""

from typing import Any

import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas, conversions
from taskexpert_jax.tasks.canvas import Drawn
from taskexpert_jax.tasks.kinds.kind import Counts, Kind, bilinear, form
from taskexpert_jax.tasks.losses import IGNORE

AXES = np.array([1, -1, -1], np.float32)  # camera frame x right, y down, z forward -> right, up, towards the camera


def normals() -> Kind:
    """Kind of surface normals, predicted as vectors of any length and normalised."""
    return Kind(
        name="normals",
        channels=3,
        label_channels=3,
        label_dtype="float16",
        ignore=IGNORE,
        invalid_value=0,
        values=conversions.unit,
        from_values=conversions.unchanged,
        to_mean=conversions.unit,
        from_mean=conversions.unit,
        read_label=_label,
        label_form="an RGB PNG, or as such an array",
        array_form="unit vectors, x right, y down, z forward, (H, W, 3) float32",
        read_prediction=_prediction,
        resize=_resize,
        colour=_colour,
        key=_key,
        caption="Red points right, green up, blue to the camera; black has no normal.",
        count=_count,
        figures=_figures,
        bounds=(-1, 1),
    )


def _label(numbers: np.ndarray, zero_is_void: bool) -> np.ndarray:
    """Unit vectors from bytes or from components in [-1, 1]; 0 where there is no normal."""
    del zero_is_void
    if numbers.dtype == np.uint8:
        vectors = numbers * np.float32(2 / 255) - np.float32(1)
    else:
        vectors = numbers.astype(np.float32)
        if (np.abs(vectors) > 1.5).any():
            raise ValueError("has components beyond 1; normals are vectors of length 1")
    length = np.sqrt(np.einsum("ijk,ijk->ij", vectors, vectors))[..., None]
    known = np.abs(length - 1) < 0.5  # excludes 0 and NaN, and black, grey and white pixels
    return np.where(known, vectors / np.where(known, length, 1), 0)


def _prediction(numbers: np.ndarray) -> np.ndarray:
    if numbers.shape[2] != 3 or (numbers.dtype.kind != "f" and numbers.dtype != np.uint8):
        raise ValueError(f"holds {form(numbers)}; save normals as RGB PNG, or as an array (h, w, 3) of vectors")
    vectors = numbers.astype(np.float32)
    return vectors if numbers.dtype.kind == "f" else vectors * np.float32(2 / 255) - 1


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    if values.shape[:2] == (height, width):
        return values
    vectors = bilinear(values, height, width)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _colour(drawn: Drawn) -> np.ndarray:
    vectors = np.where(drawn.valid[..., None], drawn.values, 0).astype(np.float32) * AXES
    return np.round((np.clip(vectors, -1, 1) + 1) * 127.5).astype(np.uint8)


def _key(drawn: Drawn, width: int) -> Image.Image:
    del drawn
    entries: list[tuple[str, canvas.Colour]] = [
        ("right", (255, 128, 128)),
        ("left", (0, 128, 128)),
        ("up", (128, 255, 128)),
        ("down", (128, 0, 128)),
        ("to the camera", (128, 128, 255)),
    ]
    return canvas.legend(entries, width)


def _count(label: np.ndarray) -> Counts:
    return Counts(label[..., 0].size, int(np.count_nonzero(label[..., 0] != IGNORE)))


def _figures(counts: Counts) -> dict[str, Any]:
    return {"invalid": counts.invalid}
