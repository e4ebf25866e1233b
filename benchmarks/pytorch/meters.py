"""Times of all metrics but odsF, compared with plain loops over classes and thresholds in PyTorch.

Both take the logits and labels of the same full-size batch in memory and update running sums. Ours is the jitted merge
of metric states that evaluation uses; PyTorch's follows the field's code, a mask for each class and each threshold.
They alternate. Needs requirements-benchmarks.txt.
"""

import argparse
from collections.abc import Callable, Mapping
import statistics
import time
from typing import Any

import jax
import numpy as np
import torch

from configs import nyud, pascal_context
from taskexpert_jax.tasks import Task, from_config

BATCH_SIZE = 8
Sums = dict[str, Any]


def made_up_batch(
    tasks: tuple[Task, ...], size: tuple[int, int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random predictions (B,H,W,channels) float32 and labels (B,H,W,c), a tenth of the pixels ignored."""
    random = np.random.default_rng(0)
    predictions, labels = {}, {}
    for task in tasks:
        shape = (BATCH_SIZE, *size)
        predictions[task.name] = random.standard_normal((*shape, task.channels), np.float32)
        if task.channels == 1 and task.kind.name == "depth":
            predictions[task.name] = np.abs(predictions[task.name]) + 1
        if np.dtype(task.label_dtype).kind == "u":
            label = random.integers(0, max(task.channels, 2), (*shape, 1)).astype(task.label_dtype)
        else:
            label = random.uniform(0.5, 9, (*shape, task.label_channels)).astype(task.label_dtype)
            if task.label_channels == 3:
                label /= np.linalg.norm(label.astype(np.float32), axis=-1, keepdims=True).astype(label.dtype)
        labels[task.name] = np.where(random.random((*shape, 1)) < 0.1, np.asarray(task.ignore, label.dtype), label)
    return predictions, labels


def loop_over_classes(sums: Sums, logits: torch.Tensor, label: torch.Tensor, task: Task) -> None:
    """Adds intersection and union, class by class."""
    prediction, label = logits.movedim(-1, 1).argmax(1), label[..., 0]  # channels first: a tenth of the time
    valid = label != task.ignore
    for index in range(task.channels):
        true, predicted = label == index, prediction == index
        sums["tp", index] = sums.get(("tp", index), 0) + (true & predicted & valid).sum()
        sums["fp", index] = sums.get(("fp", index), 0) + (~true & predicted & valid).sum()
        sums["fn", index] = sums.get(("fn", index), 0) + (true & ~predicted & valid).sum()


def depth_errors(sums: Sums, prediction: torch.Tensor, label: torch.Tensor, task: Task) -> None:
    """Adds the usual depth errors."""
    valid = label != task.ignore
    prediction, label = prediction.clamp(min=1e-9)[valid], label[valid]
    ratio = torch.maximum(prediction / label, label / prediction)
    found = {
        "squares": ((prediction - label) ** 2).sum(),
        "log squares": ((prediction.log() - label.log()) ** 2).sum(),
        "abs rel": ((prediction - label).abs() / label).sum(),
        "sq rel": ((prediction - label) ** 2 / label).sum(),
        "count": valid.sum(),
        **{f"delta {power}": (ratio < 1.25**power).sum() for power in (1, 2, 3)},
    }
    for name, value in found.items():
        sums[name] = sums.get(name, 0) + value


def angles(sums: Sums, prediction: torch.Tensor, label: torch.Tensor, task: Task) -> None:
    """Adds the angles between unit vectors, and keeps them for the median."""
    label = label.float()
    valid = (label != task.ignore).all(-1)
    prediction = torch.nn.functional.normalize(prediction, dim=-1)[valid]
    label = torch.nn.functional.normalize(label, dim=-1)[valid]
    angle = torch.rad2deg(2 * torch.atan2((prediction - label).norm(dim=-1), (prediction + label).norm(dim=-1)))
    sums["angle"] = sums.get("angle", 0) + angle.sum()
    for limit in (11.25, 22.5, 30):
        sums["within", limit] = sums.get(("within", limit), 0) + (angle < limit).sum()
    sums["angles"] = angle  # for the median; only the last batch's, to bound memory


def loop_over_thresholds(sums: Sums, logits: torch.Tensor, label: torch.Tensor, task: Task) -> None:
    """Adds counts at 19 thresholds, for both forms of maxF."""
    label = label[..., 0]
    valid = label != task.ignore
    probability = logits.softmax(-1)[..., 1]
    for form, value in (("field", probability.sigmoid()), ("plain", probability)):
        for step in range(1, 20):
            positive = value > 0.05 * step
            sums[form, step, "tp"] = sums.get((form, step, "tp"), 0) + (positive & (label == 1) & valid).sum()
            sums[form, step, "positive"] = sums.get((form, step, "positive"), 0) + (positive & valid).sum()
    sums["true"] = sums.get("true", 0) + ((label == 1) & valid).sum()


def boundary_losses(sums: Sums, logits: torch.Tensor, label: torch.Tensor, task: Task) -> None:
    """Adds the weighted cross entropy of the logits and, as in the field's evaluation, of their sigmoid."""
    valid = label != task.ignore
    target = (label == 1).float()
    for form, values in (("plain", logits), ("field", logits.sigmoid())):
        terms = torch.nn.functional.binary_cross_entropy_with_logits(
            values, target, reduction="none", pos_weight=torch.tensor(19.0)
        )
        sums[form] = sums.get(form, 0) + terms[valid].sum() / 20
    sums["count"] = sums.get("count", 0) + valid.sum()


METERS: Mapping[str, Callable[[Sums, torch.Tensor, torch.Tensor, Task], None]] = {
    "semseg": loop_over_classes,
    "human_parts": loop_over_classes,
    "depth": depth_errors,
    "normals": angles,
    "sal": loop_over_thresholds,
    "edge": boundary_losses,
}


def seconds(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def compare_meters(tasks: tuple[Task, ...], size: tuple[int, int], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds per batch of PyTorch's loop and of ours, by task; medians of alternating rounds."""
    predictions, labels = made_up_batch(tasks, size)
    mask = np.ones(BATCH_SIZE, np.float32)
    found = {}
    for task in tasks:
        ours = jax.device_put({"prediction": predictions[task.name], "label": labels[task.name], "mask": mask})
        step = jax.jit(
            lambda state, prediction, label, mask, task=task: state.merge(
                task.metric.from_model_output(prediction=prediction, label=label, mask=mask)
            )
        )
        state, sums = task.metric.empty(), {}
        channels_first = torch.from_numpy(predictions[task.name]).movedim(-1, 1).contiguous().movedim(1, -1)
        theirs = channels_first, torch.from_numpy(labels[task.name])
        times: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            reference = seconds(lambda: METERS[task.name](sums, *theirs, task))  # noqa: B023
            times.append((reference, seconds(lambda: jax.block_until_ready(step(state, **ours)))))  # noqa: B023
        found[task.name] = tuple(statistics.median(column) for column in zip(*times[1:], strict=True))
    return found


def run(arguments: argparse.Namespace) -> None:
    """Prints a table for each benchmark."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; jax {jax.__version__}, batches of {BATCH_SIZE}"
    )
    for name, module in (("nyud", nyud), ("pascal_context", pascal_context)):
        config = module.get_config("vit_b16")
        size = tuple(config.dataset.image_size)
        found = compare_meters(from_config(config), size, arguments.rounds)
        print(f"\n| {name}, {size[0]}x{size[1]} | PyTorch, ms per batch | ours | ratio |\n|---|---|---|---|")
        total = tuple(sum(column) for column in zip(*found.values(), strict=True))
        for task, (theirs, ours) in {**found, "all": total}.items():
            print(f"| {task} | {1e3 * theirs:.0f} | {1e3 * ours:.0f} | {theirs / ours:.1f} |")
