"""Scoring of prediction files of any model with the metrics of `--mode=evaluate`; see `taskexpert_jax.score`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
import pathlib
import time
from typing import Any
import unicodedata

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import images, storage
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.evaluation import full_pass, results, steps
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.load import Selected
from taskexpert_jax.tasks import Task, from_config
from taskexpert_jax.tasks.kinds.probability import shares
from taskexpert_jax.tasks.metrics.boundary.quantisation import Quantisation, quantise

SUFFIXES = (".npy", ".png")
MOST_FAULTS = 20  # maximum number of faults in the error message
# Fields of `results.facts` that apply here.
_FACTS = ("version", "examples", "seconds", "tasks", "dataset", "date", "versions")
Names = Mapping[str, Sequence[str]]  # name without suffix -> names of files
_PREFIX = "prediction/"  # prefix of the batch keys of predictions


def read_prediction(path: pathlib.Path, task: Task, size: tuple[int, int]) -> np.ndarray:
    """Reads a prediction file into the form that the task's metric takes, (h, w, channels) float32; see `_read`."""
    return _read(path, task, size)[0]


def _read(path: pathlib.Path, task: Task, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads a prediction file: (prediction, probability (h, w) float32 of a task with a boundary benchmark or None).

    The prediction, a logit, does not give back the probability to the last bit, which decides where it is truncated.

    Args:
      path: .png or .npy file, encoded as described in docs/add_a_dataset.md.
      task: task of the prediction.
      size: height and width of the image.

    Raises:
      UserError: the file is unreadable, has another size, or holds values that are no prediction of the task.
    """
    try:
        numbers = images.read_numbers(path, ids=task.kind.palettes)
        numbers = numbers[..., None] if numbers.ndim == 2 else numbers
        if numbers.ndim != 3 or numbers.dtype.kind not in "biuf":
            raise ValueError(f"holds {numbers.dtype} of shape {numbers.shape}; save numbers (h, w) or (h, w, channels)")
        if numbers.shape[:2] != size:
            turned = " (turned by 90 degrees)" if numbers.shape[1::-1] == size else ""
            raise ValueError(
                f"is {_by(numbers.shape)}{turned}, but the image is {_by(size)}; save it at the size of the image"
            )
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            raise ValueError("holds NaN or Inf; replace them by numbers")
        probability = shares(numbers) if task.boundary_benchmark else None
        return task.kind.read_prediction(numbers).astype(np.float32), probability
    except StoreError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def files_by_stem(folder: pathlib.Path) -> Names:
    """Names of the files in a folder, sorted, by their name without suffix; none if there is no such folder."""
    found: dict[str, list[str]] = {}
    for entry in sorted(storage.files_in(folder)) if folder.is_dir() else ():
        found.setdefault(entry.stem, []).append(entry.name)
    return found


def find_prediction(
    folder: pathlib.Path, task: Task, example_id: str, listed: Callable[[pathlib.Path], Names] = files_by_stem
) -> pathlib.Path:
    """Path of a task's prediction for an image: TASK/ID.npy, TASK/ID.png or ID/TASK.npy; suffixes in any case.

    listed: `files_by_stem`, or a cache of it, because a listing per file is slow.

    Raises:
      UserError: there is no file, or more than one.
    """
    places = {folder / task.name / example_id: SUFFIXES, folder / example_id / task.name: (".npy",)}
    found = [
        place.with_name(name)
        for place, suffixes in places.items()
        for name in listed(place.parent).get(place.name, ())
        if pathlib.PurePath(name).suffix.lower() in suffixes
    ]
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} both exist; keep one of them")
    if found:
        return found[0]
    first, last = (f"{place}.npy" for place in places)
    hint = ""
    place = folder / task.name / example_id
    for stem in listed(place.parent):
        if unicodedata.normalize("NFC", stem) == unicodedata.normalize("NFC", place.name):
            hint = f"; {stem!a} is there, but the id is {place.name!a} (another Unicode normal form): rename the files"
    raise UserError(f"{first}: missing, and so are .png and {last}{hint}")


def check_folder(folder: pathlib.Path, tasks: Sequence[Task]) -> None:
    """Raises UserError if the folder does not exist or holds no predictions of some task."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder with the predictions")
    absent = [
        task.name for task in tasks if not (folder / task.name).is_dir() and not any(folder.rglob(f"{task.name}.npy"))
    ]
    if absent:
        there = [task.name for task in tasks if task.name not in absent]
        other = f", or score only the other tasks: --tasks={','.join(there)}" if there else ""
        raise UserError(f"{folder}: no predictions of {' and '.join(absent)}; save them as {absent[0]}/ID.npy{other}")


def with_predictions(
    tasks: Sequence[Task],
    folder: pathlib.Path,
    batches: Iterable[Mapping[str, np.ndarray]],
    quantisation: Quantisation = "truncate",
) -> Iterator[dict[str, np.ndarray]]:
    """Adds the predictions in files to batches, as `prediction/TASK` (B, H, W, channels) float32, 0 in padding.

    For tasks with a boundary benchmark also `strength/TASK` (B, H, W) uint8, the probabilities in 8 bits.
    No file is read for an image without a label of the task; its prediction is 0. After the first fault no batches are
    yielded, and the remaining files are only checked.

    Raises:
      UserError: after the last batch: missing or unusable files, of which the first 20 are listed; or probabilities
        that are all nearly 0.
    """
    faults: list[str] = []
    files = 0
    largest: dict[str, float] = {}
    listed = functools.cache(files_by_stem)
    for batch in batches:
        shape = batch["image"].shape[:3]
        predictions = {task.name: np.zeros((*shape, task.channels), np.float32) for task in tasks}
        strengths = {task.name: np.zeros(shape, np.uint8) for task in tasks if task.boundary_benchmark}
        for row in np.flatnonzero(batch["mask"] > 0).tolist():
            top, left, height, width = batch["window"][row].tolist()
            inside = (row, slice(top, top + height), slice(left, left + width))
            for task in tasks:
                if (batch[task.name][inside] == task.ignore).all():
                    continue
                files += 1
                try:
                    path = find_prediction(folder, task, str(batch["id"][row]), listed)
                    prediction, probability = _read(path, task, (height, width))
                except StoreError:
                    raise
                except UserError as error:
                    faults.append(str(error))
                    continue
                predictions[task.name][inside] = prediction
                if probability is not None:
                    strengths[task.name][inside] = quantise(probability, quantisation)
                if task.kind.faintest is not None:
                    most = float(task.values(jnp.asarray(prediction)).max())
                    largest[task.name] = max(largest.get(task.name, 0.0), most)
        if not faults:
            yield {
                **batch,
                **{_PREFIX + name: of for name, of in predictions.items()},
                **{full_pass.STRENGTH + name: of for name, of in strengths.items()},
            }
    if faults:
        hidden = len(faults) - MOST_FAULTS
        lines = faults[:MOST_FAULTS] + ([f"and {hidden} more"] if hidden > 0 else [])
        raise UserError(f"{len(faults)} of {files} files are missing or unusable:\n  " + "\n  ".join(lines))
    for task in tasks:
        if task.kind.faintest is not None and largest.get(task.name, np.inf) < task.kind.faintest:
            raise UserError(
                f"{folder}: no probability of {task.name} is above 1 / 255; in an 8-bit PNG, 255 stands for 1: save "
                "masks with 0 and 255, or as floating-point arrays"
            )


def score(
    config: ConfigDict,
    folder: pathlib.Path,
    batches: Iterable[Mapping[str, np.ndarray]],
    advance: Callable[[int], object] = lambda count: None,
) -> results.Evaluation:
    """Scores the prediction files in a folder, on one device.

    Args:
      config: the data set's config; all of its `tasks` are scored.
      folder: folder with the prediction files.
      batches: one pass over the evaluation set, in batches of any size.
      advance: called with the number of examples that have been scored.

    Raises:
      UserError: see `check_folder` and `with_predictions`.
    """
    tasks = from_config(config)
    check_folder(folder, tasks)

    def from_files(variables: Any, gates: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Any], None]:
        return {task.name: batch[_PREFIX + task.name] for task in tasks}, None

    mesh = sharding.one_device_mesh()
    totals = full_pass.Totals(steps.empty_states(tasks), None)
    started = time.monotonic()
    with sharding.use(mesh):
        filled = with_predictions(tasks, folder, batches, config.eval.boundary.quantise)
        step = full_pass.make_step(tasks, from_files, config.eval.boundary.quantise, mesh)
        found = full_pass.run_step(config.eval.boundary, tasks, step, {}, totals, filled, mesh, advance)
    seconds = time.monotonic() - started
    facts = results.facts(config, workdir=folder, checkpoint=Selected(0, ""), examples=found.examples, seconds=seconds)
    return found.evaluation(tasks, {"predictions": str(folder), **{name: facts[name] for name in _FACTS}}, ())
