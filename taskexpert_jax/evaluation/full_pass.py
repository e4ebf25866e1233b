"""Full evaluation pass over a data set: metrics, gate statistics, boundary benchmark, best and worst examples."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import functools
import itertools
import math
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import frame_size
from taskexpert_jax.evaluation import extremes, inference, results, steps
from taskexpert_jax.evaluation.best_constant import LabelSample
from taskexpert_jax.evaluation.boundaries import BoundaryRun
from taskexpert_jax.evaluation.extremes import Extremes
from taskexpert_jax.evaluation.gate_statistics import GateStatistics
from taskexpert_jax.evaluation.image_means import ImageMeans
from taskexpert_jax.evaluation.inference import Inference
from taskexpert_jax.evaluation.results import Evaluation, Nonfinite
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.parallel import processes, sharding
from taskexpert_jax.tasks import Task
from taskexpert_jax.tasks.metrics import PooledMetric
from taskexpert_jax.tasks.metrics.boundary.quantisation import Quantisation, quantise
from taskexpert_jax.tasks.metrics.boundary.scores import BoundaryCounts

States = steps.MetricStates
HostBatch = Mapping[str, np.ndarray]
# (variables, gates, batch) -> (predictions by task, updated gates), under jit; gates: see `Totals`.
STRENGTH = "strength/"  # prefix of the batch keys of strengths
MOST_IDS = 5  # ids of predictions with NaN or Inf that are listed; all are counted
Forward = Callable[
    [Any, GateStatistics | None, Mapping[str, Any]], tuple[Mapping[str, jax.Array], GateStatistics | None]
]


class Totals(NamedTuple):
    """Sums over the examples so far, replicated over the devices."""

    metrics: States
    gates: GateStatistics | None  # None with several views, whose gates cannot be averaged


class Outputs(NamedTuple):
    """Outputs per example; every leaf has the batch as its first axis and is sharded like the batch.

    states: metric state of each single example.
    values: by task, see `Task.values`; few of them are fetched from the device.
    strengths: the probability in 8 bits for tasks with a boundary benchmark, (B, H, W) uint8; see `quantise`.
    """

    states: States
    values: dict[str, jax.Array]
    strengths: dict[str, jax.Array]


Step = Callable[[Any, Totals, Mapping[str, Any]], tuple[Totals, Outputs]]  # see `make_step`


class Pass(NamedTuple):
    """Results of a pass over all processes; for the fields see `results.Evaluation`."""

    examples: int
    totals: Totals  # on the host
    boundaries: dict[str, BoundaryCounts]
    extremes: dict[str, Extremes]
    best_constant: dict[str, float]
    nonfinite: dict[str, Nonfinite]
    image_means: Mapping[str, float] = MappingProxyType({})  # `task/metric_images` -> mean over images

    def evaluation(self, tasks: tuple[Task, ...], facts: Mapping[str, Any], slots: tuple[str, ...]) -> Evaluation:
        """Computed metrics with the facts of `results.facts`; slots: names of what the gates choose from, if any."""
        return Evaluation(
            tasks=tasks,
            facts=facts,
            metrics={**results.metrics(tasks, self.totals.metrics, self.boundaries), **self.image_means},
            best_constant=self.best_constant,
            per_class=results.per_class(tasks, self.totals.metrics),
            boundaries={
                name: counts
                for name, counts in self.boundaries.items()
                if len(counts.sumR) and name not in self.nonfinite
            },
            gates=None if self.totals.gates is None else self.totals.gates.summary(slots),
            extremes=self.extremes,
            nonfinite=self.nonfinite,
        )


def empty_totals(tasks: tuple[Task, ...], model: MultiTaskModel, *, single: bool) -> Totals:
    """Totals of no example, with statistics of the model's gates if `single`: one forward pass over the whole frame."""
    gating = model.decoder.gating if single else None
    gates = GateStatistics.zeros(gating.taps, len(tasks), len(gating.slots)) if gating else None
    return Totals(steps.empty_states(tasks), gates)


def model_forward(tasks: tuple[Task, ...], model: MultiTaskModel, infer: Inference) -> Forward:
    """Forward function of the model; updates the gate statistics of the tasks unless they are None."""
    names = [task.name for task in model.tasks]
    places = np.array([names.index(task.name) for task in tasks])

    def forward(variables: Any, gates: GateStatistics | None, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        image, window = batch["image"], batch["window"]
        if gates is None:
            return infer(variables, image, window), None
        predictions, _, own = inference.with_gates(model, variables, image, window, batch["mask"])
        return predictions, gates.merge(own.of_tasks(places))

    return forward


def make_step(tasks: tuple[Task, ...], forward: Forward, quantisation: Quantisation, mesh: Mesh) -> Step:
    """Jitted step (variables, totals, batch) -> (totals, outputs); the totals are donated.

    A batch may hold the strengths of a task, as `STRENGTH + task`; otherwise they are those of the predictions.
    """

    def step(variables: Any, totals: Totals, batch: Mapping[str, Any]) -> tuple[Totals, Outputs]:
        predictions, gates = forward(variables, totals.gates, batch)
        states = {task.name: single_states(task, predictions[task.name], batch) for task in tasks}
        merged = {name: totals.metrics[name].merge(state.reduce()) for name, state in states.items()}
        values = {task.name: task.values(predictions[task.name]) for task in tasks}
        strengths = {
            task.name: batch.get(STRENGTH + task.name, quantise(values[task.name], quantisation))
            for task in tasks
            if task.boundary_benchmark
        }
        return Totals(merged, gates), Outputs(states, values, strengths)

    places = (sharding.replicated(mesh), sharding.batch_sharding(mesh))
    return jax.jit(step, donate_argnums=1, out_shardings=places)


def single_states(task: Task, prediction: jax.Array, batch: Mapping[str, Any]) -> Any:
    """Metric states of the single examples, with leaves (B, ...)."""

    def single(prediction: jax.Array, label: jax.Array, mask: jax.Array) -> PooledMetric:
        return task.metric.from_model_output(prediction=prediction[None], label=label[None], mask=mask[None])

    inside = steps.in_window(prediction, batch["window"])
    return jax.vmap(single)(inside, batch[task.name], batch["mask"])


def run(
    config: ConfigDict,
    tasks: tuple[Task, ...],
    model: MultiTaskModel,
    variables: Any,
    batches: Iterable[HostBatch],
    mesh: Mesh,
    advance: Callable[[int], object] = lambda count: None,
) -> Pass:
    """Full pass of a model over this process's batches of an evaluation set, for some of its tasks.

    Errors as `run_step`, and so is `advance`.
    """
    forward = model_forward(tasks, model, inference.make_inference(model, config))
    single = inference.is_single(inference.views(config), frame_size(config))
    totals = empty_totals(tasks, model, single=single)
    step = make_step(tasks, forward, config.eval.boundary.quantise, mesh)
    return run_step(config.eval.boundary, tasks, step, variables, totals, batches, mesh, advance)


def run_step(
    benchmark: ConfigDict,
    tasks: tuple[Task, ...],
    step: Step,
    variables: Any,
    totals: Totals,
    batches: Iterable[HostBatch],
    mesh: Mesh,
    advance: Callable[[int], object] = lambda count: None,
) -> Pass:
    """Full pass over this process's batches of an evaluation set, with a step of `make_step`.

    benchmark: settings of the boundary benchmark, `config.eval.boundary`.
    totals: totals of no example.
    advance: called with the number of examples of all processes, padding included, whose results are on the host.

    Raises:
      UserError: invalid input of the boundary benchmark.
    """
    totals = jax.device_put(totals, sharding.replicated(mesh))
    on_host, to_send = itertools.tee(batches)
    with contextlib.closing(_Examples(benchmark, tasks, mesh)) as examples:
        before = None
        for batch, on_devices in zip(on_host, sharding.to_devices(to_send, mesh), strict=True):
            totals, outputs = step(variables, totals, on_devices)
            if before is not None:
                examples.add(*before)  # fetched one step late, so that the devices already run the next step
                advance(processes.global_size(mesh, len(batch["mask"])))
            before = batch, outputs
        if before is not None:
            examples.add(*before)
        found = examples.found(totals)
    results.warn_of_nonfinite(found.nonfinite)
    return found


def _fetch(values: jax.Array, row: int, rows: slice, columns: slice) -> np.ndarray:
    """Crop of one of this process's rows of a batch's values, on the host."""
    return processes.local_row(values, row)[rows, columns]


class _Example(NamedTuple):
    """Example with the label of one task, without padding: image (h, w, 3) uint8, label (h, w, label_channels)."""

    task: Task
    position: int
    example_id: str
    image: np.ndarray
    label: np.ndarray


class _Examples:
    """Accumulates the results of this process's examples on the host."""

    def __init__(self, benchmark: ConfigDict, tasks: tuple[Task, ...], mesh: Mesh):
        self._tasks = tasks
        self._mesh = mesh
        self._counted = 0
        self._batches = 0
        self._sample = LabelSample(tasks)
        benchmarked = [task.name for task in tasks if task.boundary_benchmark and benchmark.odsf]
        self._runs = {name: BoundaryRun(max_dist=benchmark.max_dist, labels=benchmark.labels) for name in benchmarked}
        benchmark_results = [f"{name}/odsF" for name in benchmarked]
        self._extremes = {task.name: Extremes(task.published(benchmark_results)) for task in tasks}
        self._image_means = ImageMeans(tasks)
        self._nonfinite: dict[str, list[tuple[int, str]]] = {task.name: [] for task in tasks}  # positions and ids

    def add(self, batch: HostBatch, outputs: Outputs) -> None:
        """Adds a batch: this process's rows, and the outputs of the step."""
        size = processes.global_size(self._mesh, len(batch["mask"]))
        rows = processes.batch_rows(self._mesh, size)
        batch = {**batch, "mask": batch["mask"] * rows.counted}
        self._sample.add(batch)
        places = self._batches * size + rows.own
        self._batches += 1
        states: Any = jax.tree.map(processes.local_rows, outputs.states)
        strengths = {name: processes.local_rows(outputs.strengths[name]) for name in self._runs}
        for row in np.flatnonzero(batch["mask"] > 0).tolist():
            self._counted += 1
            top, left, height, width = batch["window"][row].tolist()
            inside = (row, slice(top, top + height), slice(left, left + width))
            position, example_id = int(places[row]), str(batch["id"][row])
            for task in self._tasks:
                label = batch[task.name][inside]
                if states[task.name].nonfinite.low[row]:
                    self._nonfinite[task.name].append((position, example_id))
                    continue
                if (label == task.ignore).all():
                    continue
                example = _Example(task, position, example_id, batch["image"][inside], label)
                if task.name in self._runs:
                    truth = batch.get(task.benchmark_label, batch[task.name])[inside]
                    self._count_boundaries(example, truth[..., 0], strengths[task.name][inside])
                else:
                    state = jax.tree.map(lambda leaf, row=row: leaf[row], states[task.name])
                    self._image_means.add(task.name, state)
                    score = state.of_one_image(self._extremes[task.name].score.metric)
                    self._rank(example, score, functools.partial(_fetch, outputs.values[task.name], *inside))

    def _rank(self, example: _Example, score: float, values: Callable[[], np.ndarray]) -> None:
        """Keeps the example if it is among the best or the worst; `values` fetches its prediction."""
        task, position, example_id, image, label = example
        draw = lambda: extremes.pictures(task, image, values(), label)  # noqa: E731
        self._extremes[task.name].offer(score, position, example_id, draw)

    def _count_boundaries(self, example: _Example, truth: np.ndarray, strength: np.ndarray) -> None:
        """Starts counting the boundary pixels of an example, which is ranked when the count is done."""
        # Copies, because views would keep the whole batch in memory until then.
        example = example._replace(image=example.image.copy(), label=example.label.copy())
        known = truth != example.task.ignore
        truth, strength = truth * known, strength * known

        def scored(score: float) -> None:
            self._rank(example, score, lambda: strength.astype(np.float32) / 255)

        self._runs[example.task.name].add(strength, truth, scored)

    def found(self, totals: Totals) -> Pass:
        """Results over all processes; `totals` are those after the last step."""
        boundaries = {name: run.counts() for name, run in self._runs.items()}
        ranked = {task.name: self._extremes[task.name] for task in self._tasks}
        own = jax.process_index()
        for index, others in enumerate(processes.gather(ranked)):
            for name in ranked if index != own else ():
                ranked[name].merge(others[name])
        examples = sum(processes.gather(self._counted))
        nonfinite = {}
        for name in self._nonfinite:
            own = [place for places in processes.gather(self._nonfinite[name]) for place in places]
            if own:
                nonfinite[name] = Nonfinite(len(own), tuple(example_id for _, example_id in sorted(own)[:MOST_IDS]))
        means = {
            name: math.nan if name.split("/")[0] in nonfinite else mean
            for name, mean in self._image_means.results().items()
        }
        return Pass(examples, jax.device_get(totals), boundaries, ranked, self._sample.results(), nonfinite, means)

    def close(self) -> None:
        """Stops the threads."""
        for run in self._runs.values():
            run.close()
