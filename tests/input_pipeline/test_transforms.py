"""Joint transforms compared with plain definitions: image and labels stay aligned, every argument has an effect."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import numpy as np
import pytest

from input_pipeline import transforms
from taskexpert_jax import tasks
from taskexpert_jax.config.fields import FIELDS

NAMES = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
TASKS = tasks.build(
    NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), semseg_classes=[f"class {number}" for number in range(40)]
)
BY_NAME = {task.name: task for task in TASKS}
ANY_CROP: dict[str, Any] = {"max_class_share": 1.0, "redraws": 10}


def example(height: int = 33, width: int = 46) -> dict[str, np.ndarray]:
    """Random example with invalid pixels in every label; no label is all invalid."""
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


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: Sequence[str]) -> None:
    for name in names:
        assert one[name].dtype == other[name].dtype, name
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def scaled_and_cropped(given: dict[str, np.ndarray], number: int, size: tuple[int, int], **strengths: Any):
    strengths = {"scale_min": 0.5, "scale_max": 2.0, **ANY_CROP, **strengths}
    return transforms.random_scale_and_crop(given, TASKS, (number, 7), size=size, **strengths)


def read_scale(given: dict[str, np.ndarray], number: int, **strengths: Any) -> float:
    """Scale that is drawn, recovered from a constant depth label."""
    flat = {**given, "depth": np.ones_like(given["depth"])}
    depth = scaled_and_cropped(flat, number, (1000, 1000), **strengths)["depth"]
    assert np.ptp(depth) == 0
    return float(1 / depth[0, 0, 0])


# -------------------------------------------------------------------------------------------------------------- scale


def _nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour with half-pixel centres, in exact integer arithmetic."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, label.shape, strict=False))
    return label[rows[:, None], columns]


def _bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """OpenCV's INTER_LINEAR by definition: half-pixel centres, no antialiasing, replicated border."""
    result = image.astype(np.float64)
    for axis, new in enumerate(size):
        old = image.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        result = np.take(result, low, axis) * (1 - weight) + np.take(result, high, axis) * weight
    return result


@pytest.mark.parametrize("number", range(12))
def test_scale_resizes_as_defined_and_divides_depth(number: int) -> None:
    given = example()
    scale = read_scale(given, number)
    scaled = scaled_and_cropped(given, number, (1000, 1000))
    size = (int(33 * scale + 1e-4), int(46 * scale + 1e-4))
    for task in TASKS:
        expected = _nearest(given[task.name], size)
        if task.name == "depth":
            np.testing.assert_allclose(scaled["depth"], expected / scale, rtol=1e-6)
        else:
            np.testing.assert_array_equal(scaled[task.name], expected, err_msg=task.name)
        assert scaled[task.name].dtype == task.label_dtype
    # OpenCV interpolates bytes with 11-bit weights.
    assert np.abs(scaled["image"] - _bilinear(given["image"], size)).max() < 1


def test_scale_is_drawn_evenly_from_its_range() -> None:
    given = example(4, 4)
    scales = np.array([read_scale(given, number) for number in range(400)])
    assert 0.5 <= scales.min() < 0.52 and 1.98 < scales.max() < 2
    counts, _ = np.histogram(scales, 5, (0.5, 2.0))
    assert counts.min() > 50  # 80 expected, standard deviation 8
    assert all(read_scale(given, number, scale_min=1.5, scale_max=1.5) == pytest.approx(1.5) for number in range(5))


def test_a_scale_of_one_changes_nothing() -> None:
    given = example()
    assert_same(scaled_and_cropped(given, 0, (100, 100), scale_min=1, scale_max=1), given, list(given))


@pytest.mark.parametrize("pattern", ["rows", "columns", "board"])
def test_image_and_labels_stay_aligned(pattern: str) -> None:
    """A pattern in both image and labels has its borders at the same pixels after all transforms."""
    row, column = np.mgrid[:96, :96] // 8 % 2
    squares = {"rows": row, "columns": column, "board": row ^ column}[pattern].astype(np.uint8)[..., None]
    given = {**example(96, 96), "image": np.repeat(squares * np.uint8(255), 3, axis=2)}
    given |= dict.fromkeys(("semseg", "edge", "sal", "human_parts"), squares)
    given["depth"] = squares + np.float32(1)
    for number in range(12):
        result = scaled_and_cropped(given, number, (64, 80))
        result = transforms.random_flip(result, TASKS, (number, 7), probability=0.5)
        result = transforms.pad_centre(result, TASKS, size=(64, 80))
        top, left, height, width = result["window"]
        result = {
            name: value[top : top + height, left : left + width] for name, value in result.items() if value.ndim > 1
        }
        grey = result["image"][..., :1].astype(int)
        clear = np.abs(grey - 127.5) > 2  # excludes pixels halfway between two squares, where either is nearest
        assert clear.mean() > 0.5
        for name in ("semseg", "edge", "sal", "human_parts"):
            np.testing.assert_array_equal(result[name][clear], grey[clear] > 127, err_msg=name)
        far = result["depth"].max()
        assert (result["depth"][clear] == far).tolist() == (grey[clear] > 127).tolist()


# --------------------------------------------------------------------------------------------------------------- crop


def test_crop_is_a_window_of_the_scaled_picture() -> None:
    given = example(20, 30)
    for number in range(8):
        whole = scaled_and_cropped(given, number, (1000, 1000), scale_min=1.2)
        cropped = scaled_and_cropped(given, number, (18, 28), scale_min=1.2)
        windows = np.lib.stride_tricks.sliding_window_view(whole["image"], (18, 28, 3))[..., 0, :, :, :]
        places = np.argwhere((windows == cropped["image"]).all((2, 3, 4)))
        assert len(places) == 1
        top, left = places[0]
        expected = {name: value[top : top + 18, left : left + 28] for name, value in whole.items()}
        assert_same(cropped, expected, list(given))


def test_crop_reaches_every_place_evenly() -> None:
    given = example(20, 30)
    row, column = np.mgrid[:20, :30]
    given["image"] = np.stack([row, column, row + column], axis=-1).astype(np.uint8)
    places: dict[tuple[int, int], int] = {}
    for number in range(450):
        cropped = scaled_and_cropped(given, number, (18, 28), scale_min=1, scale_max=1)
        top, left = map(int, cropped["image"][0, 0, :2])
        places[top, left] = places.get((top, left), 0) + 1
    assert set(places) == {(top, left) for top in range(3) for left in range(3)}
    assert min(places.values()) > 25  # 50 expected, standard deviation 7


def test_crop_keeps_a_side_that_is_small_enough() -> None:
    given = example(20, 30)
    cropped = scaled_and_cropped(given, 0, (25, 12), scale_min=1, scale_max=1)
    assert {name: value.shape[:2] for name, value in cropped.items()} == dict.fromkeys(given, (20, 12))


def _uneven(width: int = 200) -> dict[str, np.ndarray]:
    """Example with class 0 on the left three quarters, class 1 to its right, and two columns of void."""
    given = example(20, width)
    given["semseg"][:] = 0
    given["semseg"][:, 3 * width // 4 :] = 1
    given["semseg"][:, -2:] = 255
    return given


def _largest_share(label: np.ndarray) -> float:
    values, counts = np.unique(label[label != 255], return_counts=True)
    return counts.max() / counts.sum() if len(values) > 1 else 1.0


def test_crops_are_redrawn_until_they_are_varied() -> None:
    given = _uneven()
    crop = functools.partial(scaled_and_cropped, given, size=(20, 30), scale_min=1, scale_max=1)
    first = [_largest_share(crop(n)["semseg"]) for n in range(100)]
    never = [_largest_share(crop(n, max_class_share=0.75, redraws=0)["semseg"]) for n in range(100)]
    some = [_largest_share(crop(n, max_class_share=0.75)["semseg"]) for n in range(100)]
    many = [_largest_share(crop(n, max_class_share=0.75, redraws=1000)["semseg"]) for n in range(100)]
    stricter = [_largest_share(crop(n, max_class_share=0.6, redraws=1000)["semseg"]) for n in range(100)]
    assert first == never
    share = np.mean(np.array(first) <= 0.75)  # probability that a single draw is accepted
    assert 0.02 < share < 0.3
    assert np.mean(np.array(some) <= 0.75) == pytest.approx(1 - (1 - share) ** 11, abs=0.15)
    assert 0.6 < max(many) <= 0.75
    assert max(stricter) <= 0.6
    kept = [a == b for a, b in zip(first, some, strict=True) if a <= 0.75]
    assert kept and all(kept)  # an accepted first draw is kept


def test_a_frame_of_one_class_keeps_its_last_draw() -> None:
    given = _uneven()
    given["semseg"][:] = 3
    cropped = scaled_and_cropped(given, 0, (20, 30), scale_min=1, scale_max=1, max_class_share=0.75)
    assert cropped["image"].shape == (20, 30, 3)


def test_where_nothing_is_labelled_the_first_crop_is_taken() -> None:
    given = _uneven()
    given["semseg"][:] = 255
    for number in range(10):
        first = scaled_and_cropped(given, number, (20, 30), scale_min=1, scale_max=1)
        assert_same(
            scaled_and_cropped(given, number, (20, 30), scale_min=1, scale_max=1, max_class_share=0.5),
            first,
            list(given),
        )


def test_without_the_deciding_task_the_first_crop_is_taken() -> None:
    given = _uneven()
    others = [task for task in TASKS if not task.decides_crop]
    assert len(others) == len(TASKS) - 1
    strengths = {"size": (20, 30), "scale_min": 1.0, "scale_max": 1.0, "redraws": 10}
    for number in range(20):
        one = transforms.random_scale_and_crop(given, others, (number, 0), max_class_share=0.75, **strengths)
        two = transforms.random_scale_and_crop(given, TASKS, (number, 0), max_class_share=1.0, **strengths)
        assert_same(one, two, ["image", "depth"])


# --------------------------------------------------------------------------------------------------------------- flip


def test_flip_mirrors_and_negates_x_of_normals() -> None:
    given = example()
    flipped = transforms.flip(given, TASKS)
    for name, value in given.items():
        sign = np.array([-1, 1, 1], np.float16) if name == "normals" else value.dtype.type(1)
        np.testing.assert_array_equal(flipped[name], value[:, ::-1] * sign, err_msg=name)


def test_flip_twice_is_the_identity() -> None:
    given = example()
    assert_same(transforms.flip(transforms.flip(given, TASKS), TASKS), given, list(given))


def test_random_flip_follows_its_probability() -> None:
    given = example(4, 6)

    def share(probability: float) -> float:
        results = [transforms.random_flip(given, TASKS, (n, 7), probability=probability) for n in range(200)]
        return float(np.mean([np.array_equal(r["image"], given["image"][:, ::-1]) for r in results]))

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0.4 < share(0.5) < 0.6


# ------------------------------------------------------------------------------------------- padding and invalid marks


@pytest.mark.parametrize("size", [(20, 30), (21, 33), (28, 30), (31, 45)])
def test_padding_surrounds_the_picture(size: tuple[int, int]) -> None:
    given = example(20, 30)
    padded = transforms.pad_centre(given, TASKS, size=size)
    top, left, height, width = padded["window"]
    assert padded["window"].dtype == np.int32
    assert (top, left, height, width) == ((size[0] - 20) // 2, (size[1] - 30) // 2, 20, 30)
    outside = np.ones(size, bool)
    outside[top : top + height, left : left + width] = False
    for name, value in given.items():
        assert padded[name].shape == (*size, value.shape[2]) and padded[name].dtype == value.dtype
        np.testing.assert_array_equal(padded[name][~outside], value.reshape(-1, value.shape[2]), err_msg=name)
        assert (padded[name][outside] == (0 if name == "image" else BY_NAME[name].ignore)).all(), name


def test_invalid_pixels_get_the_ignore_value() -> None:
    given = example()
    given["normals"][3, 4] = (0, 0, 1)  # two components of 0 do not make a normal invalid
    before = {name: value.copy() for name, value in given.items()}
    marked = transforms.mark_invalid(given, TASKS)
    np.testing.assert_array_equal(marked["depth"], np.where(given["depth"] == 0, np.float32(-1), given["depth"]))
    no_direction = (given["normals"] == 0).all(-1, keepdims=True)
    assert 0 < no_direction.mean() < 0.2
    np.testing.assert_array_equal(marked["normals"], np.where(no_direction, np.float16(255), given["normals"]))
    assert_same(marked, given, ["image", "semseg", "edge", "human_parts", "sal"])
    assert_same(given, before, list(given))  # cached examples must not be modified


def test_parts_without_a_part_are_ignored() -> None:
    given = example()
    for value in (0, 255):
        given["human_parts"][:, ::2] = 0
        given["human_parts"][:, 1::2] = value
        assert (transforms.mark_invalid(given, TASKS)["human_parts"] == 255).all()
    given["human_parts"][5, 5] = 3  # a single pixel of a part
    assert_same(transforms.mark_invalid(given, TASKS), given, ["human_parts"])


def test_a_label_that_is_missing_counts_nowhere() -> None:
    given = example() | {"id": "a"}
    for task in TASKS:
        partial = {name: value for name, value in given.items() if name != task.name}
        filled = transforms.fill_missing(partial, TASKS)
        assert_same(filled, partial, [name for name in given if name not in (task.name, "id")])
        result = scaled_and_cropped(filled, 1, (40, 40), max_class_share=0.75)
        result = transforms.flip(result, TASKS)
        result = transforms.pad_centre(transforms.mark_invalid(result, TASKS), TASKS, size=(40, 40))
        assert result[task.name].dtype == task.label_dtype
        assert (result[task.name] == task.ignore).all(), task.name
    assert set(transforms.fill_missing(given, TASKS[:2])) == {"image", "id", "semseg", "depth"}


def test_every_seed_has_its_own_stream() -> None:
    seeds = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
    rule = FIELDS["seed"].rule
    assert all(map(rule.allows, seeds)) and not any(map(rule.allows, (-1, 2**32, 2**64)))
    assert len({transforms.generator((seed, 0), 0).random() for seed in seeds}) == len(seeds)
    assert len({jax.random.key_data(jax.random.key(seed)).tobytes() for seed in seeds}) == len(seeds)
    with pytest.raises(OverflowError):
        transforms.generator((2**64, 0), 0)  # never the stream of seed 0


def test_depth_out_of_the_range_of_a_data_set_is_no_depth_whoever_reads_it() -> None:
    stored = np.float32([[[79.5], [80], [1e6], [np.nan], [np.inf], [-3], [0], [0.5]]])
    given = {"image": np.zeros((1, 8, 3), np.uint8), "id": "a", "depth": stored}
    for limit, valid in ((80.0, [0, 7]), (1e7, [0, 1, 2, 7])):
        task = tasks.build(["depth"], loss_weights={"depth": 1.0}, depth_max=limit)
        filled = transforms.mark_invalid(transforms.fill_missing(given, task), task)["depth"].ravel()
        assert np.flatnonzero(filled != -1).tolist() == valid
        np.testing.assert_array_equal(filled[valid], stored.ravel()[valid])


def test_labels_keep_their_values_through_all_transforms() -> None:
    given = example()
    units = np.unique(given["normals"].reshape(-1, 3), axis=0)
    for number in range(8):
        result = scaled_and_cropped(given, number, (40, 40), max_class_share=0.75)
        result = transforms.random_flip(result, TASKS, (number, 7), probability=0.0)
        result = transforms.pad_centre(transforms.mark_invalid(result, TASKS), TASKS, size=(40, 40))
        assert set(np.unique(result["semseg"])) <= {*range(40), 255}
        assert set(np.unique(result["human_parts"])) <= {*range(7), 255}
        assert set(np.unique(result["edge"])) == set(np.unique(result["sal"])) == {0, 1, 255}
        assert (result["depth"][result["depth"] != -1] > 0).all()
        found = np.unique(result["normals"].reshape(-1, 3), axis=0)
        allowed = {tuple(unit) for unit in units if unit.any()} | {(255.0, 255.0, 255.0)}
        assert {tuple(normal) for normal in found} <= allowed
        for task in TASKS:
            assert result[task.name].dtype == task.label_dtype


# ---------------------------------------------------------------------------------------------------- downscale, seeds


def test_downscale_averages_the_image_and_keeps_metres() -> None:
    given = example(32, 48)
    reduced = transforms.downscale(given, TASKS, 0.5)
    mean = given["image"].reshape(16, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(reduced["image"] - mean).max() <= 0.5
    for task in TASKS:
        np.testing.assert_array_equal(reduced[task.name], given[task.name][1::2, 1::2], err_msg=task.name)
    assert transforms.downscale(example(425, 56), TASKS, 0.5)["image"].shape == (212, 28, 3)


def test_every_transform_is_a_function_of_example_and_seed() -> None:
    given = example()

    def augmented(run: int, position: int) -> dict[str, np.ndarray]:
        strengths = {"scale_min": 0.5, "scale_max": 2.0, **ANY_CROP}
        result = transforms.random_scale_and_crop(given, TASKS, (run, position), size=(20, 20), **strengths)
        result = transforms.random_flip(result, TASKS, (run, position), probability=0.5)
        return result

    assert_same(augmented(1, 5), augmented(1, 5), list(given))
    for run, position in ((2, 5), (1, 6)):
        assert augmented(1, 5)["depth"].max() != augmented(run, position)["depth"].max()


def test_a_strength_does_not_change_what_others_draw() -> None:
    given = example(40, 60)
    for number in range(6):
        scale = read_scale(given, number)
        assert read_scale(given, number, max_class_share=0.1, redraws=3) == scale
