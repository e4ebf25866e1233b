"""Means of metrics over images: MTAN averages batches, so its numbers are not those of all pixels together."""

import math

import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import nyud13
from taskexpert_jax import tasks
from taskexpert_jax.evaluation import full_pass, steps
from taskexpert_jax.parallel import sharding

NAMES = ("depth", "disparity", "normals")
SIZE = (8, 12)


def built(image_means):
    return tasks.build(NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), image_means=image_means)


def batch_of(first):
    """Two examples: the first batch has two with few and many labels, the second one without labels and padding."""
    random = np.random.default_rng(first)
    batch = {
        "image": np.zeros((2, *SIZE, 3), np.uint8),
        "window": np.tile([0, 0, *SIZE], (2, 1)).astype(np.int32),
        "mask": np.array([1, first], np.float32),
        "id": np.array(["a", "b"]),
    }
    for name in NAMES:
        label = random.uniform(1, 9, (2, *SIZE, 3 if name == "normals" else 1))
        if name == "normals":
            label /= np.linalg.norm(label, axis=-1, keepdims=True)
        label[random.random((2, *SIZE)) < (0.8 if first else 1)] = 255 if name == "normals" else -1
        batch[name] = label.astype(np.float16 if name == "normals" else np.float32)
    batch["depth"][1, 0, :5] = 3
    return batch


def evaluated(image_means, bad=None):
    """Metrics of a full pass in which every prediction is 2, or the vector (1, 1, 1)."""
    found = built(image_means)
    mesh = sharding.one_device_mesh()
    benchmark = ConfigDict({"odsf": False, "max_dist": 0.05, "labels": "lines", "quantise": "truncate"})

    def forward(variables, gates, batch):
        maps = {task.name: jnp.full((2, *SIZE, task.channels), 2.0) for task in found}
        if bad:
            maps[bad] = maps[bad].at[0, 0, 0, 0].set(jnp.nan)
        return maps, None

    with sharding.use(mesh):
        totals = full_pass.Totals(steps.empty_states(found), None)
        step = full_pass.make_step(found, forward, benchmark.quantise, mesh)
        passed = full_pass.run_step(benchmark, found, step, {}, totals, [batch_of(1), batch_of(0)], mesh)
    return passed.evaluation(found, {}, ()).metrics


def test_each_image_counts_once_however_many_labels_it_has():
    metrics = evaluated(True)
    batch = batch_of(1)
    expected = {}
    for name in ("depth", "disparity"):
        labels = [label[label > 0].astype(np.float64) for label in batch[name]]
        expected[f"{name}/abs_err_images"] = np.mean([np.mean(np.abs(2 - g)) for g in labels])
        expected[f"{name}/abs_rel_images"] = np.mean([np.mean(np.abs(2 - g) / g) for g in labels])
        pooled = np.concatenate(labels)
        assert metrics[f"{name}/abs_err"] == pytest.approx(np.mean(np.abs(2 - pooled)), rel=1e-6)
    angles = []
    for label in batch["normals"]:
        vectors = label[(label != 255).all(axis=-1)].astype(np.float64)
        cosine = vectors @ np.full(3, 3**-0.5) / np.linalg.norm(vectors, axis=-1)
        angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    expected["normals/mean_images"] = np.mean([angle.mean() for angle in angles])
    for limit in ("11.25", "22.5", "30"):
        expected[f"normals/within_{limit}_images"] = np.mean([100 * np.mean(angle < float(limit)) for angle in angles])
    medians = metrics["normals/median_images"]
    found = {name: value for name, value in metrics.items() if name.endswith("_images")}
    assert found == pytest.approx({**expected, "normals/median_images": medians}, rel=1e-5)
    assert medians == pytest.approx(np.mean([np.median(angle) for angle in angles]), abs=0.5)  # of few pixels
    assert abs(metrics["depth/abs_err_images"] - metrics["depth/abs_err"]) > 1e-3


def test_they_are_reported_only_if_the_config_asks_for_them():
    assert not any(name.endswith("_images") for name in evaluated(False))
    config = nyud13.get_config("tiny")
    assert [bool(task.image_means) for task in tasks.from_config(config)] == [False, True, True]
    config.eval.image_means = False
    assert not any(task.image_means for task in tasks.from_config(config))


def test_a_prediction_that_is_not_finite_makes_them_nan():
    metrics = evaluated(True, bad="depth")
    assert math.isnan(metrics["depth/abs_err_images"]) and not math.isnan(metrics["disparity/abs_err_images"])
