"""Config of a run that is loaded: its own config.json, with what the command line may change.

A run is its own truth. A flag that would make another model of the same parameters is refused: the shapes of the arrays
would not reveal it.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from taskexpert_jax import json_file
from taskexpert_jax.config import check, read_run, restored
from taskexpert_jax.errors import StoreError, UserError
from taskexpert_jax.runs.workdir import FREE, differences, listed
from taskexpert_jax.tasks import from_config

# Fields that may differ from the run's when it is loaded: they change neither the model nor what it was trained for.
FREE_TO_LOAD = (
    *FREE,
    "dataset.eval_split",
    "dataset.fingerprint",
    "model.attention",
    "model.remat",
    "model.unroll",
)
_RECORD = "config/metadata"  # Orbax's file name for a checkpoint's config
_OTHER_DATA = ("dataset.", "tasks")
_PLACEMENT = ("eval", "mesh", "log", "guard")


def of_run(workdir: pathlib.Path, given: ConfigDict, changed: Mapping[str, Any]) -> ConfigDict:
    """The config to load a run with: the run's, with the fields in FREE_TO_LOAD of the command line.

    Args:
      workdir: the run's directory.
      given: the config of the command line: the file of --config, or the run's own, and --config.FIELD=VALUE.
      changed: the values of --config.FIELD=VALUE by field.

    Raises:
      UserError: no run's config in the workdir, or a given config that contradicts it (the message lists the fields).
    """
    saved = read_run(workdir)
    _refuse(workdir, differences(saved, given, FREE_TO_LOAD))
    # The data are identified anew: those of an evaluation may be others than those of training.
    given.dataset.fingerprint = changed.get("dataset.fingerprint", "")
    return given


def for_evaluation(
    workdir: pathlib.Path, given: ConfigDict, changed: Mapping[str, Any]
) -> tuple[ConfigDict, ConfigDict]:
    """The configs (of the run, of the data) to evaluate a run with; they are the same unless the data set is another.

    With another data set than the run's, the second config has the data set and `eval` of `given`, and the tasks that
    both have; a task with other classes is none of them. The rest is as in `of_run`, with its arguments and errors.

    Raises:
      UserError: also if the data set has none of the run's tasks.
    """
    saved = read_run(workdir)
    if given.dataset.name == saved.dataset.name:
        config = of_run(workdir, given, changed)
        return config, config
    fields = {name: value for name, value in changed.items() if not name.startswith(_OTHER_DATA)}
    wanted = saved.copy_and_resolve_references()
    wanted.update_from_flattened_dict(fields)
    _refuse(workdir, differences(saved, wanted, FREE_TO_LOAD))
    config, data = wanted, wanted.copy_and_resolve_references()
    for name in _PLACEMENT:
        config[name] = data[name] = given[name]
    data.dataset = given.dataset.copy_and_resolve_references()
    data.tasks, note = _common(saved, given)
    if not data.tasks:
        raise UserError(f"{workdir} cannot be evaluated on data set {given.dataset.name!r}: no task in common; {note}")
    logging.warning(f"evaluating {workdir} on {given.dataset.name!r}, trained on {saved.dataset.name!r}; {note}")
    data.checkpoint.best_task = data.tasks[0]
    size, theirs = tuple(saved.dataset.image_size), tuple(given.dataset.image_size)
    frame = (max(size[0], theirs[0]), max(size[1], theirs[1]))
    if not given.eval.image_size and frame != size:
        config.eval.image_size = data.eval.image_size = frame  # sliding windows of the model's own size
    data.dataset.image_size = size
    if "zero_is_void" in data.dataset:
        data.dataset.zero_is_void = tuple(task for task in data.dataset.zero_is_void if task in data.tasks)
    check(data)
    return config, data


def check_checkpoint(workdir: pathlib.Path, step: int, config: ConfigDict, free: Sequence[str] = FREE_TO_LOAD) -> None:
    """Compares the config that a checkpoint was written with, which it holds, with the run's.

    They differ if config.json was edited, or if it or the checkpoint was copied from another run.

    Args:
      workdir: the run's directory.
      step: step of the checkpoint. One without a readable config is not compared.
      config: the config that the checkpoint is loaded with.
      free: fields that may differ, besides `num_steps`, which may have been raised.

    Raises:
      UserError: they differ; the message lists the fields.
    """
    path = workdir / "checkpoints" / str(step)
    try:
        written, _ = restored(json_file.read(path / _RECORD))
    except StoreError:
        raise
    except (OSError, json_file.MalformedError, UserError):
        return
    if lines := differences(written, config, (*free, "num_steps")):
        raise UserError(
            f"checkpoint {path} was written by a run with another config than {workdir / 'config.json'}; restore the "
            f"file, or move the checkpoint to its own run:{listed(lines)}"
        )


def _common(saved: ConfigDict, given: ConfigDict) -> tuple[tuple[str, ...], str]:
    """The tasks of the run that the other data set has with the same classes, and a note of them and of the others."""
    theirs = {task.name: task.class_names for task in from_config(given)}
    tasks, left_out = [], []
    for task in from_config(saved):
        if task.name not in theirs:
            left_out.append(f"{task.name} (not a task of {given.dataset.name})")
        elif task.class_names != theirs[task.name]:
            left_out.append(f"{task.name} (other classes)")
        else:
            tasks.append(task.name)
    return tuple(tasks), f"tasks: {', '.join(tasks) or 'none'}; left out: {', '.join(left_out) or 'none'}"


def _refuse(workdir: pathlib.Path, lines: list[str]) -> None:
    if lines:
        raise UserError(
            f"{workdir} has a run with another config; leave out --config, as the run has its own, and flags that "
            f"contradict it:{listed(lines)}"
        )
