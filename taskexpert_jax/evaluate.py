"""Evaluation: every task's metrics over a data set, exact for any batch size, padding and number of devices."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import json
import pathlib
import time
from typing import Any

from clu import metrics as clu_metrics
import jax
from jax.sharding import Mesh
import numpy as np

from taskexpert_jax import inputs, optimizer, sharding, train_state
from taskexpert_jax.checkpoint import Checkpoints
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import taskexpert
from taskexpert_jax.models.taskexpert import TaskExpert
from taskexpert_jax.tasks import Task, from_config

Batch = Mapping[str, Any]
MetricStates = dict[str, clu_metrics.Metric]
Results = dict[str, float]
_SAMPLE_PIXELS = 2_000_000  # label pixels that the best constant is fitted to, spread over the set


def best_task(config: Any, tasks: tuple[Task, ...]) -> Task:
    """The task that decides which checkpoint is the best; raises UserError where it is not among the tasks."""
    for task in tasks:
        if task.name == config.checkpoint.best_task:
            return task
    names = ", ".join(task.name for task in tasks)
    raise UserError(f"config.checkpoint.best_task={config.checkpoint.best_task!r} is not among the tasks ({names})")


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


def make_eval_step(model: TaskExpert, mesh: Mesh) -> Callable[[Any, MetricStates, Batch], MetricStates]:
    """(variables, states, batch) -> states, jitted; the states are donated."""

    def step(variables: Any, states: MetricStates, batch: Batch) -> MetricStates:
        image = inputs.normalise(batch["image"], batch["window"])
        predictions: Any = model.apply(variables, image, train=False)
        return merge_batch(model.tasks, states, predictions, batch)

    return jax.jit(step, donate_argnums=1, out_shardings=sharding.replicated(mesh))


def make_predict_step(model: TaskExpert, mesh: Mesh) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(variables, {image, window}) -> {task: values}, jitted; what a user wants to see, see `Task.values`."""

    def step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        predictions: Any = model.apply(variables, inputs.normalise(batch["image"], batch["window"]), train=False)
        return {task.name: task.values(predictions[task.name]) for task in model.tasks}

    return jax.jit(step, out_shardings=sharding.replicated(mesh))


def compute(tasks: tuple[Task, ...], states: MetricStates) -> Results:
    """`task/metric` -> value, after one transfer from the devices."""
    on_host: Any = jax.device_get(states)
    return {f"{task.name}/{key}": float(v) for task in tasks for key, v in on_host[task.name].compute().items()}


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


def constant_results(
    tasks: tuple[Task, ...], batches: Callable[[], Iterable[Mapping[str, np.ndarray]]], mesh: Mesh
) -> Results:
    """The metrics of the best constant prediction of each task, fitted to the evaluated labels themselves.

    No constant can do better, so a model that does has learned something. Fitted on a sample of the pixels, scored on
    all.

    Args:
      tasks: the tasks.
      batches: makes one pass over the evaluation set.
      mesh: where to score.
    """
    constants = _fit_constants(tasks, batches())

    def step(constants: Mapping[str, jax.Array], states: MetricStates, batch: Batch) -> MetricStates:
        predictions = {
            name: jax.numpy.broadcast_to(value, (*batch[name].shape[:3], len(value)))
            for name, value in constants.items()
        }
        return merge_batch(tasks, states, predictions, batch)

    jitted = jax.jit(step, donate_argnums=1, out_shardings=sharding.replicated(mesh))
    on_devices = jax.device_put(constants, sharding.replicated(mesh))
    return run(jitted, on_devices, tasks, batches(), mesh)


def _fit_constants(tasks: tuple[Task, ...], batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    kept: dict[str, list[np.ndarray]] = {task.name: [] for task in tasks}
    stride = None
    for batch in batches:
        height, width = batch["image"].shape[1:3]
        stride = stride or max(1, int(np.sqrt(height * width / 2_000)))  # about 2000 pixels an image
        for task in tasks:
            label = batch[task.name][batch["mask"] > 0, ::stride, ::stride].reshape(-1, task.label_channels)
            kept[task.name].append(label[(label != task.ignore).all(axis=-1)])
    constants = {}
    for task in tasks:
        labels = np.concatenate(kept[task.name]).astype(np.float64)
        labels = labels[:: max(1, len(labels) // _SAMPLE_PIXELS)]
        if not len(labels):
            raise UserError(f"no valid label of task {task.name} in the evaluation set: remove it from config.tasks")
        constants[task.name] = task.best_constant(labels).astype(np.float32)
    return constants


def table(tasks: tuple[Task, ...], results: Results, constants: Results | None = None) -> str:
    """A table for people: a line a metric; the published metric of each task is starred and carries its direction."""
    lines = [f"{'task':<24}{'metric':<16}{'model':>10}" + (f"{'best constant':>16}" if constants else "")]
    for task in tasks:
        for name in (key for key in results if key.startswith(task.name + "/")):
            metric = name.split("/", 1)[1]
            main = metric == task.main_metric
            arrow = (" ↑ *" if task.higher_is_better else " ↓ *") if main else ""
            line = f"{task.title if main else '':<24}{metric + arrow:<16}{results[name]:>10.4g}"
            lines.append(line + (f"{constants[name]:>16.4g}" if constants else ""))
    return "\n".join(lines)


def load(config: Any, workdir: pathlib.Path, which: str, mesh: Mesh) -> tuple[TaskExpert, Any, int]:
    """(model, variables on the mesh, step) of a run's checkpoint, without its optimiser.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      mesh: where the variables go.
    """
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    _, abstract, _ = train_state.abstract_and_shardings(model, optimizer.build(config), mesh, config.seed)
    with contextlib.closing(Checkpoints(workdir, best_task(config, tasks), read_only=True)) as checkpoints:
        step = checkpoints.select(which)
        variables = checkpoints.restore_variables(step, abstract)
    return model, variables, step


def evaluate(
    config: Any, workdir: pathlib.Path, which: str, eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]
) -> Results:
    """Evaluates a checkpoint, prints a table beside the best constants, and writes `evaluation/metrics.json`.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      eval_batches: makes one pass over the evaluation set.

    Raises:
      UserError: no such checkpoint, or one of another architecture (with a diff).
    """
    mesh = sharding.make_mesh(config.mesh, {"eval.batch_size": config.eval.batch_size})
    with sharding.use(mesh):
        model, variables, step = load(config, workdir, which, mesh)
        print(f"evaluating {workdir} at step {step} ({which})")
        started = time.monotonic()
        counted = _Counter(eval_batches())
        results = run(make_eval_step(model, mesh), variables, model.tasks, counted, mesh)
        seconds = time.monotonic() - started
        constants = constant_results(model.tasks, eval_batches, mesh)
    print(f"{counted.examples} examples in {seconds:.1f} s, compilation and reading included\n")
    print(table(model.tasks, results, constants))
    if jax.process_index() == 0:
        report = {"step": step, "examples": counted.examples, "metrics": results, "best_constant": constants}
        path = workdir / "evaluation" / "metrics.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nwritten: {path}")
    return results


class _Counter:
    """Iterates over batches and counts the examples that are not padding, on this host."""

    def __init__(self, batches: Iterable[Mapping[str, np.ndarray]]):
        self._batches = batches
        self.examples = 0

    def __iter__(self):
        for batch in self._batches:
            self.examples += int(batch["mask"].sum())
            yield batch
