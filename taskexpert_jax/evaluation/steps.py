"""Jitted steps of evaluation and prediction, and a pass over a set that computes only the metrics."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from clu import metrics as clu_metrics
import jax
from jax.sharding import Mesh

from taskexpert_jax.evaluation import results
from taskexpert_jax.evaluation.inference import Inference
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task

Batch = Mapping[str, Any]
MetricStates = dict[str, clu_metrics.Metric]


def empty_states(tasks: tuple[Task, ...]) -> MetricStates:
    """Metric states of no data, one per task."""
    return {task.name: task.metric.empty() for task in tasks}


def merge_batch(tasks: tuple[Task, ...], states: MetricStates, predictions: Batch, batch: Batch) -> MetricStates:
    """Metric states updated with a batch; runs on the device."""
    return {
        task.name: states[task.name].merge(
            task.metric.from_model_output(prediction=predictions[task.name], label=batch[task.name], mask=batch["mask"])
        )
        for task in tasks
    }


def make_eval_step(
    tasks: tuple[Task, ...], infer: Inference, mesh: Mesh
) -> Callable[[Any, MetricStates, Batch], MetricStates]:
    """Jitted step (variables, states, batch) -> states; the states are donated."""

    def step(variables: Any, states: MetricStates, batch: Batch) -> MetricStates:
        predictions = infer(variables, batch["image"], batch["window"])
        return merge_batch(tasks, states, predictions, batch)

    return jax.jit(step, donate_argnums=1, out_shardings=sharding.replicated(mesh))


def make_predict_step(
    tasks: tuple[Task, ...], infer: Inference, mesh: Mesh
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Jitted step (variables, {image, window}) -> {task: values}; see `Task.values`."""

    def step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        predictions = infer(variables, batch["image"], batch["window"])
        return {task.name: task.values(predictions[task.name]) for task in tasks}

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def run(
    step: Callable[[Any, MetricStates, Batch], MetricStates],
    variables: Any,
    tasks: tuple[Task, ...],
    batches: Iterable[Batch],
    mesh: Mesh,
) -> results.Values:
    """One pass over the batches with a step of `make_eval_step`; returns `task/metric` -> value."""
    states = jax.device_put(empty_states(tasks), sharding.replicated(mesh))
    for batch in sharding.to_devices(batches, mesh):
        states = step(variables, states, batch)
    return results.metrics(tasks, jax.device_get(states))
