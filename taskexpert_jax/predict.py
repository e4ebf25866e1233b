"""Prediction on a user's own images: colour images, raw arrays and a montage for each image."""

import pathlib

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import files, images, progress, terminal
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import steps
from taskexpert_jax.run import Prediction, Run, opened


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
    failures: list[UserError] = []
    diverged = 0  # images with a NaN or Inf in a prediction
    run = opened(config, workdir, which)
    files.folder_for_results(output)
    logging.info(f"predicting {len(paths)} image(s) with {workdir} at {run.checkpoint}")
    with progress.Progress("predicting", len(paths)) as shown:
        for name, image in images.read_each(paths, failures):
            prediction = run.predict(image)
            steps.warn_of_nonfinite(name, prediction.diverged)
            diverged += bool(prediction.diverged)
            write(output / name, run, image, prediction)
            terminal.print_written(output / name / "montage.png")
            shown.add()
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} images not predicted; the lines above name them")
    if diverged:
        raise UserError(
            f"{diverged} of {len(paths)} images have a NaN or Inf in a prediction, which is not written; the lines "
            "above name them: try another --checkpoint"
        )


def write(folder: pathlib.Path, run: Run, image: np.ndarray, prediction: Prediction) -> None:
    """Writes the images and arrays of one input image, (H, W, 3) uint8.

    Files of an earlier prediction are removed where a task has no values.

    Raises:
      UserError: one cannot be written; files of an earlier prediction are replaced only by complete ones.
    """
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for task in prediction.diverged:
        for suffix in ("npy", "png"):
            (folder / f"{task}.{suffix}").unlink(missing_ok=True)
    drawn = run.draw(prediction, image)
    for task, values in prediction.items():
        with files.replacing(folder / f"{task}.npy") as file:
            np.save(file, values)
    for name, picture in drawn.items():
        with files.replacing(folder / f"{name}.png") as file:
            picture.save(file, "PNG")
