"""Scores of the best constant prediction of each task, on a sample of the labels of an evaluation set."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.evaluation.results import warn_of_unlabelled
from taskexpert_jax.parallel import processes
from taskexpert_jax.tasks import Task

_PIXELS_PER_IMAGE = 2_000
_PIXELS_TO_FIT = 2_000_000
_SIDE = 256  # the sample is scored as square images with this side


class LabelSample:
    """Valid label pixels of each task on a regular grid of about 2000 pixels per example."""

    def __init__(self, tasks: tuple[Task, ...]):
        self._tasks = tasks
        self._kept: dict[str, list[np.ndarray]] = {task.name: [] for task in tasks}
        self._stride = 0

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds pixels of the batch's labels; padding examples are skipped."""
        if not self._stride:
            height, width = batch["image"].shape[1:3]
            self._stride = max(1, int(np.sqrt(height * width / _PIXELS_PER_IMAGE)))
        for task in self._tasks:
            label = batch[task.name][batch["mask"] > 0, :: self._stride, :: self._stride]
            label = label.reshape(-1, task.label_channels)
            self._kept[task.name].append(label[(label != task.ignore).all(axis=-1)])

    def results(self) -> dict[str, float]:
        """`task/metric` -> value of the best constant, fitted to and scored on the samples of all processes.

        No constant prediction scores better, so a trained model must. NaN for a task without any valid label, which is
        reported in one line.
        """
        results = {}
        for task in self._tasks:
            own = np.concatenate([np.zeros((0, task.label_channels), task.label_dtype), *self._kept[task.name]])
            labels = np.concatenate(processes.gather(own))
            if len(labels):
                few = labels[:: -(-len(labels) // _PIXELS_TO_FIT)].astype(np.float64)
                values = _score(task, task.best_constant(few).astype(np.float32), labels)
            else:
                values = task.metric.empty().compute()
                warn_of_unlabelled(task.name)
            results |= {f"{task.name}/{name}": value for name, value in values.items()}
        return results


def _score(task: Task, constant: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of a constant prediction (channels,) on labels (n, label_channels)."""

    # The constant is an argument, because XLA would spend seconds on folding reductions of a known array.
    @functools.partial(jax.jit, donate_argnums=0)
    def add(state: Any, constant: jax.Array, label: jax.Array) -> Any:
        prediction = jnp.broadcast_to(constant, (1, _SIDE, _SIDE, len(constant)))
        return state.merge(task.metric.from_model_output(prediction=prediction, label=label[None], mask=None))

    rest = -len(labels) % _SIDE**2
    filled = np.concatenate([labels, np.full((rest, labels.shape[1]), task.ignore, labels.dtype)])
    state = task.metric.empty()
    for label in filled.reshape(-1, _SIDE, _SIDE, labels.shape[1]):
        state = add(state, constant, label)
    return jax.device_get(state).compute()
