"""Figures of the ablation: what they show, on made-up tables; and the history of a tiny model's gates."""

import contextlib
import json

import matplotlib as mpl
import numpy as np
import pytest

from benchmarks import ablation_figures, gate_history
from taskexpert_jax.errors import UserError


def run(rung, seed, miou, loss):
    values = {"semseg/mIoU": miou, "depth/rmse": 0.5}
    losses = {"step": [10, 20], "semseg": loss}
    return {"rung": rung, "seed": seed, "values": values, "gates": None, "slots": [], "losses": losses}


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


def test_the_style_ends_with_the_drawing(tmp_path):
    table = tmp_path / "ablation.json"
    table.write_text(json.dumps(TABLE))
    before = dict(mpl.rcParams)
    ablation_figures.draw("losses", [table], tmp_path / "losses.svg")
    assert dict(mpl.rcParams) == before
    assert "semseg loss" in (tmp_path / "losses.svg").read_text()  # text stays text


def test_the_losses_are_relative_to_the_reference():
    figure = ablation_figures.losses(TABLE)
    (axis,) = (axis for axis in figure.axes if axis.get_visible())
    (line,) = [line for line in axis.lines if line.get_label() == "full"]
    np.testing.assert_allclose(line.get_xydata(), [[10, -25], [20, -20]])


def test_a_history_has_the_weights_of_every_slot(tmp_path):
    output = tmp_path / "history.json"
    small = ["tasks=('semseg','depth')", "model.taps=2", "model.depth=2", "batch_size=8", "eval.batch_size=8"]
    arguments = ["full,scenes,tiny", "model.gate.init=even", *small, "--steps=2", "--every=1", "--images=8"]
    assert gate_history.main([*arguments, f"--output={output}"]) == 0
    content = json.loads(output.read_text())
    weights = np.array(content["weights"])
    assert content["steps"] == [0, 1, 2] and weights.shape == (3, 2, 2, 6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-4)
    np.testing.assert_allclose(weights[0], 1 / 6, atol=1e-4)  # an even start
    assert not np.allclose(weights[2], 1 / 6, atol=1e-4)
    picture = tmp_path / "history.svg"
    assert ablation_figures.main(["gates", str(output), f"--output={picture}"]) == 0
    assert "gate.init=even" in picture.read_text() and "tap 2" in picture.read_text()


def in_file(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def whole(table):
    """The table as the program writes it."""
    return {**table, "runs": [{"gates": None, "slots": [], **each} for each in table["runs"]]}


@pytest.mark.parametrize(
    ("figure", "content", "message"),
    [
        ("differences", "", "is not a table of benchmarks/ablation.py (it is empty)"),
        ("differences", '{"against": "static", "runs": [', "is not a table"),
        ("differences", {"against": "static", "runs": [{"rung": "full"}]}, "runs.0.seed is missing"),
        ("differences", {"against": "static", "runs": {}}, "runs is {}, and must be an array"),
        ("differences", {**whole(TABLE), "against": "full_2"}, "no rung has a seed that full_2"),
        ("losses", {**whole(TABLE), "runs": whole(TABLE)["runs"][2:]}, "no rung with losses has a seed that static"),
        ("gates", whole(TABLE), "is not a history of benchmarks/gate_history.py (rung is missing)"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, capsys, figure, content, message):
    file = in_file(tmp_path / "a table.json", content)
    assert ablation_figures.main([figure, str(file), f"--output={tmp_path / 'figure.svg'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "figure.svg").exists()


def test_losses_of_other_steps_are_not_compared(tmp_path, capsys):
    table = whole(TABLE)
    table["runs"][2] = {**table["runs"][2], "losses": {"step": [10, 30], "semseg": [1.0, 0.9]}}
    file = in_file(tmp_path / "table.json", table)
    assert ablation_figures.main(["losses", str(file), f"--output={tmp_path / 'figure.svg'}"]) == 2
    assert "losses of full, seed 0, are of other steps than those of static" in capsys.readouterr().err


def test_a_figure_is_of_one_table_and_does_not_replace_one(tmp_path, capsys):
    file = in_file(tmp_path / "table.json", whole(TABLE))
    assert ablation_figures.main(["differences", str(file), str(file), f"--output={tmp_path / 'figure.svg'}"]) == 2
    assert "give one table, which has all rungs; got 2" in capsys.readouterr().err
    assert ablation_figures.main(["differences", str(file), f"--output={file}"]) == 2
    assert "give a file with the ending .svg, .pdf, .png" in capsys.readouterr().err
    assert json.loads(file.read_text()) == whole(TABLE)
    assert ablation_figures.main(["differences", str(file), f"--output={tmp_path / 'figure.png'}"]) == 0


HISTORY = {"rung": "full", "changes": [], "tasks": ["depth"], "slots": ["expert 1", "memory"], "steps": [0, 1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [[[[0.5, 0.5]]]]}, "the weights are not those of its steps, tasks and slots"),
        ({"weights": [[[[0.5, 0.5]]], [[[0.5]]]]}, "the weights are not those of its steps, tasks and slots"),
        ({"weights": [[[[0.5, 0.5]]]] * 2, "slots": ["expert 1", "expert 2"]}, "does not read its memory"),
    ],
)
def test_a_history_that_is_not_whole_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        ablation_figures.history(in_file(tmp_path / "history.json", {**HISTORY, **change}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fool"], "unknown rung 'fool'"),
        (["static"], "its experts are averaged, without gates"),
        (["full", "model.gate.begin=even"], "model.gate.begin=even: give FIELD=VALUE with a field of the config"),
        (["full", "model.gate=even"], "model.gate=even: give FIELD=VALUE with a field of the config"),
        (["full", "model.gate.init=odd"], "config.model.gate.init='odd'"),
        (["full", "batch_size=many"], "batch_size=many: "),
        (["full", "--every=0"], "--every=0: give 1 or more"),
        (["full", "--steps=0"], "--steps=0: give 1 or more"),
    ],
)
def test_a_history_of_wrong_arguments_is_refused(tmp_path, capsys, arguments, message):
    with contextlib.suppress(SystemExit):
        assert gate_history.main([*arguments, f"--output={tmp_path / 'history.json'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
