"""Throughput of a run and its time to the end."""

import pytest

from taskexpert_jax.training import throughput


def test_throughput_counts_images_and_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    meter = throughput.Throughput(10, 1010, 8)
    now[0] += 4.0
    assert meter.images_per_second(30) == pytest.approx(40.0)
    line = meter.line(30, {"loss": 2.5, "loss/depth": 1.25, "grad_norm": 3.0})
    assert line == "step 30/1010  loss 2.5 (depth 1.25)  40 images/s  ETA 3m16s"
    now[0] += 100.0  # an evaluation
    meter.restart(30)
    now[0] += 2.0
    assert meter.images_per_second(40) == pytest.approx(40.0)
