"""Results of an evaluation and their files: metrics.json, per_class.csv, and a text table."""

from collections.abc import Mapping
import csv
import dataclasses
import datetime
import importlib.metadata
import io
import json
import math
import pathlib
import platform
from types import MappingProxyType
from typing import Any, NamedTuple

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import installation, json_file, text_table
from taskexpert_jax.evaluation.extremes import Extremes
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.runs.load import Selected
from taskexpert_jax.tasks import Published, Task
from taskexpert_jax.tasks.metrics import MeanIoU, PooledMetric
from taskexpert_jax.tasks.metrics.boundary.scores import THRESHOLDS, BoundaryCounts, curve, scores

Values = dict[str, float]  # by `task/metric`
_PACKAGES = ("jax", "flax", "clu", "numpy", "scipy")  # their versions may change the last digits


class ClassScore(NamedTuple):
    """Results of one class: IoU in percent, and the numbers of labelled, predicted and correct pixels."""

    index: int
    name: str
    iou: float
    labelled: int
    predicted: int
    correct: int


class Nonfinite(NamedTuple):
    """Predictions of a task that have a NaN or Inf.

    examples: their number.
    ids: ids of the first ones; empty if they are not known.
    """

    examples: int
    ids: tuple[str, ...] = ()

    def sentence(self) -> str:
        """The number and the ids in words."""
        ids = ", ".join(self.ids) + (", ..." if self.examples > len(self.ids) else "")
        count = f"{self.examples} example{'s' if self.examples > 1 else ''}"
        return f"NaN or Inf in the predictions of {count}{f' ({ids})' if self.ids else ''}"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation.

    Attributes:
      tasks: task records, in the config's order.
      facts: provenance and settings; see `facts`.
      metrics: metrics of the model.
      best_constant: metrics of the best constant predictions.
      per_class: task name -> results of its classes, for tasks with classes.
      boundaries: task name -> boundary counts of the set, for tasks on which the boundary benchmark was run.
      gates: means over the set; None with predictions averaged over several views.
      extremes: task name -> best and worst examples.
      nonfinite: task name -> its predictions with NaN or Inf, for tasks that have any. Their metrics are NaN, and they
        are in none of `per_class` and `boundaries`.
    """

    tasks: tuple[Task, ...]
    facts: Mapping[str, Any]
    metrics: Values
    best_constant: Values
    per_class: Mapping[str, tuple[ClassScore, ...]]
    boundaries: Mapping[str, BoundaryCounts]
    gates: GateSummary | None
    extremes: Mapping[str, Extremes]
    nonfinite: Mapping[str, Nonfinite] = dataclasses.field(default_factory=dict)


class Row(NamedTuple):
    """Row of the table of metrics.

    published: set in the row of the task's published metric, otherwise None.
    constant: value of the best constant prediction; None if it was not scored.
    """

    task: Task
    metric: str
    published: Published | None
    value: float
    constant: float | None


def rows(tasks: tuple[Task, ...], metrics: Values, best_constant: Values) -> list[Row]:
    """Rows of the table, task by task, the published metric of each first."""
    lines = []
    for task in tasks:
        published = task.published(metrics)
        names = [name.split("/", 1)[1] for name in metrics if name.startswith(task.name + "/")]
        names.remove(published.metric)
        for metric in (published.metric, *names):
            name, mark = f"{task.name}/{metric}", published if metric == published.metric else None
            lines.append(Row(task, metric, mark, metrics[name], best_constant.get(name)))
    return lines


def table(lines: list[Row]) -> str:
    """Text table; the published metric of each task has a star and an arrow towards better values."""
    cells = [["task", "metric", "model", "best constant"]]
    for row in lines:
        arrow = f" {row.published.arrow} *" if row.published else ""
        constant = "-" if row.constant is None else f"{row.constant:.4g}"
        title = row.task.title if row.published else ""
        cells.append([title, row.metric + arrow, f"{row.value:.4g}", constant])
    return "\n".join(text_table.lines(cells, "<<>>"))


def metrics(
    tasks: tuple[Task, ...],
    states: Mapping[str, PooledMetric],
    boundaries: Mapping[str, BoundaryCounts] = MappingProxyType({}),
) -> Values:
    """`task/metric` -> value, from metric states on the host and from the counts of the boundary benchmark, if any.

    All values of a task are NaN if any of its predictions has a NaN or Inf.
    """
    values = {}
    for task in tasks:
        own = scores(boundaries[task.name]) if task.name in boundaries else {}
        if states[task.name].nonfinite.value():
            own = dict.fromkeys(own, math.nan)
        own |= states[task.name].compute()
        values |= {f"{task.name}/{name}": value for name, value in own.items()}
    return values


def nonfinite(tasks: tuple[Task, ...], states: Mapping[str, PooledMetric]) -> dict[str, Nonfinite]:
    """Number of predictions with NaN or Inf of the tasks that have any, from metric states on the host."""
    counts = {task.name: int(states[task.name].nonfinite.value()) for task in tasks}
    return {name: Nonfinite(count) for name, count in counts.items() if count}


def warn_of_nonfinite(found: Mapping[str, Nonfinite]) -> None:
    """Logs a line for each task with such predictions, in the first process."""
    for name, of in found.items() if jax.process_index() == 0 else ():
        logging.warning(f"{name}: {of.sentence()}: its metrics are nan")


def warn_of_unlabelled(name: str) -> None:
    """Logs a line for a task without any valid label, in the first process."""
    if jax.process_index() == 0:
        logging.warning(f"{name}: no valid label in the evaluation set: its metrics are nan")


def per_class(tasks: tuple[Task, ...], states: Mapping[str, PooledMetric]) -> dict[str, tuple[ClassScore, ...]]:
    """Results per class of the tasks scored by mean IoU, from metric states on the host; none where mIoU is NaN."""
    found = {}
    for task in tasks:
        state = states[task.name]
        if isinstance(state, MeanIoU) and not math.isnan(state.compute()["mIoU"]):
            confusion = state.confusion.value()
            columns = (state.per_class(), confusion.sum(axis=1), confusion.sum(axis=0), np.diagonal(confusion))
            values = zip(task.class_names, *(column.tolist() for column in columns), strict=True)
            found[task.name] = tuple(ClassScore(index, *of_class) for index, of_class in enumerate(values))
    return found


def facts(
    config: ConfigDict, *, workdir: pathlib.Path, checkpoint: Selected, examples: int, seconds: float
) -> dict[str, Any]:
    """Provenance and settings of an evaluation, as values that JSON can represent.

    seconds: duration of the pass over the set.
    """
    dataset = config.dataset
    return {
        "version": installation.version_text(),
        "workdir": str(workdir),
        "checkpoint": checkpoint.which,
        "step": checkpoint.step,
        "examples": examples,
        "seconds": round(seconds, 1),
        "variant": config.variant,
        "tasks": list(config.tasks),
        "dataset": {
            "name": dataset.name,
            "split": dataset.eval_split,
            "fingerprint": dataset.get("fingerprint", ""),
            "image_size": list(dataset.image_size),
            "downscale": dataset.downscale,
        },
        "eval": json.loads(config.eval.to_json_best_effort()),
        "model": json.loads(config.model.to_json_best_effort()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def to_json(found: Evaluation) -> dict[str, Any]:
    """Content of metrics.json."""
    shown = rows(found.tasks, found.metrics, found.best_constant)
    return {
        **found.facts,
        "published": {
            row.task.name: {
                "metric": row.metric,
                "value": row.value,
                "best_constant": row.constant,
                "higher_is_better": row.published.higher_is_better,
            }
            for row in shown
            if row.published
        },
        "metrics": found.metrics,
        "best_constant": found.best_constant,
        "nonfinite": {name: of._asdict() for name, of in found.nonfinite.items()},
        "per_class": {name: {of.name: of.iou for of in classes} for name, classes in found.per_class.items()},
        "boundary": {
            name: {
                "thresholds": THRESHOLDS.tolist(),
                **{key: of.tolist() for key, of in curve(counts)._asdict().items()},
            }
            for name, counts in found.boundaries.items()
        },
        "gates": _gates(found),
        "examples_ranked": {
            name: {
                "score": of.score.metric,
                **{
                    end: [{"id": entry.example_id, "score": entry.score} for entry in entries]
                    for end, entries in (("worst", of.worst), ("best", of.best))
                },
            }
            for name, of in found.extremes.items()
        },
    }


def _gates(found: Evaluation) -> dict[str, Any] | None:
    if found.gates is None:
        return None
    by_task = {
        task.name: {"weights": weights.tolist(), "entropy": entropy.tolist()}
        for task, weights, entropy in zip(found.tasks, found.gates.weights, found.gates.entropy, strict=True)
    }
    return {"choices": list(found.gates.slots), "tasks": by_task}


def texts(found: Evaluation) -> dict[str, str]:
    """Files by name: metrics.json, and per_class.csv, which has no row if there is no task with classes."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("task", *ClassScore._fields))
    writer.writerows((name, *of) for name, classes in found.per_class.items() for of in classes)
    metrics_json = json.dumps(json_file.finite(to_json(found)), indent=2, allow_nan=False) + "\n"
    return {"metrics.json": metrics_json, "per_class.csv": table.getvalue()}
