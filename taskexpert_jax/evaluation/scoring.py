"""Scoring of prediction files of any model by the metrics of `--mode=evaluate`; see `taskexpert_jax.score`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import pathlib
import time
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import images
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import full_pass, results, steps
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task, from_config

SUFFIXES = (".npy", ".png")
MOST_FAULTS = 20  # that are listed
_FACTS = ("examples", "seconds", "tasks", "dataset", "date", "versions")  # those of `results.facts` that hold here
_PREFIX = "prediction/"  # of what is added to a batch


def read_prediction(path: pathlib.Path, task: Task, size: tuple[int, int]) -> np.ndarray:
    """The prediction in a file as the task's metric takes it: (h, w, channels) float32.

    Args:
      path: a .png or .npy file, coded as docs/add_a_dataset.md says.
      task: whose prediction it is.
      size: height and width of the image.

    Raises:
      UserError: a file that cannot be read, of another size, or with numbers that cannot be meant.
    """
    try:
        numbers = images.read_numbers(path, palettes=task.kind.palettes)
        numbers = numbers[..., None] if numbers.ndim == 2 else numbers
        if numbers.ndim != 3 or numbers.dtype.kind not in "biuf":
            raise ValueError(f"holds {numbers.dtype} of shape {numbers.shape}; give numbers (h, w) or (h, w, channels)")
        if numbers.shape[:2] != size:
            turned = ", turned by 90 degrees" if numbers.shape[1::-1] == size else ""
            raise ValueError(
                f"{_by(numbers.shape)}{turned}, but the image is {_by(size)}; save it as large as the image"
            )
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            raise ValueError("holds numbers that are not finite")
        return task.kind.read_prediction(numbers).astype(np.float32)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def find_prediction(folder: pathlib.Path, task: Task, example_id: str) -> pathlib.Path:
    """The file with a task's prediction for an image.

    Raises:
      UserError: none, or several.
    """
    places = [folder / task.name / f"{example_id}{suffix}" for suffix in SUFFIXES]
    places.append(folder / example_id / f"{task.name}.npy")
    found = [place for place in places if place.is_file()]
    if len(found) > 1:
        raise UserError(f"{found[0]}: there is {found[1]} too; keep one of them")
    if not found:
        raise UserError(f"{places[0]}: missing (nor is there .png, or {places[-1]})")
    return found[0]


def check_folder(folder: pathlib.Path, tasks: Sequence[Task]) -> None:
    """Raises UserError where there is no folder, or one without any file of a task."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one with the predictions")
    absent = [
        task.name for task in tasks if not (folder / task.name).is_dir() and not any(folder.rglob(f"{task.name}.npy"))
    ]
    if absent:
        there = [task.name for task in tasks if task.name not in absent]
        other = f", or score the other tasks alone: --tasks={','.join(there)}" if there else ""
        raise UserError(f"{folder}: no predictions of {' and '.join(absent)}; save them as {absent[0]}/ID.npy{other}")


def with_predictions(
    tasks: Sequence[Task], folder: pathlib.Path, batches: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """The batches, with `prediction/TASK` (B, H, W, channels) float32 of the files: 0 in padding and without label.

    Where an image has no label of a task, no file is read. From the first fault on files are only checked.

    Raises:
      UserError: files that are missing or cannot be used, the first 20 of them listed, after the last batch; or
        probabilities that are all nearly 0.
    """
    faults: list[str] = []
    files = 0
    largest: dict[str, float] = {}
    for batch in batches:
        shape = batch["image"].shape[:3]
        predictions = {task.name: np.zeros((*shape, task.channels), np.float32) for task in tasks}
        for row in np.flatnonzero(batch["mask"] > 0).tolist():
            top, left, height, width = batch["window"][row].tolist()
            inside = (row, slice(top, top + height), slice(left, left + width))
            for task in tasks:
                if (batch[task.name][inside] == task.ignore).all():
                    continue
                files += 1
                try:
                    path = find_prediction(folder, task, str(batch["id"][row]))
                    prediction = read_prediction(path, task, (height, width))
                except UserError as error:
                    faults.append(str(error))
                    continue
                predictions[task.name][inside] = prediction
                if task.kind.faintest is not None:
                    most = float(task.values(jnp.asarray(prediction)).max())
                    largest[task.name] = max(largest.get(task.name, 0.0), most)
        if not faults:
            yield {**batch, **{_PREFIX + name: of for name, of in predictions.items()}}
    if faults:
        hidden = len(faults) - MOST_FAULTS
        lines = faults[:MOST_FAULTS] + ([f"and {hidden} more"] if hidden > 0 else [])
        raise UserError(f"{len(faults)} of {files} files are missing or cannot be used:\n  " + "\n  ".join(lines))
    for task in tasks:
        if task.kind.faintest is not None and largest.get(task.name, np.inf) < task.kind.faintest:
            raise UserError(
                f"{folder}: no probability of {task.name} is above 1 / 255: in a PNG of 8 bits white is 255; write "
                "masks with 0 and 255, or as floating-point arrays"
            )


def score(config: ConfigDict, folder: pathlib.Path, batches: Iterable[Mapping[str, np.ndarray]]) -> results.Evaluation:
    """Scores the files in a folder, on one device.

    Args:
      config: the data set's config; the tasks are all of its `tasks`.
      folder: with the files.
      batches: one pass over the evaluation set, in batches of any size.

    Raises:
      UserError: see `check_folder` and `with_predictions`; or a task without a label in the whole set.
    """
    tasks = from_config(config)
    check_folder(folder, tasks)

    def as_given(variables: Any, gates: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], None]:
        return {task.name: batch[_PREFIX + task.name] for task in tasks}, None

    mesh = sharding.one_device_mesh()
    totals = full_pass.Totals(steps.empty_states(tasks), None)
    started = time.monotonic()
    with sharding.use(mesh):
        filled = with_predictions(tasks, folder, batches)
        found = full_pass.run_forward(config, tasks, as_given, {}, totals, filled, mesh)
    seconds = time.monotonic() - started
    facts = results.facts(config, workdir=folder, which="", step=0, examples=found.examples, seconds=seconds)
    return results.Evaluation(
        tasks=tasks,
        facts={"predictions": str(folder), **{name: facts[name] for name in _FACTS}},
        metrics=results.metrics(tasks, found.totals.metrics, found.boundaries),
        best_constant=found.best_constant,
        per_class=results.per_class(tasks, found.totals.metrics),
        boundaries=found.boundaries,
        gates=None,
        extremes=found.extremes,
    )
