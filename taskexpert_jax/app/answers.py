"""The answer to an image: predictions, drawings and gate weights in one ZIP file, which nobody but the sender gets."""

import io
import json
import time
from typing import Any
import zipfile

import jax
import numpy as np

from taskexpert_jax import images
from taskexpert_jax.app import keys
from taskexpert_jax.config import frame_size
from taskexpert_jax.report import gate_maps
from taskexpert_jax.run import Run
from taskexpert_jax.tasks import panels


def _model(run: Run) -> dict[str, str]:
    return {
        "name": run.path.name,
        "variant": run.config.variant,
        "dataset": run.config.dataset.name,
        "checkpoint": str(run.checkpoint),
        "device": jax.devices()[0].device_kind,
    }


def about(run: Run) -> dict[str, Any]:
    """Facts of a run for the page, and the colours that it draws with."""
    return {
        **_model(run),
        "image_size": list(run.config.dataset.image_size),
        "tasks": [keys.of_task(task) for task in run.tasks.values()],
        "weight_colours": gate_maps.weight_colours().tolist(),
    }


def answer(run: Run, data: bytes) -> bytes:
    """Predicts an image from the bytes of its file.

    Values and drawings are at the image's own size, or, if it is larger than the model's frames, at the size to which
    the model reduces it: there they are the model's own, not resampled.

    Returns:
      A ZIP file that `numpy.load` reads too: TASK.npy and TASK.png of each task without a NaN or Inf, gates.npy
      (S, T, h, w, slots) if the decoder has gates, input.png, montage.png and answer.json, see docs/serve.md.

    Raises:
      UserError: not an image that can be read.
    """
    original = images.read_data(data)
    image = _at_model_size(run, original)
    started = time.perf_counter()
    values = run.predict(image)
    seconds = time.perf_counter() - started
    drawn = run.draw(values, image)
    parts = {"input.png": keys.png(image), "montage.png": keys.png(drawn["montage"])}
    of_tasks = {}
    for name, found in values.items():
        parts[f"{name}.npy"] = _npy(found)
        parts[f"{name}.png"] = keys.png(panels.colour(run.tasks[name], found))
        of_tasks[name] = keys.of_values(run.tasks[name], found)
    gates = None
    if run.model.decoder.gating:
        gates, parts["gates.npy"] = _gates(run, image)
    facts = {
        "size": list(image.shape[:2]),
        "original_size": list(original.shape[:2]),
        "milliseconds": 1000 * seconds,
        "tasks": of_tasks,
        "diverged": list(values.diverged),
        "gates": gates,
        "model": _model(run),
    }
    return _zipped({"answer.json": json.dumps(facts, indent=1, allow_nan=False).encode(), **parts})


def warm_up(run: Run) -> None:
    """Compiles the model for every size of its frames, so that no request waits for that."""
    for height, width in {tuple(run.config.dataset.image_size), frame_size(run.config)}:
        answer(run, keys.png(np.zeros((height, width, 3), np.uint8)))


def _at_model_size(run: Run, image: np.ndarray) -> np.ndarray:
    """The image, reduced to the model's frames if it is larger, (H, W, 3) uint8."""
    frame, window = images.fit(image, tuple(run.config.dataset.image_size), frame_size(run.config))
    top, left, rows, columns = window.tolist()
    if image.shape[0] <= rows and image.shape[1] <= columns:
        return image
    return frame[top : top + rows, left : left + columns]


def _gates(run: Run, image: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Names, colours and geometry of an image's gate weights, and the weights of its tokens as .npy.

    `rows` and `columns` are the rows and columns of tokens in which the rows and columns of the image's pixels lie.
    """
    found = run.gates(image)
    top, left, rows, columns = found.window.tolist()
    row, column = _tokens(top, rows, image.shape[0], found.patch), _tokens(left, columns, image.shape[1], found.patch)
    weights = found.weights[:, :, row[0] : row[-1] + 1, column[0] : column[-1] + 1]
    facts = {
        "slots": list(found.slots),
        "tasks": list(found.tasks),
        "colours": gate_maps.choice_colours(found.slots).tolist(),
        "rows": (row - row[0]).tolist(),
        "columns": (column - column[0]).tolist(),
        "diverged": not bool(np.isfinite(weights).all()),
    }
    return facts, _npy(weights)


def _tokens(start: int, length: int, pixels: int, patch: int) -> np.ndarray:
    """Token of each of the pixels along an axis; in its frame the image has `length` pixels and begins at `start`."""
    centres = (2 * np.arange(pixels) + 1) * length // (2 * pixels)
    return (start + centres) // patch


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values), allow_pickle=False)
    return file.getvalue()


def _zipped(parts: dict[str, bytes]) -> bytes:
    """A ZIP file without compression, which a few lines of the page's script can read."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()
