"""What the jitted step sees of a batch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax import inputs, progress, writers


def test_normalisation_is_the_familys_and_padding_is_exactly_zero():
    image = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    window = np.array([[1, 2, 3, 4], [0, 0, 6, 8]], np.int32)
    ours = np.asarray(inputs.normalise(jnp.asarray(image), jnp.asarray(window)))
    expected = (image / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    inside = np.zeros((2, 6, 8), bool)
    inside[0, 1:4, 2:6] = True
    inside[1] = True
    np.testing.assert_allclose(ours[inside], expected[inside], rtol=1e-5, atol=1e-6)
    assert (ours[~inside] == 0).all()


def test_a_resumed_run_writes_no_line_twice(tmp_path):
    writer = writers.RunWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    writer = writers.RunWriter(tmp_path, 2)
    writer.scalars(3, {"loss": 30.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_progress_counts_images_and_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    meter = progress.Progress(10, 1010, 8)
    now[0] += 4.0
    assert meter.images_per_second(30) == pytest.approx(40.0)
    line = meter.line(30, {"loss": 2.5, "loss/depth": 1.25, "grad_norm": 3.0})
    assert line == "step 30/1010  loss 2.5 (depth 1.25)  40 images/s  ETA 3m16s"
    now[0] += 100.0  # an evaluation
    meter.restart(30)
    now[0] += 2.0
    assert meter.images_per_second(40) == pytest.approx(40.0)
