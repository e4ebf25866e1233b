"""Arrays that a program gives: whatever is no batch and no prediction is refused in one line."""

import numpy as np
import pytest

from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import given
from taskexpert_jax.tasks import build

NAMES = ("semseg", "depth", "normals", "sal")
TASKS = build(NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), semseg_classes=("floor", "wall", "lamp"))
SEMSEG, DEPTH, NORMALS, SALIENCY = TASKS
SIZE = (2, 8, 12)
BATCH = {
    "image": np.zeros((*SIZE, 3), np.uint8),
    "semseg": np.full((*SIZE, 1), 2, np.uint8),
    "depth": np.ones((*SIZE, 1), np.float32),
    "normals": np.ones((*SIZE, 3), np.float16),
    "sal": np.ones((*SIZE, 1), np.uint8),
}


def test_a_batch_gets_its_mask_windows_and_ids_and_loses_what_nobody_reads():
    found = given.batch({**BATCH, "semseg": BATCH["semseg"].astype(np.int64), "camera": "left"}, TASKS)
    assert found.keys() == {*BATCH, "window", "mask", "id"}
    assert found["semseg"].dtype == np.uint8
    assert found["window"].tolist() == [[0, 0, 8, 12]] * 2
    assert found["mask"].tolist() == [1, 1]
    assert found["id"].tolist() == ["0", "1"]


def test_windows_of_padding_examples_may_be_empty():
    window = np.array([[0, 0, 8, 12], [0, 0, 0, 0]])
    assert given.batch({**BATCH, "window": window, "mask": np.array([True, False])}, TASKS)["mask"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image", BATCH["image"][:0], r"batch\[\"image\"\] must be \(B, H, W, 3\) uint8, not \(0, 8, 12, 3\)"),
        ("semseg", BATCH["semseg"] + 1, r"batch\['semseg'\] has the value 3; allowed: 0 to 2, and 255"),
        ("semseg", BATCH["semseg"].astype(int) + 256, "has the value 258"),
        ("semseg", BATCH["semseg"].astype(int) - 3, "has the value -1"),
        ("semseg", BATCH["semseg"] + 0.5, "has the value 2.5"),
        ("semseg", BATCH["semseg"].astype(str), "must be uint8, not <U"),
        ("sal", BATCH["sal"] * 2, "has the value 2; allowed: 0 to 1, and 255"),
        ("window", np.zeros((2, 3), int), r"must be \(B, 4\) int32"),
        ("window", np.array([[0, 0, 8, 13]] * 2), "images inside of 8x12"),
        ("window", np.array([[0, 0, 8, 12.0]] * 2), r"must be \(B, 4\) int32"),
        ("window", np.zeros((2, 4), int), "images inside of 8x12"),
        ("mask", np.ones(3), "1, or 0 for padding examples"),
        ("mask", np.array([1, np.nan]), "1, or 0 for padding examples"),
        ("id", np.arange(3), r"must have the shape \(2,\), not \(3,\)"),
    ],
)
def test_a_wrong_batch_is_one_line(key, value, message):
    with pytest.raises(UserError, match=message) as error:
        given.batch({**BATCH, key: value}, TASKS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "array", "message"),
    [
        (SEMSEG, np.full((4, 6), 3), "semseg has the value 3; allowed: 0 to 2"),
        (SEMSEG, np.full((4, 6), -1), "semseg has the value -1"),  # NumPy would take the last class
        (SEMSEG, np.full((4, 6), "a"), r"semseg: must be class ids, \(H, W\) uint8, not \(4, 6\) <U1"),
        (DEPTH, np.ones((4, 6, 1)), r"depth: must be metres, \(H, W\) float32, not \(4, 6, 1\)"),
        (DEPTH, np.ones((0, 6)), r"not \(0, 6\)"),
        (DEPTH, 3.0, r"not \(\)"),
        (DEPTH, None, "object"),
        (NORMALS, np.ones((4, 6)), r"\(H, W, 3\) float32, not \(4, 6\)"),
        (SALIENCY, np.ones(6), r"not \(6,\)"),
    ],
)
def test_what_is_no_prediction_of_a_task_is_one_line(task, array, message):
    with pytest.raises(UserError, match=message):
        given.prediction(task, array)


def test_predictions_may_have_unlabelled_and_invalid_pixels():
    ids = np.array([[0, 2], [255, 1]])
    np.testing.assert_array_equal(given.prediction(SEMSEG, ids), ids)
    assert np.isnan(given.prediction(DEPTH, np.full((2, 2), np.nan))).all()
