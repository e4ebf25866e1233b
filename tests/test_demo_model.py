"""The bundled model: it loads, it is the one that its card describes, and it predicts what it was trained for."""

import pathlib
import re

import numpy as np
import pytest

from input_pipeline.scenes import render
import taskexpert_jax
from taskexpert_jax import checkpoint, installation, json_file, release
from taskexpert_jax.config import restored
from taskexpert_jax.runs import released

SCENES = range(1_000_000, 1_000_008)  # the first of the evaluation split


@pytest.fixture(scope="module")
def card():
    """README.md of the model, and its numbers (of the model, of the best constant) by title of task and metric."""
    text = (installation.demo_model() / released.CARD).read_text()
    rows = re.findall(r"^\| ([\w ]+) \| \**(.+?)(?: [↑↓])?\** \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    return text, {(task, metric): (float(model), float(constant)) for task, metric, model, constant in rows}


def test_the_card_says_what_the_model_is_good_for(card):
    text, numbers = card
    assert "Trained on rendered scenes only, on no photograph" in text and '\nlicense: "apache-2.0"\n' in text
    assert "taskexpert predict --model=demo --images=" in text and 'load_run("demo")' in text
    assert "200 examples of the split `val` of `scenes`" in text
    assert len(numbers) > 15


def test_the_card_cites_the_paper_as_the_readme_does(card):
    readme = pathlib.Path(__file__).resolve().parent.parent / "README.md"
    (entry,) = re.findall(r"^@inproceedings\{.*?^\}$", card[0], re.MULTILINE | re.DOTALL)
    assert entry in readme.read_text()


def test_its_config_has_every_field_of_this_version():
    _, added = restored(json_file.read(installation.demo_model() / released.CONFIG))
    assert added == ()  # or each use would say that the model is of an earlier version


def test_the_folder_has_only_the_files_of_a_release_and_is_small():
    found = {path.name: path.stat().st_size for path in installation.demo_model().iterdir()}
    assert found.keys() == {*released.NEEDED, released.CARD} and sum(found.values()) < 7_000_000


def test_programs_take_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.main(["demo"]) == 0
    assert " is a released model: step 1600, " in capsys.readouterr().out
    assert release.main(["demo", "--output=copy"]) == 2
    assert "demo_model is a released model already: copy the folder" in capsys.readouterr().err


def test_it_predicts_unseen_scenes_as_well_as_its_card_says(card):
    run = taskexpert_jax.load_run("demo")
    assert str(run.checkpoint) == "step 1600 (released)"
    scenes = [render(index) for index in SCENES]
    found = run.predict([scene["image"] for scene in scenes], batch_size=len(scenes))
    depths = [(one["depth"] - scene["depth"][..., 0]) ** 2 for one, scene in zip(found, scenes, strict=True)]
    rmse, constant = card[1][("depth", "RMSE (m)")]
    assert np.sqrt(np.mean(depths)) == pytest.approx(rmse, rel=0.3) and rmse < 0.6 * constant
    classes = len(run.classes["semseg"])
    confusion = np.zeros((classes, classes))
    for one, scene in zip(found, scenes, strict=True):
        np.add.at(confusion, (scene["semseg"][..., 0], one["semseg"]), 1)
    accuracy, constant = card[1][("semantic segmentation", "pixel_accuracy")]
    assert 100 * np.trace(confusion) / confusion.sum() == pytest.approx(accuracy, abs=6) and accuracy > constant + 30
    miou, constant = card[1][("semantic segmentation", "mIoU (%)")]
    present = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
    overlaps = np.diag(confusion) / (confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)).clip(1)
    assert 100 * overlaps[present].mean() == pytest.approx(miou, abs=15) and miou > constant + 30
