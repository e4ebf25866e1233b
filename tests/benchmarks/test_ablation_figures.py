"""Figures of the ablation: what they show, on made-up tables; and the history of a tiny model's gates."""

import json

import numpy as np
import pytest

from benchmarks import ablation_figures, gate_history


def run(rung, seed, miou, loss):
    values = {"semseg/mIoU": miou, "depth/rmse": 0.5}
    return {"rung": rung, "seed": seed, "values": values, "losses": {"step": [10, 20], "semseg": loss}}


TABLE = {
    "against": "static",
    "runs": [
        run("static", 0, 40.0, [2.0, 1.0]),
        run("static", 1, 42.0, [2.0, 1.0]),
        run("full", 0, 43.0, [1.0, 0.9]),
        run("full", 1, 46.0, [2.0, 0.7]),
    ],
}


def test_the_differences_are_those_within_seeds():
    figure = ablation_figures.differences(TABLE)
    semseg, depth = (axis for axis in figure.axes if axis.get_visible())
    assert "mIoU" in semseg.get_title() and "right is better" in semseg.get_title()
    assert "left is better" in depth.get_title()
    ((mean, _),) = semseg.containers[0].lines[0].get_xydata()
    assert mean == pytest.approx(3.5)  # of 3 and 4
    (points,) = [line.get_xdata() for line in semseg.lines if len(line.get_xdata()) == 2 and line.get_marker() == "|"]
    assert sorted(points) == [3.0, 4.0]


def test_the_losses_are_relative_to_the_reference():
    figure = ablation_figures.losses(TABLE)
    (axis,) = (axis for axis in figure.axes if axis.get_visible())
    (line,) = [line for line in axis.lines if line.get_label() == "full"]
    np.testing.assert_allclose(line.get_xydata(), [[10, -25], [20, -20]])


def test_a_history_has_the_weights_of_every_slot(tmp_path, monkeypatch):
    output = tmp_path / "history.json"
    small = ["tasks=('semseg','depth')", "model.taps=2", "model.depth=2", "batch_size=8", "eval.batch_size=8"]
    arguments = ["full,scenes,tiny", "model.gate.init=even", *small, "--steps=2", "--every=1", "--images=8"]
    monkeypatch.setattr("sys.argv", ["gate_history.py", *arguments, f"--output={output}"])
    gate_history.main()
    content = json.loads(output.read_text())
    weights = np.array(content["weights"])
    assert content["steps"] == [0, 1, 2] and weights.shape == (3, 2, 2, 6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-4)
    np.testing.assert_allclose(weights[0], 1 / 6, atol=1e-4)  # an even start
    assert not np.allclose(weights[2], 1 / 6, atol=1e-4)
    picture = tmp_path / "history.svg"
    monkeypatch.setattr("sys.argv", ["ablation_figures.py", "gates", str(output), f"--output={picture}"])
    ablation_figures.main()
    assert "gate.init=even" in picture.read_text() and "tap 2" in picture.read_text()
