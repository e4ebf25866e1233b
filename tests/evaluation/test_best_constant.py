"""Scores of the best constant predictions on a sample of the labels."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax import tasks
from taskexpert_jax.evaluation import best_constant, steps
from taskexpert_jax.evaluation.best_constant import LabelSample
from taskexpert_jax.parallel import sharding

NAMES = ("semseg", "depth", "sal")
TASKS = tasks.build(NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), semseg_classes=("a", "b", "c"))


def batch(seed=0, size=(20, 30)):
    """Batch of four examples with some invalid pixels; the last example is padding."""
    random = np.random.default_rng(seed)
    labels = {
        "semseg": random.choice(np.array([0, 1, 2, 255], np.uint8), (4, *size, 1), p=[0.5, 0.2, 0.2, 0.1]),
        "depth": random.uniform(1, 5, (4, *size, 1)).astype(np.float32),
        "sal": random.integers(0, 2, (4, *size, 1)).astype(np.uint8),
    }
    labels["depth"][random.random((4, *size, 1)) < 0.2] = -1
    return {**labels, "image": np.zeros((4, *size, 3), np.uint8), "mask": np.array([1, 1, 1, 0], np.float32)}


def test_small_images_are_scored_whole(monkeypatch):
    monkeypatch.setattr(best_constant, "_SIDE", 16)  # several images, the last one incomplete
    sample, batches = LabelSample(TASKS), [batch(0), batch(1)]
    for of in batches:
        sample.add(of)
    results = sample.results()
    semseg, depth, sal = (np.concatenate([of[name][:3].ravel() for of in batches]) for name in NAMES)
    depth = depth[depth > 0].astype(np.float64)
    assert results["depth/rmse"] == pytest.approx(depth.std(), rel=1e-5)
    share = np.mean(semseg[semseg != 255] == 0)
    assert results["semseg/pixel_accuracy"] == pytest.approx(100 * share, rel=1e-6)
    assert results["semseg/mIoU"] == pytest.approx(100 * share / 3, rel=1e-6)
    precision = sal.mean()
    assert results["sal/maxF_plain"] == pytest.approx(100 * 1.3 * precision / (0.3 * precision + 1), rel=1e-6)


def test_of_large_images_about_two_thousand_pixels_are_taken():
    sample = LabelSample(TASKS)
    sample.add(batch(size=(200, 300)))
    assert 1_500 < len(sample._kept["sal"][0]) / 3 < 2_500


def test_a_task_without_labels_has_no_score_and_is_reported(caplog):
    labels = batch()
    labels["depth"][:] = -1
    complete, sample = LabelSample(TASKS), LabelSample(TASKS)
    complete.add(batch())
    sample.add(labels)
    found = sample.results()
    assert found.keys() == complete.results().keys()
    assert {name.split("/")[0] for name, value in found.items() if math.isnan(value)} == {"depth"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("depth: no valid label in the evaluation set")


def test_an_evaluation_without_labels_of_a_task_is_nan_and_reported(caplog):
    def step(variables, states, labels):
        predictions = {task.name: jnp.zeros((*labels["image"].shape[:3], task.channels)) for task in TASKS}
        return steps.merge_batch(TASKS, states, predictions, labels)

    labels = {**batch(), "window": np.array([[0, 0, 20, 30]] * 4, np.int32)}
    labels["depth"][:] = -1
    found = steps.run(step, {}, TASKS, [labels], sharding.one_device_mesh())
    assert {name.split("/")[0] for name, value in found.items() if math.isnan(value)} == {"depth"}
    assert [record.getMessage() for record in caplog.records] == [
        "depth: no valid label in the evaluation set: its metrics are nan"
    ]
