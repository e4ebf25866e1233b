"""Joint transforms: image and labels stay one scene, label values keep their meaning, every strength has its effect."""

from collections.abc import Sequence

import numpy as np
import pytest
import tensorflow as tf

from input_pipeline import transforms
from taskexpert_jax import tasks

NAMES = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
TASKS = tasks.build(
    NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), semseg_classes=[f"class {number}" for number in range(40)]
)
BY_NAME = {task.name: task for task in TASKS}


def seed(number: int) -> tf.Tensor:
    return tf.constant([number, 7], tf.int64)


def example(height: int = 33, width: int = 46) -> dict[str, np.ndarray]:
    """A random example with invalid pixels of every task; no label of it is invalid as a whole."""
    random = np.random.default_rng(0)
    shape = (height, width, 1)
    normals = random.normal(size=(height, width, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return {
        "image": random.integers(0, 256, (height, width, 3), np.uint8),
        "semseg": random.choice(np.array([*range(40), 255], np.uint8), shape),
        "depth": (random.uniform(0.5, 10, shape) * (random.random(shape) > 0.1)).astype(np.float32),
        "normals": (normals * (random.random(shape) > 0.1)).astype(np.float16),
        "edge": random.choice(np.array([0, 1, 255], np.uint8), shape),
        "human_parts": random.choice(np.array([*range(7), 255], np.uint8), shape),
        "sal": random.choice(np.array([0, 1, 255], np.uint8), shape),
    }


def arrays(result: dict[str, tf.Tensor]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in result.items()}


def tensors(given: dict[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(value) for name, value in given.items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: Sequence[str]) -> None:
    for name in names:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_flip_mirrors_and_negates_x_of_normals() -> None:
    given = example()
    flipped = arrays(transforms.flip(tensors(given), TASKS))
    for name, value in given.items():
        sign = np.array([-1, 1, 1], np.float16) if name == "normals" else value.dtype.type(1)
        np.testing.assert_array_equal(flipped[name], value[:, ::-1] * sign, err_msg=name)


def test_flip_twice_is_the_identity() -> None:
    given = example()
    assert_same(arrays(transforms.flip(transforms.flip(tensors(given), TASKS), TASKS)), given, list(given))


def test_random_flip_follows_its_probability() -> None:
    given = tensors(example(4, 6))

    def share(probability: float) -> float:
        results = [transforms.random_flip(given, TASKS, seed(n), probability=probability) for n in range(200)]
        return float(np.mean([np.array_equal(r["image"], given["image"][:, ::-1]) for r in results]))

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0.4 < share(0.5) < 0.6


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.6), (1.0, 1.0), (1.7, 2.0)])
def test_scale_divides_depth_and_rounds_sizes_down(low: float, high: float) -> None:
    given = example()
    scaled = arrays(transforms.random_scale(tensors(given), TASKS, seed(3), scale_min=low, scale_max=high))
    # The scale is read off a label that is constant over the picture.
    flat = tensors({**given, "depth": np.ones_like(given["depth"])})
    depth_of_one = arrays(transforms.random_scale(flat, TASKS, seed(3), scale_min=low, scale_max=high))["depth"]
    assert np.ptp(depth_of_one) == 0
    scale = 1 / depth_of_one[0, 0, 0]
    assert low * (1 - 1e-6) <= scale <= high * (1 + 1e-6)
    size = tuple(np.floor(np.array([33, 46]) * scale + 1e-4).astype(int))
    for name, value in given.items():
        assert scaled[name].shape == (*size, value.shape[2]) and scaled[name].dtype == value.dtype
    nearest = tf.image.resize(given["depth"], size, method="nearest").numpy()
    np.testing.assert_allclose(scaled["depth"] * scale, nearest, rtol=1e-6)
    if low == high:
        assert_same(scaled, given, list(given))


def test_scale_takes_labels_from_the_nearest_pixel() -> None:
    """As TensorFlow's own resize, which is three times slower."""
    random = np.random.default_rng(0)
    for _ in range(20):
        height, width = random.integers(1, 60, 2)
        given = {name: value[:height, :width] for name, value in example(60, 60).items()}
        size = tf.constant(random.integers(1, 130, 2).astype(np.int32))
        resized = transforms._resize(tensors(given), TASKS, size, "bilinear")
        for task in TASKS:
            expected = tf.image.resize(given[task.name], size, method="nearest")
            np.testing.assert_array_equal(resized[task.name], expected, err_msg=task.name)


def _bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """OpenCV's INTER_LINEAR by its definition: half-pixel centres, no antialiasing, the border repeated."""
    result = image.astype(np.float64)
    for axis, new in enumerate(size):
        old = image.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        result = np.take(result, low, axis) * (1 - weight) + np.take(result, high, axis) * weight
    return result


@pytest.mark.parametrize("size", [(19, 30), (33, 46), (61, 90)])
def test_scale_interpolates_the_image_as_the_protocol(size: tuple[int, int]) -> None:
    given = example()
    resized = transforms._resize(tensors(given), TASKS, tf.constant(size), "bilinear")["image"].numpy()
    assert np.abs(resized - _bilinear(given["image"], size)).max() <= 0.5 + 1e-3  # rounded to uint8


@pytest.mark.parametrize("axis", [0, 1])
def test_image_and_labels_stay_aligned(axis: int) -> None:
    """Stripes in the image and in the labels: after scale, crop and flip their borders lie on the same pixels."""
    stripes = (np.arange(96) // 8 % 2).astype(np.uint8)
    picture = np.broadcast_to(stripes[:, None] if axis == 0 else stripes, (96, 96))[..., None]
    given = {**example(96, 96), "image": np.repeat(picture * np.uint8(255), 3, axis=2)}
    given |= {name: np.ascontiguousarray(picture) for name in ("semseg", "edge", "sal", "human_parts")}
    given["depth"] = picture + np.float32(1)
    for number in range(12):
        result = transforms.random_scale(tensors(given), TASKS, seed(number), scale_min=0.5, scale_max=2.0)
        result = transforms.random_crop(result, TASKS, seed(number), size=(64, 80))
        result = arrays(transforms.random_flip(result, TASKS, seed(number), probability=0.5))
        grey = result["image"][..., :1].astype(int)
        clear = np.abs(grey - 127.5) > 1  # exactly halfway between two stripes, either is nearest
        assert clear.mean() > 0.7
        for name in ("semseg", "edge", "sal", "human_parts"):
            np.testing.assert_array_equal(result[name][clear], grey[clear] > 127, err_msg=name)
        far = result["depth"].max()
        assert (result["depth"][clear] == far).tolist() == (grey[clear] > 127).tolist()


def test_crop_is_a_window_of_the_picture_and_reaches_every_place() -> None:
    given = example(20, 30)
    row, column = np.mgrid[:20, :30]
    given["image"] = np.stack([row, column, row + column], axis=-1).astype(np.uint8)
    places = set()
    for number in range(150):
        cropped = arrays(transforms.random_crop(tensors(given), TASKS, seed(number), size=(18, 28)))
        top, left = map(int, cropped["image"][0, 0, :2])
        places.add((top, left))
        expected = {name: value[top : top + 18, left : left + 28] for name, value in given.items()}
        assert_same(cropped, expected, list(given))
    assert places == {(top, left) for top in range(3) for left in range(3)}


def test_crop_keeps_a_side_that_is_small_enough() -> None:
    given = example(20, 30)
    cropped = arrays(transforms.random_crop(tensors(given), TASKS, seed(0), size=(25, 12)))
    assert {name: value.shape[:2] for name, value in cropped.items()} == dict.fromkeys(given, (20, 12))
    assert_same(arrays(transforms.random_crop(tensors(given), TASKS, seed(0), size=(20, 30))), given, list(given))


@pytest.mark.parametrize("size", [(20, 30), (21, 33), (28, 30), (31, 45)])
def test_padding_surrounds_the_picture(size: tuple[int, int]) -> None:
    given = example(20, 30)
    padded = arrays(transforms.pad_centre(tensors(given), TASKS, size=size))
    top, left, height, width = padded["window"]
    assert padded["window"].dtype == np.int32
    assert (top, left, height, width) == ((size[0] - 20) // 2, (size[1] - 30) // 2, 20, 30)
    outside = np.ones(size, bool)
    outside[top : top + height, left : left + width] = False
    for name, value in given.items():
        assert padded[name].shape == (*size, value.shape[2])
        np.testing.assert_array_equal(padded[name][~outside], value.reshape(-1, value.shape[2]), err_msg=name)
        pad = 0 if name in ("image", "depth", "normals") else 255
        assert (padded[name][outside] == pad).all(), name


def test_invalid_pixels_get_the_ignore_value() -> None:
    given = example()
    marked = arrays(transforms.mark_invalid(tensors(given), TASKS))
    np.testing.assert_array_equal(marked["depth"], np.where(given["depth"] == 0, np.float32(-1), given["depth"]))
    no_direction = (given["normals"] == 0).all(-1, keepdims=True)
    assert 0 < no_direction.mean() < 0.2
    np.testing.assert_array_equal(marked["normals"], np.where(no_direction, np.float16(255), given["normals"]))
    assert_same(marked, given, ["image", "semseg", "edge", "human_parts", "sal"])


def test_parts_without_a_part_are_ignored() -> None:
    given = example()
    for value in (0, 255):
        given["human_parts"][:, ::2] = 0
        given["human_parts"][:, 1::2] = value
        marked = arrays(transforms.mark_invalid(tensors(given), TASKS))
        assert (marked["human_parts"] == 255).all()
    given["human_parts"][5, 5] = 3  # a single pixel of a part
    assert_same(arrays(transforms.mark_invalid(tensors(given), TASKS)), given, ["human_parts"])


def test_labels_keep_their_values_through_all_transforms() -> None:
    given = example()
    units = np.unique(given["normals"].reshape(-1, 3), axis=0)
    for number in range(8):
        result = transforms.random_scale(tensors(given), TASKS, seed(number), scale_min=0.5, scale_max=2.0)
        result = transforms.random_crop(result, TASKS, seed(number + 100), size=(40, 40))
        result = transforms.random_flip(result, TASKS, seed(number + 200), probability=0.0)
        result = transforms.pad_centre(result, TASKS, size=(40, 40))
        result = arrays(transforms.mark_invalid(result, TASKS))
        assert set(np.unique(result["semseg"])) <= {*range(40), 255}
        assert set(np.unique(result["human_parts"])) <= {*range(7), 255}
        assert set(np.unique(result["edge"])) == set(np.unique(result["sal"])) == {0, 1, 255}
        assert (result["depth"][result["depth"] != -1] > 0).all()
        found = np.unique(result["normals"].reshape(-1, 3), axis=0)
        allowed = {tuple(unit) for unit in units if unit.any()} | {(255.0, 255.0, 255.0)}
        assert {tuple(normal) for normal in found} <= allowed
        for task in TASKS:
            assert result[task.name].dtype == task.label_dtype


def test_downscale_averages_the_image_and_keeps_metres() -> None:
    given = example(32, 48)
    reduced = arrays(transforms.downscale(tensors(given), TASKS, 0.5))
    mean = given["image"].reshape(16, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(reduced["image"] - mean).max() <= 0.5
    for task in TASKS:
        np.testing.assert_array_equal(reduced[task.name], given[task.name][1::2, 1::2], err_msg=task.name)
    assert arrays(transforms.downscale(tensors(example(425, 56)), TASKS, 0.5))["image"].shape == (212, 28, 3)


def test_same_seed_same_result_other_seed_another() -> None:
    given = tensors(example())

    def augmented(number: int) -> dict[str, np.ndarray]:
        result = transforms.random_scale(given, TASKS, seed(number), scale_min=0.5, scale_max=2.0)
        return arrays(transforms.random_crop(result, TASKS, seed(number), size=(20, 20)))

    assert_same(augmented(1), augmented(1), list(given))
    assert augmented(1)["depth"].max() != augmented(2)["depth"].max()
