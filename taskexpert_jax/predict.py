"""Prediction for a user's own images: colour pictures, raw arrays and one montage an image."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from taskexpert_jax import evaluate, images
from taskexpert_jax.config import check, frame_size
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import inference
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task, drawing


def fit(image: np.ndarray, size: tuple[int, int], largest: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The image in a frame: reduced or enlarged to fit where needed, centred, padded with 0.

    The frame is of the model's own `size` if the image fits into that, else `largest`. An image that fits and fills at
    least half of the model's size in one direction is not resampled, so that the data sets' own frames are predicted
    exactly as they are evaluated.

    Args:
      image: (h, w, 3) uint8.
      size: height and width that the model was trained for.
      largest: height and width, `size` or more, of frames for images that are larger than that.

    Returns:
      (H, W, 3) uint8, and the window (4,) int32: top, left, height, width of the image inside.
    """
    frame_size = size if image.shape[0] <= size[0] and image.shape[1] <= size[1] else largest
    scale = min(frame_size[0] / image.shape[0], frame_size[1] / image.shape[1])
    if scale < 1 or (scale >= 2 and frame_size == size):
        resized = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
        resample = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
        image = np.asarray(Image.fromarray(image).resize(resized, resample))
    rows, columns = image.shape[:2]
    top, left = (frame_size[0] - rows) // 2, (frame_size[1] - columns) // 2
    frame = np.zeros((*frame_size, 3), np.uint8)
    frame[top : top + rows, left : left + columns] = image
    return frame, np.array([top, left, rows, columns], np.int32)


def restore_size(task: Task, values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values of the window, (h, w) or (h, w, 3), at the image's own size: nearest for classes, else bilinear.

    Depth stays in metres as seen by the training camera's field of view; normals are made unit again.
    """
    if values.shape[:2] == (height, width):
        return values
    if task.draw == "classes":
        return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
    planes = np.moveaxis(np.atleast_3d(values).astype(np.float32), -1, 0)
    resized = [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BILINEAR)) for p in planes]
    if values.ndim == 2:
        return resized[0]
    vectors = np.stack(resized, axis=-1)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def predict(config: Any, workdir: pathlib.Path, which: str, source: pathlib.Path, output: pathlib.Path) -> None:
    """Predicts every task for an image or for the images of a folder.

    Writes OUTPUT/NAME/TASK.png (coloured), OUTPUT/NAME/TASK.npy (class ids uint8; metres, probabilities and unit
    vectors float32) and OUTPUT/NAME/montage.png.

    As in evaluation, `config.eval.flip` and `config.eval.scales` average over several views. An image larger than
    `config.dataset.image_size` is reduced to fit: the model then sees all of it, at the size that it knows. With a
    larger `config.eval.image_size` it is reduced to that, if at all, and seen in windows: finer, and slower.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      source: an image file or a folder of them.
      output: where to write; existing pictures of the same name are replaced.

    Raises:
      UserError: no image there, one that cannot be read (the others are still predicted), or no fitting checkpoint.
    """
    check(config)
    paths = images.list_images(source)
    size, largest = tuple(config.dataset.image_size), frame_size(config)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, {}, jax.local_devices()[:1])
    failures: list[UserError] = []
    with sharding.use(mesh):
        model, variables, step = evaluate.load(config, workdir, which, mesh)
        predict_step = evaluate.make_predict_step(model.tasks, inference.make_inference(model, config), mesh)
        print(f"predicting {len(paths)} image(s) with {workdir} at step {step} ({which})")
        for name, image in images.read_each(paths, failures):
            frame, window = fit(image, size, largest)
            batch = {"image": frame[None], "window": window[None]}
            values = jax.device_get(predict_step(variables, jax.device_put(batch, sharding.replicated(mesh))))
            top, left, rows, columns = window
            inside = {task: v[0, top : top + rows, left : left + columns] for task, v in values.items()}
            write(output / name, image, model.tasks, inside)
            print(f"written: {output / name / 'montage.png'}", flush=True)
    if failures:
        raise UserError(f"{failures[0]} ({len(failures)} of {len(paths)} images not predicted)")


def write(folder: pathlib.Path, image: np.ndarray, tasks: tuple[Task, ...], values: Mapping[str, np.ndarray]) -> None:
    """Writes one image's pictures and arrays; `values` cover the image, at any size."""
    folder.mkdir(parents=True, exist_ok=True)
    panels = []
    for task in tasks:
        sized = restore_size(task, np.asarray(values[task.name]), *image.shape[:2])
        np.save(folder / f"{task.name}.npy", sized)
        picture = drawing.picture(task, sized)
        picture.save(folder / f"{task.name}.png")
        panels.append((task.title, picture))
    drawing.montage(image, panels).save(folder / "montage.png")
