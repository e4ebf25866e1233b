"""Jitted steps of evaluation and prediction, and a pass over a set that computes only the metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from taskexpert_jax.evaluation import results
from taskexpert_jax.evaluation.inference import Inference
from taskexpert_jax.models import inputs
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task
from taskexpert_jax.tasks.metrics import PooledMetric, nonfinite_examples

Batch = Mapping[str, Any]
MetricStates = dict[str, PooledMetric]


class Predicted(NamedTuple):
    """Predictions of a batch.

    values: by task, see `Task.values`.
    nonfinite: by task, (B,) bool: whether the prediction has a NaN or Inf inside the image. `values` do not tell it: of
        NaN logits the largest class is 0.
    """

    values: dict[str, Array]
    nonfinite: dict[str, Array]


def empty_states(tasks: tuple[Task, ...]) -> MetricStates:
    """Metric states of no data, one per task."""
    return {task.name: task.metric.empty() for task in tasks}


def in_window(prediction: Array, window: Array) -> Array:
    """Prediction (B, H, W, c) with 0 in the padding of the frames, where predictions are undefined."""
    return jnp.where(inputs.inside(window, *prediction.shape[1:3])[..., None], prediction, 0.0)


def predicted(tasks: tuple[Task, ...], predictions: Batch, window: Array) -> Predicted:
    """Values of predictions by task, and whether they have a NaN or Inf; runs on the device."""
    nonfinite = {task.name: nonfinite_examples(in_window(predictions[task.name], window)) for task in tasks}
    return Predicted({task.name: task.values(predictions[task.name]) for task in tasks}, nonfinite)


def merge_batch(tasks: tuple[Task, ...], states: MetricStates, predictions: Batch, batch: Batch) -> MetricStates:
    """Metric states updated with a batch; runs on the device."""
    return {
        task.name: states[task.name].merge(
            task.metric.from_model_output(
                prediction=in_window(predictions[task.name], batch["window"]),
                label=batch[task.name],
                mask=batch["mask"],
            )
        )
        for task in tasks
    }


def warn_of_nonfinite(name: str, diverged: Sequence[str]) -> None:
    """Logs one line per task whose prediction for the image `name` has a NaN or Inf."""
    for task in diverged:
        logging.warning(f"{name}: NaN or Inf in the prediction of {task}: the model has diverged")


def make_eval_step(
    tasks: tuple[Task, ...], infer: Inference, mesh: Mesh
) -> Callable[[Any, MetricStates, Batch], MetricStates]:
    """Jitted step (variables, states, batch) -> states; the states are donated."""

    def step(variables: Any, states: MetricStates, batch: Batch) -> MetricStates:
        predictions = infer(variables, batch["image"], batch["window"])
        return merge_batch(tasks, states, predictions, batch)

    return jax.jit(step, donate_argnums=1, out_shardings=sharding.replicated(mesh))


def make_predict_step(tasks: tuple[Task, ...], infer: Inference, mesh: Mesh) -> Callable[[Any, Batch], Predicted]:
    """Jitted step (variables, {image, window}) -> predictions."""

    def step(variables: Any, batch: Batch) -> Predicted:
        return predicted(tasks, infer(variables, batch["image"], batch["window"]), batch["window"])

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def run(
    step: Callable[[Any, MetricStates, Batch], MetricStates],
    variables: Any,
    tasks: tuple[Task, ...],
    batches: Iterable[Batch],
    mesh: Mesh,
) -> results.Values:
    """One pass over the batches with a step of `make_eval_step`; returns `task/metric` -> value.

    A task with a NaN or Inf in any prediction, or without any valid label, has NaN for every value, and is reported in
    one line.
    """
    states = jax.device_put(empty_states(tasks), sharding.replicated(mesh))
    for batch in sharding.to_devices(batches, mesh):
        states = step(variables, states, batch)
    on_host = jax.device_get(states)
    results.warn_of_nonfinite(results.nonfinite(tasks, on_host))
    for name, state in on_host.items():
        if not any(np.any(leaf) for leaf in jax.tree.leaves(state)):  # still the state of no data
            results.warn_of_unlabelled(name)
    return results.metrics(tasks, on_host)
