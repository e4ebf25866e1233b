"""Contact sheet of examples: the examples shown, the overlay of labels, and the faults found by --check."""

import itertools
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from configs import demo
from input_pipeline import folder, pipeline, records, show, stream
from input_pipeline.scenes import scene as scenes
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import canvas, from_config, panels

PROGRAM = [sys.executable, "-m", "input_pipeline.show"]


@pytest.fixture
def config():
    """Built-in scenes with the scale augmentation of real images."""
    config = demo.get_config("tiny")
    config.tasks = ("semseg", "depth", "normals", "edge")
    config.augment.scale_min, config.augment.scale_max = 0.5, 2.0
    config.dataset.cache = False
    return config


def test_training_examples_are_those_of_the_training_batches(config):
    tasks = from_config(config)
    batches = list(itertools.islice(pipeline.train_batches(config, tasks), 2))
    shown = list(itertools.islice(show.examples(config, tasks, "train", stored=False), 2 * config.batch_size))
    for name in ("image", *config.tasks):
        expected = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(np.stack([example[name] for _, example in shown]), expected)


def test_what_is_stored_comes_before_what_augmentation_makes_of_it(config):
    config.augment.photometric_probability = 0.0
    tasks = from_config(config)
    titles, examples = zip(
        *itertools.islice(show.examples(config, tasks, "train", stored=True), 2 * config.batch_size), strict=True
    )
    for position, (title, stored) in enumerate(zip(titles[::2], examples[::2], strict=True)):
        assert title == f"{stored['id']} as stored" and titles[2 * position + 1] == f"{stored['id']} in training"
        augmented = stream.augmented(stored, config, tasks, position)
        np.testing.assert_array_equal(examples[2 * position + 1]["image"], augmented["image"])


def test_other_splits_are_shown_as_evaluated_and_once(config):
    tasks = from_config(config)
    shown = list(show.examples(config, tasks, "val", stored=True))
    (batch,) = pipeline.eval_batches(config, tasks, batch_size=4)
    assert [title for title, _ in shown] == batch["id"].tolist()
    np.testing.assert_array_equal(np.stack([example["depth"] for _, example in shown]), batch["depth"])


def test_a_label_over_the_image_is_half_of_each_and_hatched_where_ignored(config):
    (semseg, *_) = from_config(config)
    image = np.full((12, 20, 3), 90, np.uint8)
    label = np.zeros((12, 20, 1), np.uint8)
    label[:, 10:] = 255
    over = show.overlay(image, label, semseg)
    half = (90 + panels.colour(semseg, label[..., 0])[0, 0].astype(int)) // 2
    assert (over[:, :10] == half).all()
    hatched = (over[:, 10:] == show.HATCH).all(axis=-1)
    assert (over[:, 10:][~hatched] == 90).all() and hatched.mean() == pytest.approx(2 / show.PERIOD, abs=0.02)


def test_the_sheet_names_labels_that_an_example_lacks(config, monkeypatch):
    drawn = scenes.render

    def without_depth(*args, **kwargs):
        return {name: part for name, part in drawn(*args, **kwargs).items() if name != "depth"}

    sheets = []
    monkeypatch.setattr(scenes, "render", without_depth)
    monkeypatch.setattr(canvas, "sheet", sheets.append)
    show.draw(config, "val", 1, stored=False)
    ((labels, over),) = sheets
    titles = ["semantic segmentation", "depth: nothing is labelled", "surface normals", "boundaries"]
    assert [title for title, _ in labels[1:]] == titles
    assert [cell is None for cell in over] == [True, False, True, False, False]


def test_check_finds_every_fault_and_counts_what_is_labelled(config, monkeypatch, capsys):
    drawn = scenes.render

    def spoilt(index, **kwargs):
        if index in (3, 4):
            raise UserError(f"scene {index} is spoilt")
        example = drawn(index, **kwargs)
        example["semseg"][: 8 if index == 0 else 16] = 255  # of 32 rows in all
        if index > 4:
            del example["depth"]
        return example

    monkeypatch.setattr(scenes, "render", spoilt)
    monkeypatch.setattr(records.dataset_module("scenes"), "NOTES", folder.NOTES, raising=False)
    config.tasks = ("semseg", "depth")
    assert show.check(config) == ["scene 4 is spoilt", "scene 3 is spoilt"]
    (note,) = folder.NOTES
    printed = capsys.readouterr().out
    assert printed.startswith(f"{note}\n") and "EXIF orientation" in note
    train, val = re.split("^val", printed.removeprefix(f"{note}\n"), flags=re.MULTILINE)
    assert train.startswith("train: 8 images, 1 of them not readable")  # training scenes have the even numbers 0 to 14
    assert re.search(r"semantic segmentation +7 images labelled, +53.6 % of their pixels", train)
    assert re.search(r"depth +2 images labelled, 100.0 % of their pixels", train)
    assert re.search(r"depth +1 images labelled, 100.0 % of their pixels", val)


def test_check_prints_the_range_of_depth_and_names_a_task_without_a_valid_label(config, monkeypatch, capsys):
    drawn = scenes.render

    def spoilt(index, **kwargs):
        example = drawn(index, **kwargs)
        example["depth"] = np.full_like(example["depth"], 1 + index / 10)
        example["depth"][:8] = 200 if index == 2 else 0  # of 32 rows; 200 m are out of range
        return {**example, "semseg": np.full_like(example["semseg"], 255)} if index % 2 else example

    monkeypatch.setattr(scenes, "render", spoilt)
    config.tasks = ("semseg", "depth")
    (fault,) = show.check(config)
    assert fault.startswith("val: no valid label of semseg in any image; ")
    train, val = re.split("^val", capsys.readouterr().out, flags=re.MULTILINE)
    values = r"least \(m\) 1.00, median \(m\) 1.6\d, greatest \(m\) 2.40"
    assert re.search(rf"depth +8 images labelled, +75.0 % of their pixels, {values}", train)
    assert re.search(r"semantic segmentation +0 images labelled, +0.0 % of their pixels", val)


@pytest.mark.slow
def test_the_program_writes_a_sheet_and_ends_in_one_line_where_it_cannot(tmp_path):
    small = ["configs/demo.py:tiny", f"--output={tmp_path}", "--count=1", "--config.tasks=('semseg','sal')"]
    done = subprocess.run([*PROGRAM, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written: {tmp_path / 'train.png'}\n"
    with Image.open(tmp_path / "train.png") as sheet:
        assert sheet.width == 12 + 3 * (384 + 12)
    wrongs = {
        (*small, "--split=test"): "error: the scenes have no split 'test'; choose train or val\n",
        ("configs/none.py", *small[1:]): "error: no readable config file: [Errno 2] No such file or directory: "
        "'configs/none.py'\n",
        (small[0], f"--output={tmp_path / 'train.png' / 'x'}"): "error: results cannot be written to "
        f"{tmp_path / 'train.png' / 'x'}: it, or a folder above it, is a file; give another folder with --output\n",
    }
    for arguments, line in wrongs.items():
        wrong = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False)
        assert (wrong.returncode, wrong.stderr) == (2, line)
