"""Scores of the best constant prediction of each task, from a sample of the labels that an evaluation reads."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import processes
from taskexpert_jax.tasks import Task

_PIXELS_AN_IMAGE = 2_000
_PIXELS_TO_FIT = 2_000_000
_SIDE = 256  # the sample is scored as pictures of this side


class LabelSample:
    """About 2000 pixels of every example, on an even grid, with a valid label of the task."""

    def __init__(self, tasks: tuple[Task, ...]):
        self._tasks = tasks
        self._kept: dict[str, list[np.ndarray]] = {task.name: [] for task in tasks}
        self._stride = 0

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Takes pixels of the batch's labels; padding examples are left out."""
        if not self._stride:
            height, width = batch["image"].shape[1:3]
            self._stride = max(1, int(np.sqrt(height * width / _PIXELS_AN_IMAGE)))
        for task in self._tasks:
            label = batch[task.name][batch["mask"] > 0, :: self._stride, :: self._stride]
            label = label.reshape(-1, task.label_channels)
            self._kept[task.name].append(label[(label != task.ignore).all(axis=-1)])

    def results(self) -> dict[str, float]:
        """`task/metric` -> value of the best constant, fitted to the sample of all processes and scored on it.

        No constant can do better, so a model that does has learned something.

        Raises:
          UserError: a task without a single valid label.
        """
        results = {}
        for task in self._tasks:
            own = np.concatenate([np.zeros((0, task.label_channels), task.label_dtype), *self._kept[task.name]])
            labels = np.concatenate(processes.gather(own))
            if not len(labels):
                raise UserError(
                    f"no valid label of task {task.name} in the evaluation set: remove it from config.tasks"
                )
            few = labels[:: -(-len(labels) // _PIXELS_TO_FIT)].astype(np.float64)
            values = _score(task, task.best_constant(few).astype(np.float32), labels)
            results |= {f"{task.name}/{name}": value for name, value in values.items()}
        return results


def _score(task: Task, constant: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics of a constant (channels,) for labels (n, label_channels)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def add(state: Any, picture: jax.Array) -> Any:
        prediction = jnp.broadcast_to(constant, (1, _SIDE, _SIDE, len(constant)))
        return state.merge(task.metric.from_model_output(prediction=prediction, label=picture[None], mask=None))

    rest = -len(labels) % _SIDE**2
    filled = np.concatenate([labels, np.full((rest, labels.shape[1]), task.ignore, labels.dtype)])
    state = task.metric.empty()
    for picture in filled.reshape(-1, _SIDE, _SIDE, labels.shape[1]):
        state = add(state, picture)
    return jax.device_get(state).compute()
