"""Scores of prediction files: perfect ones, values computed by hand, files of `--mode=predict`, and unusable files."""

from fractions import Fraction
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from input_pipeline import pipeline
from taskexpert_jax import evaluate, predict, score
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import scoring
from taskexpert_jax.tasks import from_config
from taskexpert_jax.tasks.metrics.boundary import counts as boundary
from taskexpert_jax.tasks.metrics.boundary import scores as boundary_scores
from tests import clock, random_runs

ROOT = pathlib.Path(__file__).resolve().parent.parent


TASKS = {task.name: task for task in from_config(random_runs.padded_scenes())}


def batches_of(config, size=3):
    return list(pipeline.eval_batches(config, from_config(config), batch_size=size))


def examples_of(config):
    """Id, and image and labels without padding, of each example."""
    for batch in batches_of(config, 1):
        top, left, height, width = batch["window"][0]
        names = ("image", *config.tasks)
        yield str(batch["id"][0]), {n: batch[n][0, top : top + height, left : left + width] for n in names}


def save(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, numbers)
    else:
        Image.fromarray(numbers).save(path)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_predictions_made_of_values_have_these_values(task):
    random = np.random.default_rng(0)
    values = {
        "classes": random.integers(0, task.channels, (2, 3, 4)).astype(np.uint8),
        "depth": random.uniform(0, 9, (2, 3, 4)).astype(np.float32),
        "probability": random.integers(0, 256, (2, 3, 4)).astype(np.float32) / 255,
        "normals": np.eye(3, dtype=np.float32)[random.integers(0, 3, (2, 3, 4))],
    }[task.kind.name]
    prediction = task.kind.from_values(values)
    assert prediction.shape == (2, 3, 4, task.channels) and prediction.dtype == np.float32
    tolerance = 1.1e-5 if task.kind.name == "probability" else 0  # saliency is lowered by this, on purpose
    np.testing.assert_allclose(task.values(jax.numpy.asarray(prediction)), values, rtol=0, atol=tolerance)


# --- perfect predictions ---


@pytest.mark.parametrize("suffix", ["npy", "png"])
def test_the_labels_themselves_score_perfectly(tmp_path, suffix):
    config = random_runs.padded_scenes()
    for example_id, example in examples_of(config):
        for name in config.tasks:
            label = example[name].copy()
            label[label == TASKS[name].ignore] = 0
            if name == "depth":
                coded = label[..., 0] if suffix == "npy" else np.rint(1000 * label[..., 0]).astype(np.uint16)
            elif name == "normals":
                coded = label if suffix == "npy" else np.rint((label.astype(np.float32) + 1) * 127.5).astype(np.uint8)
            elif suffix == "png" and TASKS[name].kind.name == "probability":
                coded = 255 * label[..., 0]
            elif TASKS[name].kind.name == "probability":
                coded = label[..., 0].astype(np.float32)
            else:
                coded = label[..., 0]
            save(tmp_path / name / f"{example_id}.{suffix}", coded)
    found = scoring.score(config, tmp_path, batches_of(config))
    values, exact = found.metrics, suffix == "npy"
    assert found.facts["examples"] == 4
    for name in ("semseg", "human_parts"):
        assert values[f"{name}/pixel_accuracy"] == 100
        assert {of.iou for of in found.per_class[name] if of.labelled} == {100}
    assert values["depth/rmse"] <= (0 if exact else 0.0005)
    assert values["normals/mean"] < (0.03 if exact else 0.5)
    assert values["sal/maxF"] == values["sal/maxF_plain"] == 100 and values["sal/mae"] < 1e-6
    assert values["edge/loss_plain"] < 1e-6
    # Not 100: the benchmark detects ridges in a prediction, and some pixels of these small maps are not on one.
    counts = [
        boundary.image_counts(np.uint8(255) * (line == 1), (line == 1).astype(np.uint8), 0.05, kind="lines")
        for line in (example["edge"][..., 0] for _, example in examples_of(config))
    ]
    assert values["edge/odsF"] == boundary_scores.scores(boundary_scores.BoundaryCounts.join(counts))["odsF"] > 95


# --- computed by hand ---


def one_image(labels):
    """A batch of one 2x4 image in a 4x6 frame; labels (2, 4) or (2, 4, 3)."""
    batch = {"image": np.zeros((1, 4, 6, 3), np.uint8), "mask": np.ones(1, np.float32), "id": np.array(["a/b"])}
    batch["window"] = np.array([[1, 1, 2, 4]], np.int32)
    for name, label in labels.items():
        task = TASKS[name]
        batch[name] = np.full((1, 4, 6, task.label_channels), task.ignore, task.label_dtype)
        batch[name][0, 1:3, 1:5] = np.asarray(label).reshape(2, 4, task.label_channels)
    return batch


def scored(folder, labels):
    config = random_runs.padded_scenes()
    config.tasks = tuple(labels)
    config.eval.boundary.odsf = False
    return scoring.score(config, folder, [one_image(labels)]).metrics


def test_classes_by_number_palette_and_logits(tmp_path):
    label = [[0, 0, 0, 0], [1, 1, 255, 255]]
    ids = np.array([[0, 0, 0, 1], [1, 1, 5, 6]], np.uint8)
    logits = np.where(ids[..., None] == np.arange(TASKS["semseg"].channels), 0.5, -2.0)
    palette = Image.fromarray(ids, "P")
    palette.putpalette(list(range(255, -1, -1)))
    for way, numbers in {"png": ids, "npy": ids.astype(np.int64), "logits": logits, "palette": palette}.items():
        path = tmp_path / way / "semseg" / ("a/b.png" if way in ("png", "palette") else "a/b.npy")
        if way == "palette":
            path.parent.mkdir(parents=True)
            palette.save(path)
        else:
            save(path, numbers)
        values = scored(tmp_path / way, {"semseg": label})
        # 3 of 4 pixels of class 0 are found, class 1 has one false positive: IoU 3/4 and 2/3, mean over all classes.
        assert values["semseg/mIoU"] == pytest.approx(100 * (3 / 4 + 2 / 3) / TASKS["semseg"].channels), way
        assert values["semseg/pixel_accuracy"] == pytest.approx(100 * 5 / 6)


def test_suffixes_in_upper_case_are_found_and_other_normal_forms_are_named(tmp_path):
    depth = TASKS["depth"]
    save(tmp_path / "depth" / "a" / "b.png", np.ones((2, 4), np.uint16))
    upper = (tmp_path / "depth/a/b.png").rename(tmp_path / "depth/a/b.PNG")
    assert scoring.find_prediction(tmp_path, depth, "a/b") == upper
    save(tmp_path / "a/b/depth.npy", np.ones((2, 4)))
    with pytest.raises(UserError, match=r"/depth/a/b.PNG and \S+/a/b/depth.npy both exist; keep one"):
        scoring.find_prediction(tmp_path, depth, "a/b")
    save(tmp_path / "depth/cafe\u0301.npy", np.ones((2, 4)))
    with pytest.raises(UserError, match=r"/depth/caf\xe9.npy: missing, .*; 'cafe\\u0301' is there, .* 'caf\\xe9'"):
        scoring.find_prediction(tmp_path, depth, "caf\u00e9")


@pytest.mark.parametrize(("suffix", "unit"), [("npy", np.float64(1)), ("png", np.uint16(1000))])
def test_depth_in_metres_and_millimetres(tmp_path, suffix, unit):
    save(tmp_path / "depth" / "a" / f"b.{suffix}", np.array([[1, 2, 3, 4], [2, 2, 2, 7]]).astype(unit.dtype) * unit)
    values = scored(tmp_path, {"depth": [[1, 2, 3, 2], [2, 2, 5, -1]]})
    assert values["depth/rmse"] == pytest.approx(np.sqrt((4 + 9) / 7))
    assert values["depth/abs_rel"] == pytest.approx((2 / 2 + 3 / 5) / 7)


def test_normals_of_any_length_and_as_bytes(tmp_path):
    label = np.zeros((2, 4, 3))
    label[..., 2] = 1
    label[1, 3] = 255
    given = 3 * label
    given[0, 0] = (2, 0, 0)
    save(tmp_path / "array" / "normals" / "a" / "b.npy", given.astype(np.float32))
    assert scored(tmp_path / "array", {"normals": label})["normals/mean"] == pytest.approx(90 / 7, rel=1e-5)
    coded = np.rint((np.sign(given) + 1) * 127.5).astype(np.uint8)
    save(tmp_path / "bytes" / "normals" / "a" / "b.png", coded)
    # 128 encodes 1/255, not 0, so that each angle is off by this in two components.
    off = np.degrees(np.arctan(np.hypot(1, 1) / 255))
    assert scored(tmp_path / "bytes", {"normals": label})["normals/mean"] == pytest.approx((90 + 6 * off) / 7, abs=0.1)


def max_f(levels, label, most):
    """maxF over the thresholds 0.05 .. 0.95, in rational numbers; the probabilities are levels / most."""
    best = Fraction(0)
    for k in range(1, 20):
        above = [Fraction(int(v), most) > Fraction(k, 20) for v in levels.ravel()]
        found = sum(a and t == 1 for a, t in zip(above, label.ravel(), strict=True))
        precision, recall = Fraction(found, max(sum(above), 1)), Fraction(found, int((label == 1).sum()))
        if found:
            best = max(best, Fraction(13, 10) * precision * recall / (Fraction(3, 10) * precision + recall))
    return float(100 * best)


@pytest.mark.parametrize("level", [51, 102, 153, 204])
def test_a_probability_of_eight_bits_that_equals_a_threshold_is_not_above_it(tmp_path, level):
    """51 / 255 is 0.2: background of this level is below that threshold, however a float32 sigmoid rounds."""
    levels = np.array([[level, level, level, 0], [level + 1, level + 1, 255, 0]], np.uint8)
    label = np.array([[0, 0, 0, 0], [1, 1, 1, 0]])
    save(tmp_path / "sal" / "a" / "b.png", levels)
    values = scored(tmp_path, {"sal": label})
    assert values["sal/maxF_plain"] == pytest.approx(max_f(levels, label, 255)) == pytest.approx(100)
    assert values["sal/mae"] == pytest.approx(np.abs(levels / 255 - label).mean(), abs=2e-5)


def test_probabilities_as_shares_and_with_16_bits(tmp_path):
    random = np.random.default_rng(0)
    label = random.integers(0, 2, (2, 4))
    shares = random.integers(0, 256, (2, 4)) / 255
    ways = {
        "npy": shares,
        "png": np.rint(255 * shares).astype(np.uint8),
        "wide": np.rint(65535 * shares).astype(np.uint16),
    }
    expected = max_f(np.rint(255 * shares).astype(int), label, 255)
    losses = -np.where(label == 1, 0.95 * np.log(np.clip(shares, 1e-7, 1)), 0.05 * np.log(np.clip(1 - shares, 1e-7, 1)))
    for way, numbers in ways.items():
        for name in ("sal", "edge"):
            save(tmp_path / way / name / "a" / ("b.npy" if way == "npy" else "b.png"), numbers)
        values = scored(tmp_path / way, {"sal": label, "edge": label})
        assert values["sal/maxF_plain"] == pytest.approx(expected), way
        assert values["edge/loss_plain"] == pytest.approx(losses.mean(), rel=1e-4), way


@pytest.mark.parametrize(("how", "expected"), [("truncate", (7, 51, 127, 254)), ("round", (7, 52, 128, 255))])
def test_the_boundary_benchmark_gets_the_levels_of_8_bit_files_and_others_cut_off_or_rounded(tmp_path, how, expected):
    shares = np.array([7 / 255, 51.6 / 255, 127.9 / 255, 254.9 / 255], np.float32)
    levels = np.arange(256, dtype=np.uint8).reshape(64, 4)  # a logit in float32 does not hold all of them
    ways = {"bytes": levels, "words": 257 * levels.astype(np.uint16), "shares": levels / 255}
    label = np.zeros((64, 4), np.uint8)
    for way, numbers in {**ways, "between": np.tile(shares, (64, 1))}.items():
        save(tmp_path / way / "edge" / "a" / ("b.png" if numbers.dtype.kind == "u" else "b.npy"), numbers)
        batch = {"image": np.zeros((1, 64, 4, 3), np.uint8), "mask": np.ones(1), "id": np.array(["a/b"])}
        batch |= {"window": np.array([[0, 0, 64, 4]]), "edge": label[None, ..., None]}
        (found,) = scoring.with_predictions([TASKS["edge"]], tmp_path / way, [batch], how)
        strength = found["strength/edge"][0]
        np.testing.assert_array_equal(strength, levels if way in ways else np.tile(expected, (64, 1)), way)


def test_a_picture_without_any_label_of_a_task_needs_no_file_of_it(tmp_path):
    save(tmp_path / "depth" / "a" / "b.npy", np.ones((2, 4), np.float32))
    (tmp_path / "human_parts").mkdir()
    config = random_runs.padded_scenes()
    config.tasks = ("depth", "human_parts")
    other = one_image({"depth": np.full((2, 4), -1), "human_parts": np.ones((2, 4))})
    other["id"] = np.array(["c"])
    save(tmp_path / "c" / "human_parts.npy", np.ones((2, 4), np.uint8))
    batches = [one_image({"depth": np.full((2, 4), 3), "human_parts": np.full((2, 4), 255)}), other]
    values = scoring.score(config, tmp_path, batches).metrics
    assert values["depth/rmse"] == 2 and values["human_parts/pixel_accuracy"] == 100


# --- files of `--mode=predict` ---


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(config, results of `--mode=evaluate`, ids, output of `--mode=predict`) of a checkpoint of random parameters."""
    config = random_runs.padded_scenes()
    folder = tmp_path_factory.mktemp("score")
    workdir = folder / "run"
    # The scale is chosen: files hold saliency lowered by 1.1e-5, and at 0.13 a pixel that close to a threshold of maxF
    # changes sides; at 0.2 boundary probabilities are so close to 0 and 1 that 8 bits do not hold their loss.
    random_runs.save(config, workdir, scale=0.15)
    found = evaluate.evaluate(config, workdir, "latest", lambda: batches_of(config, 8))
    ids = []
    for example_id, example in examples_of(config):
        save(folder / "images" / f"{example_id}.png", example["image"])
        ids.append(example_id)
    predict.predict(config, workdir, "latest", folder / "images", folder / "out")
    return config, found, ids, folder / "out"


def test_files_of_predict_score_as_the_evaluation(evaluated):
    config, expected, _, folder = evaluated
    values = scoring.score(config, folder, batches_of(config)).metrics
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        of_classes = TASKS[name.split("/")[0]].class_names
        assert values[name] == (value if of_classes else pytest.approx(value, rel=2e-4, abs=1e-4)), name


def test_the_same_in_pictures_of_8_and_16_bits(evaluated, tmp_path):
    config, expected, ids, folder = evaluated
    for example_id in ids:
        for name, task in TASKS.items():
            numbers = np.load(folder / example_id / f"{name}.npy")
            if task.kind.name == "depth":
                numbers = np.rint(1000 * numbers).astype(np.uint16)
            elif task.kind.name == "normals":
                numbers = np.rint(127.5 * (numbers + 1)).astype(np.uint8)
            elif name == "edge":
                numbers = (255 * numbers).astype(np.uint8)  # as the family writes them
            elif task.kind.name == "probability":
                numbers = np.rint(255 * numbers).astype(np.uint8)
            save(tmp_path / name / f"{example_id}.png", numbers)
    values = scoring.score(config, tmp_path, batches_of(config)).metrics
    for name in ("semseg/mIoU", "human_parts/mIoU", "edge/odsF"):
        assert values[name] == expected[name]
    assert values["depth/rmse"] == pytest.approx(expected["depth/rmse"], abs=1e-3)
    assert values["normals/mean"] == pytest.approx(expected["normals/mean"], abs=0.1)
    assert values["sal/mae"] == pytest.approx(expected["sal/mae"], abs=2e-3)
    assert values["edge/loss_plain"] == pytest.approx(expected["edge/loss_plain"], rel=2e-2)


# --- unusable files ---


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("depth", np.ones((4, 2), np.float32), r"b.npy.*4x2.* 90 .*2x4"),
        ("depth", np.ones((4, 8), np.float32), r"b.npy.*4x8.*2x4"),
        ("depth", np.ones((2, 4), np.uint8), r"\b8 bits\b"),
        ("depth", np.full((2, 4), np.nan), r"NaN"),
        ("depth", np.ones((2, 4, 2)), r"\b2 .*float64"),
        ("depth", np.ones(8), r"float64.*\(8,\)"),
        ("depth", np.full((2, 4), "x"), r"<U1"),
        (
            "semseg",
            np.full((2, 4), 14),
            r"\b14\b.*\b14\b.*\b13\b",
        ),
        ("semseg", np.full((2, 4), -1), r" -1\b"),
        ("semseg", np.ones((2, 4)), r"float.*\b14\b"),
        ("semseg", np.ones((2, 4, 13)), r"\b14\b"),
        ("semseg", np.ones((2, 4, 3), np.uint8), r"\b3\b"),
        ("sal", np.full((2, 4), 1.5), r"\b1\.5\b.*\[0, 1\]"),
        ("normals", np.ones((2, 4)), r"\b1 .*float64.*RGB"),
        ("normals", np.ones((2, 4, 3), np.uint16), r"\bRGB\b"),
    ],
)
def test_unusable_numbers_are_said(tmp_path, name, numbers, message):
    path = tmp_path / "b.npy"
    np.save(path, numbers)
    with pytest.raises(UserError, match=message):
        scoring.read_prediction(path, TASKS[name], (2, 4))


def test_unreadable_files_are_said(tmp_path):
    for path, content in {"a.npy": b"\x93NUMPY\x01\x00", "b.png": b"\x89PNG", "c.npy": b""}.items():
        (tmp_path / path).write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: \w.*"):
            scoring.read_prediction(tmp_path / path, TASKS["depth"], (2, 4))
    Image.fromarray(np.zeros((2, 4), np.uint8), "P").save(tmp_path / "p.png")
    with pytest.raises(UserError, match=r"p.png.*palette"):
        scoring.read_prediction(tmp_path / "p.png", TASKS["sal"], (2, 4))


def test_every_fault_is_counted_and_twenty_are_listed(tmp_path):
    config = random_runs.padded_scenes()
    config.dataset.val_scenes = 9
    ids = [example_id for example_id, _ in examples_of(config)]
    config.tasks = ("depth", "sal", "edge")
    for example_id in ids:
        save(tmp_path / "depth" / f"{example_id}.npy", np.ones((24, 36), np.float32))
    save(tmp_path / "depth" / f"{ids[0]}.npy", np.ones((36, 24), np.float32))
    save(tmp_path / "sal" / f"{ids[0]}.npy", np.ones((24, 36), np.float32))
    save(tmp_path / "sal" / f"{ids[0]}.png", np.ones((24, 36), np.uint8))
    (tmp_path / "edge").mkdir()
    labelled = sum((example[name] != 255).any() for _, example in examples_of(config) for name in ("sal", "edge"))
    with pytest.raises(UserError) as refusal:
        scoring.score(config, tmp_path, batches_of(config))
    first, *lines = str(refusal.value).splitlines()
    faults = 1 + labelled
    assert first.startswith(f"{faults} of {9 + labelled} files ")
    assert len(lines) == min(faults, scoring.MOST_FAULTS + 1)
    assert f"{ids[0]}.npy" in lines[0] and "36x24" in lines[0]
    assert f"{ids[0]}.png" in lines[1]
    assert f"edge/{ids[0]}.npy" in lines[2]
    assert faults <= scoring.MOST_FAULTS or lines[-1].strip() == f"and {faults - scoring.MOST_FAULTS} more"


def test_masks_of_0_and_1_are_not_taken_for_black(tmp_path):
    save(tmp_path / "sal" / "a" / "b.png", np.eye(2, 4, dtype=np.uint8))
    with pytest.raises(UserError, match=r"\bsal\b.*1 / 255"):
        scored(tmp_path, {"sal": np.eye(2, 4)})
    (tmp_path / "sal" / "a" / "b.png").unlink()
    save(tmp_path / "sal" / "a" / "b.npy", np.eye(2, 4, dtype=bool))
    assert scored(tmp_path, {"sal": np.eye(2, 4)})["sal/maxF"] == 100


def test_a_folder_without_a_task_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere"):
        scoring.score(random_runs.padded_scenes(), tmp_path / "nowhere", [])
    (tmp_path / "depth").mkdir()
    save(tmp_path / "some" / "id" / "sal.npy", np.ones((2, 2)))
    message = r"semseg and normals and edge and human_parts.*--tasks=depth,sal$"
    with pytest.raises(UserError, match=message):
        scoring.score(random_runs.padded_scenes(), tmp_path, [])


# --- the program ---


def test_it_writes_the_table_and_the_files(evaluated, tmp_path, capsys, monkeypatch):
    config, expected, _, folder = evaluated
    config = config.copy_and_resolve_references()
    clock.each_look_takes(monkeypatch, seconds=20)
    score._run(config, folder, ("depth", "semseg"), tmp_path / "new" / "scores")
    report = json.loads((tmp_path / "new" / "scores" / "metrics.json").read_text())
    assert report["published"].keys() == {"depth", "semseg"} and report["examples"] == 4
    assert report["metrics"]["semseg/mIoU"] == expected["semseg/mIoU"]
    assert report["dataset"]["fingerprint"] and report["predictions"] == str(folder)
    out, err = capsys.readouterr()
    assert err == "scoring: 2 of 4 examples, 0.05/s, 00:40 left\n"  # a line in 30 seconds, at most
    assert "4 examples of scenes, split val" in out
    assert f"{expected['semseg/mIoU']:.4g}" in out
    with pytest.raises(UserError, match=r"--tasks.*'deep'.* depth, semseg"):
        score._run(config, folder, ("deep",), tmp_path)


def test_wrong_input_ends_in_one_line_and_status_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "taskexpert_jax.score",
        "--config=configs/demo.py:tiny",
        f"--predictions={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith(f"error: {tmp_path}: ") and "semseg" in line and "depth" in line


def test_pngs_of_few_bits_are_ids_of_classes_and_nothing_else(tmp_path):
    ids = np.uint8([[0, 1, 3, 2]])
    Image.fromarray(ids).save(tmp_path / "p.png", bits=4)
    prediction = scoring.read_prediction(tmp_path / "p.png", TASKS["semseg"], (1, 4))
    np.testing.assert_array_equal(prediction.argmax(axis=-1), ids)
    for name in ("sal", "depth"):
        with pytest.raises(UserError, match="has 4 bits per pixel"):
            scoring.read_prediction(tmp_path / "p.png", TASKS[name], (1, 4))
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(ids).save(tmp_path / "p.png", exif=exif)
    prediction = scoring.read_prediction(tmp_path / "p.png", TASKS["semseg"], (1, 4))
    np.testing.assert_array_equal(prediction.argmax(axis=-1), ids[:, ::-1])
