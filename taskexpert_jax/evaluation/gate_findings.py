"""Findings of an inspection of a run's gates: statistics by task and tap, a summary table, and warnings."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from taskexpert_jax import json_file, text_table
from taskexpert_jax.evaluation.gate_statistics import GateSummary
from taskexpert_jax.models.decoders.decoder import MEMORY
from taskexpert_jax.tasks import Task

# Thresholds of the warnings, on means over the pixels of all images; see docs/evaluation.md.
UNIFORM = 0.99  # minimum normalised entropy of nearly uniform weights
COLLAPSED = 0.95  # minimum mean weight of an expert slot that dominates
BLIND = 0.001  # maximum variation of weights that are nearly the same at every pixel
UNUSED = 0.01  # an expert slot with a smaller mean weight is unused


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Results of an inspection, without the maps.

    Attributes:
      tasks: task records, in the config's order.
      facts: provenance and settings; see `results.facts`.
      gates: means over the pixels of all images.
      images: name of an image's folder -> means over the image's pixels.
    """

    tasks: tuple[Task, ...]
    facts: Mapping[str, Any]
    gates: GateSummary
    images: Mapping[str, GateSummary]

    @property
    def granularity(self) -> str:
        """Granularity of the gate weights, see `GateSpec`: token, image, static or uniform."""
        return self.facts["model"]["gate"]["granularity"]


def variation(gates: GateSummary) -> np.ndarray:
    """Variation of the weights between pixels, (T, S) float64 in [0, 1]; NaN for a single expert slot.

    Generalised Jensen-Shannon divergence of the pixels' weights (Lin 1991): the entropy of the mean weights minus the
    mean entropy of the weights, divided by log(slots). 0: the same weights at every pixel; 1: one-hot weights, with
    each expert slot at equally many pixels.
    """
    weights = np.maximum(gates.weights, 1e-30)
    of_mean = -(weights * np.log(weights)).sum(axis=-1) / (math.log(len(gates.slots)) or math.nan)
    return np.clip(of_mean - gates.entropy, 0, 1)


def lines(found: Inspection) -> list[str]:
    """Text table with a row per task: mean weight of the memory, entropy and variation at each tap."""
    taps = found.gates.weights.shape[1]
    has_memory = MEMORY in found.gates.slots
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
    """Sentence on weights that are constant because of the config; empty if the config does not make them so."""
    if len(found.gates.slots) == 1:
        return "By config there is a single expert slot, one expert without memory: its weight is 1 everywhere."
    return {
        "uniform": "By config (config.model.gate.granularity=uniform) there is no gate: all expert slots have equal "
        "weight everywhere.",
        "static": "By config (config.model.gate.granularity=static) the learned weights do not depend on the input: "
        "they are the same at every pixel of every image.",
        "image": "By config (config.model.gate.granularity=image) there is one set of weights per image: it is the "
        "same at every pixel of an image.",
    }.get(found.granularity, "")


def warnings(found: Inspection) -> list[str]:
    """Warnings on suspicious weights, one line per kind, with the threshold; effects of the config are excluded."""
    gates = found.gates
    if len(gates.slots) == 1 or found.granularity == "uniform":
        return []
    uniform = gates.entropy >= UNIFORM
    collapsed = gates.weights.max(axis=-1) >= COLLAPSED
    expected = found.granularity == "static" or (found.granularity == "image" and len(found.images) == 1)
    blind = (variation(gates) <= BLIND) & ~uniform & ~collapsed & (not expected)
    unused = np.argwhere((gates.weights < UNUSED).all(axis=0)).tolist()  # (tap, slot)
    kinds = (
        (uniform, f"nearly uniform (mean entropy at least {UNIFORM:g} of the maximum)"),
        (collapsed, f"collapsed (one expert slot has a mean weight of at least {COLLAPSED:g})"),
        (blind, f"nearly the same at every pixel (variation at most {BLIND:g})"),
    )
    text = [f"gates are {name}: {_places(found.tasks, of)}" for of, name in kinds if of.any()]
    if unused:
        named = ", ".join(f"{gates.slots[slot]} at tap {tap + 1}" for tap, slot in unused)
        text.append(f"not used by any task (mean weight below {UNUSED:g}): {named}")
    return text


def _places(tasks: Sequence[Task], where: np.ndarray) -> str:
    """Tasks and taps at which `where`, (T, S) bool, is true, in words."""
    if where.all():
        return "everywhere"
    named = []
    for task, of_task in zip(tasks, where, strict=True):
        taps = [str(tap) for tap in (np.flatnonzero(of_task) + 1).tolist()]
        if taps:
            named.append(f"{task.title} at tap{'s' if len(taps) > 1 else ''} {', '.join(taps)}")
    return "; ".join(named)


def to_json(found: Inspection) -> dict[str, Any]:
    """Content of inspection.json."""
    return {
        **found.facts,
        "warnings": warnings(found),
        "gates": {"choices": list(found.gates.slots), "tasks": _by_task(found.tasks, found.gates)},
        "images": {name: _by_task(found.tasks, gates) for name, gates in found.images.items()},
    }


def _by_task(tasks: Sequence[Task], gates: GateSummary) -> dict[str, Any]:
    spread = variation(gates)
    return {
        task.name: {
            "weights": json_file.finite(gates.weights[index].tolist()),
            "entropy": json_file.finite(gates.entropy[index].tolist()),
            "variation": json_file.finite(spread[index].tolist()),
        }
        for index, task in enumerate(tasks)
    }
