"""What an inspection found of a run's gates: numbers by task and tap, the lines that sum them up, and warnings."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from taskexpert_jax import text_table
from taskexpert_jax.evaluation import results
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.models.decoders.taskexpert import MEMORY
from taskexpert_jax.tasks import Task

# Thresholds of the warnings, on means over the pixels of all images; see docs/evaluation.md.
UNIFORM = 0.99  # entropy, of its largest value, from which weights are nearly the same
COLLAPSED = 0.95  # mean weight from which one choice has taken all
BLIND = 0.001  # variation up to which weights are nearly the same at every pixel
UNUSED = 0.01  # mean weight below which a choice has no part


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Everything that one inspection found, but for the maps.

    Attributes:
      tasks: the tasks, in the config's order.
      facts: what was inspected, and how; see `results.facts`.
      gates: means over the pixels of all images.
      images: by name of an image's folder, the means over the image's own pixels.
    """

    tasks: tuple[Task, ...]
    facts: Mapping[str, Any]
    gates: GateSummary
    images: Mapping[str, GateSummary]

    @property
    def granularity(self) -> str:
        """What one set of weights is for: a token, an image, or all images; uniform: no gate."""
        return self.facts["model"]["gate"]["granularity"]


def variation(gates: GateSummary) -> np.ndarray:
    """How much the weights differ between pixels, (T, S) float64 in [0, 1]; nan for a single choice.

    The entropy of the mean weights less the mean entropy of the weights, as a share of log(choices): the generalised
    Jensen-Shannon divergence of the pixels' weights (Lin 1991). 0: the same weights at every pixel; 1: each pixel has
    one choice, and all choices equally many pixels.
    """
    weights = np.maximum(gates.weights, 1e-30)
    of_mean = -(weights * np.log(weights)).sum(axis=-1) / (math.log(len(gates.choices)) or math.nan)
    return np.clip(of_mean - gates.entropy, 0, 1)


def lines(found: Inspection) -> list[str]:
    """A table as text, a row a task: the memory's mean weight and the entropy, tap by tap."""
    taps = found.gates.weights.shape[1]
    has_memory = MEMORY in found.gates.choices
    span = "tap 1" if taps == 1 else f"taps 1 to {taps}"
    rows = [[f"mean over {span}", *(["memory's weight"] if has_memory else []), "entropy", "variation"]]
    spread = variation(found.gates)
    for index, task in enumerate(found.tasks):
        columns = [found.gates.weights[index, :, -1]] if has_memory else []
        columns += [found.gates.entropy[index], spread[index]]
        rows.append([task.title, *(" ".join(_number(value) for value in column) for column in columns)])
    return text_table.lines(rows, "<" * len(rows[0]))


def _number(value: float) -> str:
    return "   -" if math.isnan(value) else f"{value:4.2f}"


def by_design(found: Inspection) -> str:
    """A sentence where the config leaves the gates nothing to show, else empty."""
    if len(found.gates.choices) == 1:
        return "There is a single choice, one expert without memory: its weight is 1 everywhere, by the config."
    return {
        "uniform": "There is no gate (config.model.gate.granularity=uniform): all choices weigh the same everywhere, "
        "by the config.",
        "static": "The weights are learned, but blind to the input (config.model.gate.granularity=static): they are "
        "the same at every pixel of every image, by the config.",
        "image": "There is one set of weights an image (config.model.gate.granularity=image): it is the same at every "
        "pixel of an image, by the config.",
    }.get(found.granularity, "")


def warnings(found: Inspection) -> list[str]:
    """What is suspicious, a line a kind, with its threshold; nothing that the config itself makes so."""
    gates = found.gates
    if len(gates.choices) == 1 or found.granularity == "uniform":
        return []
    uniform = gates.entropy >= UNIFORM
    collapsed = gates.weights.max(axis=-1) >= COLLAPSED
    expected = found.granularity == "static" or (found.granularity == "image" and len(found.images) == 1)
    blind = (variation(gates) <= BLIND) & ~uniform & ~collapsed & (not expected)
    unused = np.argwhere((gates.weights < UNUSED).all(axis=0)).tolist()  # (tap, choice)
    kinds = (
        (uniform, f"nearly uniform (mean entropy at least {UNIFORM:g} of the largest)"),
        (collapsed, f"collapsed (one choice has a mean weight of at least {COLLAPSED:g})"),
        (blind, f"nearly the same at every pixel (variation at most {BLIND:g})"),
    )
    text = [f"gates are {name}: {_places(found.tasks, of)}" for of, name in kinds if of.any()]
    if unused:
        named = ", ".join(f"{gates.choices[choice]} at tap {tap + 1}" for tap, choice in unused)
        text.append(f"not used by any task (mean weight below {UNUSED:g}): {named}")
    return text


def _places(tasks: Sequence[Task], where: np.ndarray) -> str:
    """The tasks and taps where (T, S) is true, in words."""
    if where.all():
        return "everywhere"
    named = []
    for task, of_task in zip(tasks, where, strict=True):
        taps = [str(tap) for tap in (np.flatnonzero(of_task) + 1).tolist()]
        if taps:
            named.append(f"{task.title} at tap{'s' if len(taps) > 1 else ''} {', '.join(taps)}")
    return "; ".join(named)


def to_json(found: Inspection) -> dict[str, Any]:
    """The content of inspection.json."""
    return {
        **found.facts,
        "warnings": warnings(found),
        "gates": {"choices": list(found.gates.choices), "tasks": _by_task(found.tasks, found.gates)},
        "images": {name: _by_task(found.tasks, gates) for name, gates in found.images.items()},
    }


def _by_task(tasks: Sequence[Task], gates: GateSummary) -> dict[str, Any]:
    spread = variation(gates)
    return {
        task.name: {
            "weights": gates.weights[index].tolist(),
            "entropy": results.finite(gates.entropy[index].tolist()),
            "variation": results.finite(spread[index].tolist()),
        }
        for index, task in enumerate(tasks)
    }
