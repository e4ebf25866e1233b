"""Kinds of value: files, resizing, drawing and counting."""

import cv2
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from input_pipeline import folder, transforms
from taskexpert_jax import images, tasks
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import scoring
from taskexpert_jax.tasks import Task, canvas, kinds, panels
from taskexpert_jax.tasks.kinds.vector import wheel
from taskexpert_jax.tasks.losses import VECTOR_IGNORE

FLOW = kinds.vector(2, unit="px")
ALBEDO = kinds.vector(3, limits=(0, 1), label_dtype="float16")
KINDS = {
    "classes": kinds.classes(("wall", "floor", "bed")),
    "depth": kinds.depth(),
    "disparity": kinds.disparity(),
    "normals": kinds.normals(),
    "mask": kinds.probability(logits=2),
    "shares": kinds.probability(shares=True),
    "flow": FLOW,
    "albedo": ALBEDO,
    "scalar": kinds.vector(1),
    "vector of 5": kinds.vector(5),
}


def task_of(kind: kinds.Kind, **facts) -> Task:
    """Task of the kind; all other attributes are those of depth."""
    (depth,) = tasks.build(["depth"], loss_weights={"depth": 1.0})
    others = {name: of for name, of in vars(depth).items() if name not in ("kind", "scale_exponent")}
    return Task(**{**others, "name": "novel", "kind": kind, **facts})


def values_of(name: str) -> np.ndarray:
    """Values of a kind, 6x8, all pixels valid."""
    random = np.random.default_rng(1)
    numbers = {
        "classes": random.integers(0, 3, (6, 8)).astype(np.uint8),
        "depth": random.uniform(0.5, 9, (6, 8)),
        "disparity": random.uniform(0.5, 90, (6, 8)),
        "normals": np.eye(3)[random.integers(0, 3, (6, 8))],
        "mask": random.integers(0, 2, (6, 8)),
        "shares": random.uniform(0, 1, (6, 8)),
        "flow": random.normal(size=(6, 8, 2)) * 40,
        "albedo": random.uniform(0, 1, (6, 8, 3)),
        "scalar": random.normal(size=(6, 8)) * 3,
        "vector of 5": random.normal(size=(6, 8, 5)),
    }[name]
    return numbers if numbers.dtype == np.uint8 else numbers.astype(np.float32)


@pytest.fixture
def saved(tmp_path):
    def save(numbers, name="numbers.npy"):
        path = tmp_path / name
        if path.suffix == ".npy":
            np.save(path, numbers)
        else:
            Image.fromarray(numbers).save(path)
        return path

    return save


@pytest.mark.parametrize("name", KINDS)
def test_values_come_back_from_a_label_and_from_a_prediction(saved, name):
    values, task = values_of(name), task_of(KINDS[name])
    path = saved(values)
    label = folder.read_label(path, task, (6, 8))
    assert label.shape == (6, 8, task.label_channels) and label.dtype == task.label_dtype
    rounding = 5e-4 if label.dtype == np.float16 else 1e-6
    np.testing.assert_allclose(task.label_values(label), values, rtol=rounding, atol=rounding)
    prediction = scoring.read_prediction(path, task, (6, 8))
    assert prediction.shape == (6, 8, task.channels) and prediction.dtype == np.float32
    atol = 2e-5 if task.kind.name == "probability" else 1e-6  # logit_pair lowers probabilities by up to 1e-5
    np.testing.assert_allclose(task.values(jnp.asarray(prediction)), values, rtol=1e-5, atol=atol)


# --- vectors ---


def test_albedo_is_not_scaled_to_unit_length(saved):
    stored = np.uint8([[[255, 255, 255], [51, 0, 102], [0, 0, 0]]])
    expected = [[[1, 1, 1], [0.2, 0, 0.4], [0, 0, 0]]]
    path, task = saved(stored, "albedo.png"), task_of(ALBEDO)
    np.testing.assert_allclose(folder.read_label(path, task, (1, 3)), expected, atol=2e-4)
    prediction = scoring.read_prediction(path, task, (1, 3))
    np.testing.assert_allclose(prediction, expected, atol=1e-6)
    np.testing.assert_array_equal(task.values(jnp.asarray(prediction)), prediction)


def test_of_an_rgb_picture_of_16_bits_the_upper_8_are_read(tmp_path):
    stored = np.uint16([[[65535, 13107, 0]]])
    assert cv2.imwrite(str(tmp_path / "albedo.png"), stored[..., ::-1])
    assert images.read_numbers(tmp_path / "albedo.png").tolist() == [[[255, 51, 0]]]
    label = folder.read_label(tmp_path / "albedo.png", task_of(ALBEDO), (1, 1))
    np.testing.assert_allclose(label, [[[1, 0.2, 0]]], atol=2e-4)


def test_pictures_span_the_limits(saved):
    task = task_of(kinds.vector(3, limits=(-2, 2)))
    label = folder.read_label(saved(np.uint8([[[0, 255, 51]]]), "v.png"), task, (1, 1))
    np.testing.assert_allclose(label, [[[-2, 2, -1.2]]], rtol=1e-6)


def test_a_vector_with_a_gap_is_ignored_whatever_flips_and_scales_did(saved):
    """NaN survives the sign change of a flip and the factor of a zoom; 0 is a valid vector."""
    stored = np.float32([[[1, 2], [np.nan, 3], [np.inf, 0], [0, 0]]])
    task = task_of(FLOW, flip_signs=(-1, 1), scale_exponent=1)
    label = folder.read_label(saved(stored), task, (1, 4))
    moved = task.rescale(task.flip(label), np.float32(1.5))
    example = {"image": np.zeros((1, 4, 3), np.uint8), "novel": moved}
    marked = transforms.mark_invalid(example, [task])["novel"]
    ignored = [VECTOR_IGNORE] * 2
    np.testing.assert_array_equal(marked, [[[-1.5, 3], ignored, ignored, [0, 0]]])
    empty = transforms.fill_missing({"image": example["image"], "id": "a"}, [task])
    assert (transforms.mark_invalid(empty, [task])["novel"] == VECTOR_IGNORE).all()


def test_a_zoom_keeps_the_dtype_of_a_label():
    task = task_of(kinds.vector(2, label_dtype="float16"), scale_exponent=1)
    scaled = task.rescale(np.full((1, 1, 2), 3, np.float16), np.float32(1.5))
    assert scaled.dtype == np.float16 and scaled.tolist() == [[[4.5, 4.5]]]


@pytest.mark.parametrize(
    ("kind", "stored", "name", "fact"),
    [
        (FLOW, np.zeros((1, 1, 3), np.float32), "f.npy", r"\b2 number.*floating-point \.npy"),
        (
            FLOW,
            np.zeros((1, 1, 2), np.int16),
            "f.npy",
            r"int16.*floating-point \.npy .*\(h, w, 2\)",
        ),
        (FLOW, np.full((1, 1, 2), 1e6, np.float32), "f.npy", "numbers from 1e.06 to 1e.06"),
        (ALBEDO, np.full((1, 1, 3), 200, np.float32), "a.npy", r"outside of \[0, 1\]"),
        (ALBEDO, np.zeros((1, 1), np.uint8), "a.png", r"\b3 number.*RGB PNG"),
        (kinds.vector(3), np.zeros((1, 1, 3), np.uint8), "v.png", "uint8.*floating-point"),
    ],
)
def test_a_vector_label_that_cannot_be_meant_is_refused(saved, kind, stored, name, fact):
    path = saved(stored, name)
    with pytest.raises(UserError, match=f"{path}: .*{fact}"):
        folder.read_label(path, task_of(kind), (1, 1))


@pytest.mark.parametrize(
    ("kind", "stored", "fact"),
    [
        (FLOW, np.zeros((1, 1, 3), np.float32), r"\b3 number.* \(h, w, 2\)"),
        (FLOW, np.zeros((1, 1, 2), np.uint8), "uint8.*floating-point"),
        (ALBEDO, np.full((1, 1, 3), np.nan, np.float32), "NaN"),
    ],
)
def test_a_vector_prediction_that_cannot_be_meant_is_refused(saved, kind, stored, fact):
    with pytest.raises(UserError, match=fact):
        scoring.read_prediction(saved(stored), task_of(kind), (1, 1))


# --- resizing ---


@pytest.mark.parametrize("size", [(12, 16), (3, 4), (7, 5)])
def test_a_vector_field_of_length_3_keeps_it_at_another_size(size):
    resized = FLOW.resize(np.full((6, 8, 2), 3 / np.sqrt(2), np.float32), *size)
    assert resized.shape == (*size, 2)
    np.testing.assert_allclose(np.linalg.norm(resized, axis=-1), 3, rtol=1e-6)


def test_each_channel_of_a_vector_is_mixed_by_itself():
    values = np.float32([[[0, 4, 1], [1, 0, 1]]])
    np.testing.assert_allclose(ALBEDO.resize(values, 1, 4)[0, 1], [0.25, 3, 1])


def test_normals_are_unit_vectors_at_another_size():
    resized = KINDS["normals"].resize(np.float32([[[1, 0, 0], [0, 1, 0]]]), 1, 4)
    np.testing.assert_allclose(np.linalg.norm(resized, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(resized[0, 1, :2] / resized[0, 1, 0], [1, 1 / 3], rtol=1e-6)


def test_classes_take_the_nearest_pixel_and_other_numbers_are_mixed():
    ids = np.uint8([[0, 2]])
    assert KINDS["classes"].resize(ids, 1, 4).tolist() == [[0, 0, 2, 2]]
    for name in ("depth", "mask"):
        np.testing.assert_allclose(KINDS[name].resize(np.float32([[0, 2]]), 1, 4), [[0, 0.5, 1.5, 2]])


@pytest.mark.parametrize("name", KINDS)
def test_values_of_the_right_size_are_left_alone(name):
    values = values_of(name)
    assert KINDS[name].resize(values, 6, 8) is values


# --- drawing ---


def test_the_colour_wheel_is_that_of_optical_flow():
    """Middlebury's wheel: from the right, its six sections begin at steps 0, 15, 21, 25, 36 and 49 of 55."""
    begins = 2 * np.pi * np.array([0, 15, 21, 25, 36, 49]) / 55
    colours = wheel(np.cos(begins), np.sin(begins))
    expected = [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]]
    np.testing.assert_allclose(colours, expected, atol=1)
    still, half, beyond = wheel(np.array([0, 0.5, 2]), np.zeros(3))
    assert still.tolist() == [255, 255, 255]
    np.testing.assert_allclose(half, [255, 127.5, 127.5], atol=0.6)
    np.testing.assert_allclose(beyond, [0.75 * 255, 0, 0], atol=0.6)


def test_flow_is_drawn_on_the_range_that_its_key_names():
    task = task_of(FLOW)
    values = np.float32([[[3, 0], [6, 0], [VECTOR_IGNORE] * 2]])
    colours = panels.colour(task, values, limits=(0, 6))[0]
    np.testing.assert_allclose(colours, [[255, 128, 128], [255, 0, 0], canvas.INVALID], atol=1)
    assert panels.limits_of(task, values)[1] == pytest.approx(6, rel=0.01)
    assert panels.limits_of(task_of(kinds.vector(2, limits=(-9, 4))), values) == (0, 9)
    keys = [np.asarray(task.kind.key(canvas.Drawn(values, values[..., 0] > 0, (0, most)), 320)) for most in (6, 60)]
    assert keys[0].shape[1] == 320 and (keys[0] != keys[1]).any()


def test_three_numbers_are_red_green_and_blue_over_the_limits():
    values = np.float32([[[0, 0.2, 1], [2, -1, 0], [VECTOR_IGNORE] * 3]])
    colours = panels.colour(task_of(ALBEDO), values)[0]
    assert colours.tolist() == [[0, 51, 255], [255, 0, 0], list(canvas.INVALID_GREY)]
    assert "from 0 to 1" in ALBEDO.caption


def test_other_vectors_are_drawn_by_their_length():
    colours = panels.colour(
        task_of(KINDS["vector of 5"]), np.float32([[[3, 4, 0, 0, 0], [0, 0, 10, 0, 0]]]), limits=(0, 10)
    )
    assert colours[0].tolist() == [[128] * 3, [255] * 3]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_drawn_with_and_without_values(name):
    task, values = task_of(KINDS[name]), values_of(name)
    nothing = np.full(values.shape, task.ignore)
    assert (panels.colour(task, nothing) == task.kind.invalid).all()
    for shown in (values, nothing):
        assert panels.picture(task, shown).width == 384
    assert len(np.unique(panels.colour(task, values).reshape(-1, 3), axis=0)) > 1


# --- figures ---


def test_the_figures_of_vectors_are_their_gaps_and_their_range():
    label = np.float32([[[1, -2], [VECTOR_IGNORE] * 2], [[0, 7.5], [0, 0]]])
    total = FLOW.count(label) + FLOW.count(np.full((2, 2, 2), VECTOR_IGNORE, np.float32))
    assert FLOW.figures(total) == {"invalid": 5 / 8, "least (px)": -2, "greatest (px)": 7.5}
    assert FLOW.quantities == ("least (px)", "greatest (px)")
    nothing = ALBEDO.figures(ALBEDO.count(np.full((1, 1, 3), VECTOR_IGNORE, np.float16)))
    assert nothing == {"invalid": 1, "least": None, "greatest": None}


def test_the_figures_of_shares_are_not_those_of_a_mask():
    kind = KINDS["shares"]
    assert kind.figures(kind.count(np.float16([[[0.25], [1], [-1], [0.5]]]))) == {
        "invalid": 0.25,
        "least": 0.25,
        "greatest": 1,
    }


@pytest.mark.parametrize("name", KINDS)
def test_the_words_for_an_array_are_those_of_its_shape_and_dtype(name):
    kind = KINDS[name]
    array = np.asarray(kind.values(jnp.zeros((6, 8, kind.channels))))
    shape = "(H, W)" if array.ndim == 2 else f"(H, W, {array.shape[2]})"
    assert kind.array_form.endswith(f", {shape} {array.dtype}")
    assert "in px," in FLOW.array_form and "metres" in KINDS["depth"].array_form
