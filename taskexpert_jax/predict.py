"""Prediction on a user's own images: colour images, raw arrays and a montage for each image."""

from collections.abc import Mapping
import pathlib

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import files, images, terminal
from taskexpert_jax.config import check, frame_size
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import inference, steps
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.load import load
from taskexpert_jax.tasks import Task, canvas, panels


def predict(config: ConfigDict, workdir: pathlib.Path, which: str, source: pathlib.Path, output: pathlib.Path) -> None:
    """Predicts every task for an image or for the images of a folder.

    Writes OUTPUT/NAME/TASK.png (coloured), OUTPUT/NAME/TASK.npy (class ids uint8; metres, probabilities and unit
    vectors float32) and OUTPUT/NAME/montage.png.

    As in evaluation, `config.eval.flip` and `config.eval.scales` average over several views. An image larger than
    `config.dataset.image_size` is downscaled to fit it. With a larger `config.eval.image_size` it is downscaled to that
    at most, and predicted by sliding-window inference: finer, and slower.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      source: an image file or a folder of them.
      output: output directory; existing files of the same name are replaced.

    Raises:
      UserError: no image, or no fitting checkpoint; after the others were written, an unreadable image, or one with a
        NaN or Inf in a prediction.
    """
    check(config)
    paths = images.list_images(source)
    size, largest = tuple(config.dataset.image_size), frame_size(config)
    mesh = sharding.one_device_mesh()
    failures: list[UserError] = []
    diverged = 0  # images with a NaN or Inf in a prediction
    with sharding.use(mesh):
        model, variables, checkpoint = load(config, workdir, which, mesh)
        predict_step = steps.make_predict_step(model.tasks, inference.make_inference(model, config), mesh)
        files.folder_for_results(output)
        logging.info(f"predicting {len(paths)} image(s) with {workdir} at {checkpoint}")
        for name, image in images.read_each(paths, failures):
            frame, window = images.fit(image, size, largest)
            batch = {"image": frame[None], "window": window[None]}
            found = jax.device_get(predict_step(variables, jax.device_put(batch, sharding.replicated(mesh))))
            steps.warn_of_nonfinite(name, found)
            nonfinite = {task for task, (wrong,) in found.nonfinite.items() if wrong}
            diverged += bool(nonfinite)
            top, left, rows, columns = window
            inside = {
                task: v[0, top : top + rows, left : left + columns]
                for task, v in found.values.items()
                if task not in nonfinite
            }
            write(output / name, image, model.tasks, inside)
            terminal.print_written(output / name / "montage.png")
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} images not predicted; the lines above name them")
    if diverged:
        raise UserError(
            f"{diverged} of {len(paths)} images have a NaN or Inf in a prediction, which is not written; the lines "
            "above name them: try another --checkpoint"
        )


def write(folder: pathlib.Path, image: np.ndarray, tasks: tuple[Task, ...], values: Mapping[str, np.ndarray]) -> None:
    """Writes the images and arrays of one input image; `values` cover it, at any resolution.

    Files of an earlier prediction are removed where a task has no values.

    Raises:
      UserError: one cannot be written; files of an earlier prediction are replaced only by complete ones.
    """
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    titled = []
    for task in tasks:
        if task.name not in values:
            for suffix in ("npy", "png"):
                (folder / f"{task.name}.{suffix}").unlink(missing_ok=True)
            continue
        sized = task.kind.resize(np.asarray(values[task.name]), *image.shape[:2])
        picture = panels.picture(task, sized)
        with files.replacing(folder / f"{task.name}.npy") as file:
            np.save(file, sized)
        with files.replacing(folder / f"{task.name}.png") as file:
            picture.save(file, "PNG")
        titled.append((task.title, picture))
    with files.replacing(folder / "montage.png") as file:
        canvas.montage(image, titled).save(file, "PNG")
