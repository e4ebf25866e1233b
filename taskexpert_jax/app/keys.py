"""Keys of the page: class colours, colour bars and legends of each task, as data for its script."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from taskexpert_jax.tasks import Task, panels
from taskexpert_jax.tasks.canvas import KEY_WIDTH, Drawn, Range

# Directions in the camera's frame: x right, y down, z forward.
_DIRECTIONS = {"right": (1, 0, 0), "left": (-1, 0, 0), "up": (0, -1, 0), "down": (0, 1, 0), "to the camera": (0, 0, -1)}

_CAPTIONS = {
    "depth": "Near is red, far is blue. The bar spans all but the nearest and the farthest 0.5 % of the pixels.",
    "normals": "Unit vectors in the camera's frame, x right, y down, z forward, and their angle: 0° faces the camera.",
    "probability": "White is 1, black is 0.",
}


def of_task(task: Task) -> dict[str, Any]:
    """Facts of a task that need no prediction: name, title, kind, unit, caption, colours of its classes."""
    known: dict[str, Any] = {
        "name": task.name,
        "title": task.title,
        "kind": task.kind.name,
        "unit": task.kind.unit,
        "smooth": task.kind.smooth,
        "caption": _CAPTIONS.get(task.kind.name, ""),
    }
    if task.kind.class_names:
        ids = np.arange(len(task.kind.class_names), dtype=np.uint8)
        known["classes"] = list(task.kind.class_names)
        known["colours"] = panels.colour(task, ids[None])[0].tolist()
    if task.kind.name == "normals":
        vectors = np.array([list(_DIRECTIONS.values())], np.float32)
        known["legend"] = list(zip(_DIRECTIONS, panels.colour(task, vectors)[0].tolist(), strict=True))
    return known


def of_values(task: Task, values: np.ndarray) -> dict[str, Any]:
    """Key of one prediction: shares of the classes, or the colour bar with the smallest and the largest value."""
    if task.kind.class_names:
        count = np.bincount(values.ravel(), minlength=len(task.kind.class_names))
        return {"shares": (count / values.size).tolist()}
    if task.kind.name == "normals":
        return {}
    limits = panels.limits_of(task, values)
    if values.ndim == 2:
        ramp = np.linspace(*limits, 256, dtype=np.float32)[None]
        bar = panels.colour(task, ramp, limits=limits)
        extremes = {"minimum": float(values.min()), "maximum": float(values.max())}
        return {"limits": limits, **extremes, "bar": _data_uri(Image.fromarray(bar))}
    return {"key": _data_uri(_drawn_key(task, values, limits))}


def _drawn_key(task: Task, values: np.ndarray, limits: Range) -> Image.Image:
    """The key of `panels.picture`, for kinds that the page has no key of its own for."""
    return task.kind.key(Drawn(values, np.asarray(np.isfinite(values).all(axis=-1)), limits), KEY_WIDTH)


def png(image: Image.Image | np.ndarray) -> bytes:
    """An image as PNG, compressed fast: it is sent once."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
