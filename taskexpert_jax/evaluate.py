"""Evaluation: every task's metrics over a data set, exact for any batch size, padding and number of devices."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import pathlib
import time
from typing import Any

from clu import metrics as clu_metrics
import jax
from jax.sharding import Mesh
import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import full_pass, results
from taskexpert_jax.evaluation.inference import Inference
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.models.variables import abstract_variables
from taskexpert_jax.parallel import sharding
from taskexpert_jax.report import evaluation_page
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.tasks import Task, best_task, from_config

Batch = Mapping[str, Any]
MetricStates = dict[str, clu_metrics.Metric]
Results = dict[str, float]

PARAMS_DTYPES = ("float32", "bfloat16")  # of `config.eval.params_dtype`


def empty_states(tasks: tuple[Task, ...]) -> MetricStates:
    """The metrics of no data, a state a task."""
    return {task.name: task.metric.empty() for task in tasks}


def merge_batch(tasks: tuple[Task, ...], states: MetricStates, predictions: Batch, batch: Batch) -> MetricStates:
    """The states with one more batch; runs on the device."""
    return {
        task.name: states[task.name].merge(
            task.metric.from_model_output(prediction=predictions[task.name], label=batch[task.name], mask=batch["mask"])
        )
        for task in tasks
    }


def make_eval_step(
    tasks: tuple[Task, ...], infer: Inference, mesh: Mesh
) -> Callable[[Any, MetricStates, Batch], MetricStates]:
    """(variables, states, batch) -> states, jitted; the states are donated."""

    def step(variables: Any, states: MetricStates, batch: Batch) -> MetricStates:
        predictions = infer(variables, batch["image"], batch["window"])
        return merge_batch(tasks, states, predictions, batch)

    return jax.jit(step, donate_argnums=1, out_shardings=sharding.replicated(mesh))


def make_predict_step(
    tasks: tuple[Task, ...], infer: Inference, mesh: Mesh
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(variables, {image, window}) -> {task: values}, jitted; what a user wants to see, see `Task.values`."""

    def step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        predictions = infer(variables, batch["image"], batch["window"])
        return {task.name: task.values(predictions[task.name]) for task in tasks}

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def compute(tasks: tuple[Task, ...], states: MetricStates) -> Results:
    """`task/metric` -> value, after one transfer from the devices."""
    return results.metrics(tasks, jax.device_get(states))


def run(
    step: Callable[[Any, MetricStates, Batch], MetricStates],
    variables: Any,
    tasks: tuple[Task, ...],
    batches: Iterable[Batch],
    mesh: Mesh,
) -> Results:
    """One pass over the batches: `task/metric` -> value."""
    states = jax.device_put(empty_states(tasks), sharding.replicated(mesh))
    for batch in sharding.to_devices(batches, mesh):
        states = step(variables, states, batch)
    return compute(tasks, states)


def load(config: Any, workdir: pathlib.Path, which: str, mesh: Mesh) -> tuple[TaskExpert, Any, int]:
    """(model, variables on the mesh, step) of a run's checkpoint, without its optimiser.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      mesh: where the variables go.

    Raises:
      UserError: a dtype that parameters cannot have, or a checkpoint that is not there, is damaged or does not fit.
    """
    if config.eval.params_dtype not in PARAMS_DTYPES:
        raise UserError(f"config.eval.params_dtype={config.eval.params_dtype!r}: use {' or '.join(PARAMS_DTYPES)}")
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    abstract = abstract_variables(model, mesh)
    abstract["params"] = jax.tree.map(lambda leaf: leaf.update(dtype=config.eval.params_dtype), abstract["params"])
    best = best_task(tasks, config.checkpoint.best_task)
    with contextlib.closing(Checkpoints(workdir, best, read_only=True)) as checkpoints:
        step = checkpoints.select(which)
        variables = checkpoints.restore_variables(step, abstract)
    return model, variables, step


def evaluate(
    config: Any, workdir: pathlib.Path, which: str, eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]
) -> Results:
    """Evaluates a checkpoint, prints a table beside the best constants, and writes WORKDIR/evaluation/.

    That holds metrics.json, per_class.csv and evaluation_page.html, a page to look at.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      eval_batches: makes one pass over the evaluation set.

    Returns:
      `task/metric` -> value; with `config.eval.boundary.odsf` also the boundary benchmark's.

    Raises:
      UserError: no such checkpoint, or one of another architecture (with a diff).
    """
    mesh = sharding.make_mesh(config.mesh, {"eval.batch_size": config.eval.batch_size})
    with sharding.use(mesh):
        model, variables, step = load(config, workdir, which, mesh)
        print(f"evaluating {workdir} at step {step} ({which})", flush=True)
        started = time.monotonic()
        found = full_pass.run(config, model, variables, eval_batches(), mesh)
        seconds = time.monotonic() - started
    evaluation = results.Evaluation(
        tasks=model.tasks,
        facts=results.facts(config, workdir=workdir, which=which, step=step, examples=found.examples, seconds=seconds),
        metrics=results.metrics(model.tasks, found.totals.metrics, found.boundaries),
        best_constant=found.best_constant,
        per_class=results.per_class(model.tasks, found.totals.metrics),
        boundaries=found.boundaries,
        gates=None if found.totals.gates is None else found.totals.gates.summary(full_pass.choices(model)),
        extremes=found.extremes,
    )
    if jax.process_index() == 0:
        print(f"{found.examples} examples in {seconds:.1f} s, compilation and reading included\n")
        print(results.table(results.rows(model.tasks, evaluation.metrics, evaluation.best_constant)) + "\n")
        paths = results.write(evaluation, workdir / "evaluation")
        page = workdir / "evaluation" / "evaluation_page.html"
        page.write_text(evaluation_page.html(evaluation))
        for path in (*paths, page):
            print(f"written: {path}")
    return evaluation.metrics
