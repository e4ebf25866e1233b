"""Drawings: colours of values, and keys that agree with them."""

import matplotlib
import numpy as np
from PIL import Image
import pytest

from taskexpert_jax import tasks
from taskexpert_jax.tasks import canvas, panels
from taskexpert_jax.tasks.kinds.depth import bar_labels

CLASSES = ("background", "wall", "floor", "chair", "table")
NAMES = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
RECORDS = {
    task.name: task for task in tasks.build(NAMES, loss_weights=dict.fromkeys(NAMES, 1.0), semseg_classes=CLASSES)
}
TURBO = matplotlib.colormaps["turbo_r"]


def _turbo(share: float) -> list[int]:
    return [round(255 * channel) for channel in TURBO(share)[:3]]


def _colours_in(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.asarray(image).reshape(-1, 3).tolist()}


def _class_colour(index: int) -> tuple[int, ...]:
    ids = np.full((1, 1), index, np.uint8)
    return tuple(panels.colour(RECORDS["semseg"], ids)[0, 0].tolist())


def _key(picture: Image.Image, height: int) -> Image.Image:
    return picture.crop((0, height, picture.width, picture.height))


@pytest.mark.parametrize("count", [7, 21, 40])
def test_palette_colours_differ_from_each_other_and_from_what_is_not_a_class(count):
    drawn = np.vstack([canvas.palette(count), [canvas.BACKGROUND, canvas.INVALID, canvas.PAPER]])
    apart = np.abs(drawn[:, None].astype(int) - drawn).sum(axis=-1)
    np.fill_diagonal(apart, 1000)
    apart[-3, -2] = apart[-2, -3] = 1000  # background and invalid pixels are both dark
    assert apart.min() >= 50


def test_a_longer_palette_begins_with_the_shorter():
    np.testing.assert_array_equal(canvas.palette(40)[:21], canvas.palette(21))
    assert len(np.unique(canvas.palette(255), axis=0)) == 255


def test_classes_get_their_palette_colour_and_background_is_dark():
    ids = np.array([[0, 1, 4, 255]], np.uint8)
    expected = [canvas.BACKGROUND, *canvas.palette(5)[[1, 4]].tolist(), canvas.INVALID]
    np.testing.assert_array_equal(panels.colour(RECORDS["semseg"], ids)[0], expected)


def test_human_parts_and_classes_share_the_drawing():
    ids = np.array([[0, 3]], np.uint8)
    expected = [canvas.BACKGROUND, canvas.palette(7)[3].tolist()]
    np.testing.assert_array_equal(panels.colour(RECORDS["human_parts"], ids)[0], expected)


def test_the_legend_shows_the_present_classes_and_no_other():
    ids = np.full((96, 128), 1, np.uint8)
    ids[:5] = 3
    key = _colours_in(_key(panels.picture(RECORDS["semseg"], ids), 3 * 96))
    assert {_class_colour(1), _class_colour(3)} <= key
    assert not {_class_colour(0), _class_colour(2), _class_colour(4), canvas.INVALID} & key


def test_the_legend_names_ignored_pixels_only_where_there_are_some():
    ids = np.full((96, 128), 1, np.uint8)
    ids[0, 0] = 255
    assert canvas.INVALID in _colours_in(_key(panels.picture(RECORDS["semseg"], ids), 3 * 96))


def test_a_legend_wider_than_the_picture_wraps():
    many = tuple(f"class number {i}" for i in range(40))
    (task,) = tasks.build(["semseg"], loss_weights={"semseg": 1.0}, semseg_classes=many)
    ids = (np.arange(96 * 128) % 40).astype(np.uint8).reshape(96, 128)
    picture = panels.picture(task, ids)
    assert picture.width == 384
    assert {tuple(colour) for colour in canvas.palette(40).tolist()} <= _colours_in(_key(picture, 3 * 96))


def test_depth_colours_run_from_near_to_far_and_stop_at_the_range():
    metres = np.array([[1.0, 3.0, 5.0, 0.2, 9.0, -1.0]], np.float32)
    expected = [_turbo(0.0), _turbo(128 / 255), _turbo(1.0), _turbo(0.0), _turbo(1.0), [0, 0, 0]]
    np.testing.assert_array_equal(panels.colour(RECORDS["depth"], metres, limits=(1, 5))[0], expected)


def test_a_wild_depth_does_not_take_the_colours_from_the_others():
    metres = np.linspace(1, 3, 10_000, dtype=np.float32).reshape(100, 100)
    metres[0, 0] = 1000
    colours = panels.colour(RECORDS["depth"], metres)
    np.testing.assert_allclose(colours[0, 1], _turbo(0.0), atol=2)
    np.testing.assert_allclose(colours[-1, -1], _turbo(1.0), atol=2)


def test_the_colour_bar_stands_over_the_depths_it_names():
    assert bar_labels((1, 5)) == ["1.0 m", "2.0 m", "3.0 m", "4.0 m", "5.0 m"]
    assert bar_labels((2, 2.4)) == ["2.00 m", "2.10 m", "2.20 m", "2.30 m", "2.40 m"]
    metres = np.linspace(1, 5, 96 * 128, dtype=np.float32).reshape(96, 128)
    bar = np.asarray(_key(panels.picture(RECORDS["depth"], metres, limits=(1, 5)), 3 * 96 + 6))[5]
    at_labels = [bar[i * 383 // 4] for i in range(5)]
    expected = panels.colour(RECORDS["depth"], np.linspace(1, 5, 5)[None], limits=(1, 5))[0]
    np.testing.assert_allclose(at_labels, expected, atol=6)


def test_one_depth_everywhere_and_no_depth_at_all_are_drawn():
    np.testing.assert_array_equal(panels.colour(RECORDS["depth"], np.full((2, 2), 3.0)), [[_turbo(0)] * 2] * 2)
    assert panels.colour(RECORDS["depth"], np.full((2, 2), -1.0)).max() == 0
    assert panels.picture(RECORDS["depth"], np.full((2, 2), -1.0)).size[0] == 384


def test_normals_are_red_to_the_right_green_up_and_blue_towards_the_camera():
    vectors = np.array([[[1, 0, 0], [-1, 0, 0], [0, -1, 0], [0, 1, 0], [0, 0, -1], [255, 255, 255]]], np.float16)
    expected = [[255, 128, 128], [0, 128, 128], [128, 255, 128], [128, 0, 128], [128, 128, 255], [0, 0, 0]]
    np.testing.assert_array_equal(panels.colour(RECORDS["normals"], vectors)[0], expected)
    key = _colours_in(_key(panels.picture(RECORDS["normals"], np.full((96, 128, 3), 255.0)), 3 * 96))
    assert {tuple(colour) for colour in expected[:5]} <= key


@pytest.mark.parametrize("name", ["edge", "sal"])
def test_probabilities_are_grey_and_ignored_pixels_are_not(name):
    share = np.array([[0, 0.5, 1, 255]], np.float32)
    expected = [[0] * 3, [128] * 3, [255] * 3, canvas.INVALID_GREY]
    np.testing.assert_array_equal(panels.colour(RECORDS[name], share)[0], expected)
    np.testing.assert_array_equal(panels.colour(RECORDS[name], np.array([[0, 1]], np.uint8))[0], [[0] * 3, [255] * 3])


def test_pixels_that_the_caller_rules_out_are_invalid_as_well():
    metres = np.array([[1.0, np.nan, 5.0, 3.0]], np.float32)
    valid = np.array([[True, True, True, False]])
    colours = panels.colour(RECORDS["depth"], metres, valid=valid, limits=(1, 5))
    np.testing.assert_array_equal(colours[0], [_turbo(0.0), [0] * 3, _turbo(1.0), [0] * 3])


def test_small_maps_grow_by_a_whole_factor_and_keep_their_pixels():
    ids = np.random.default_rng(0).integers(0, 5, (96, 128), np.uint8)
    shown = np.asarray(panels.picture(RECORDS["semseg"], ids))[: 3 * 96]
    np.testing.assert_array_equal(shown, panels.colour(RECORDS["semseg"], ids).repeat(3, axis=0).repeat(3, axis=1))


def test_large_maps_shrink_and_classes_do_not_mix():
    ids = np.random.default_rng(0).integers(0, 5, (2000, 3000), np.uint8)
    picture = panels.picture(RECORDS["semseg"], ids)
    assert picture.width == 800
    assert _colours_in(picture.crop((0, 0, 800, 533))) == {_class_colour(i) for i in range(5)}


def test_a_montage_begins_with_the_input_and_shows_every_panel():
    image = np.full((96, 128, 3), (10, 200, 30), np.uint8)
    classes = [(f"class {i}", panels.picture(RECORDS["semseg"], np.full((96, 128), i, np.uint8))) for i in (1, 2, 3)]
    plain = ("plain", np.full((96, 128, 3), (200, 10, 30), np.uint8))
    sheet = np.asarray(canvas.montage(image, [*classes, plain])).astype(int)
    places = []
    for colour in ((10, 200, 30), *(_class_colour(i) for i in (1, 2, 3)), (200, 10, 30)):
        rows, columns = np.nonzero((sheet == colour).all(axis=-1))
        assert len(rows) >= 288 * 384
        places.append((int(rows.min()), int(columns.min())))
    # Five images are arranged in rows of three and two.
    top, below = places[0][0], places[3][0]
    assert [row for row, _ in places] == [top, top, top, below, below] and top < below
    left, middle, right = (column for _, column in places[:3])
    assert [column for _, column in places] == [left, middle, right, left, middle] and left < middle < right


@pytest.mark.parametrize("size", [(7, 9), (9, 7), (1, 1), (1, 3000), (3000, 2)])
def test_a_montage_of_any_size_stays_readable(size):
    titled = [
        (task.title, panels.picture(task, np.zeros((*size, 3) if task.label_channels == 3 else size, np.uint8)))
        for task in RECORDS.values()
    ]
    sheet = canvas.montage(np.zeros((*size, 3), np.uint8), titled)
    assert 320 * 3 <= sheet.width <= 4000
    assert 150 <= sheet.height <= 4000


def test_a_comparison_draws_prediction_and_label_in_the_same_colours():
    label = np.full((96, 128), 2.0, np.float32)
    label[:, 64:] = 4.0
    depth = (RECORDS["depth"],)
    prediction = np.full((96, 128), 4.0, np.float32)
    sheet = panels.comparison(np.zeros((96, 128, 3), np.uint8), depth, {"depth": prediction}, {"depth": label})
    far = (np.asarray(sheet) == _turbo(1.0)).all(axis=-1)
    whole = 288 * 384
    above, below = far[: sheet.height // 2].sum(), far[sheet.height // 2 :].sum()
    assert whole <= above < whole + 200  # and a little of the colour bar
    assert whole // 2 <= below < whole // 2 + 200


def test_a_comparison_without_labels_shows_the_predictions():
    prediction = {"sal": np.full((96, 128), 1.0, np.float32)}
    sheet = panels.comparison(np.zeros((96, 128, 3), np.uint8), (RECORDS["sal"],), prediction, {})
    assert (np.asarray(sheet)[:300, 400:] == 255).all(axis=-1).sum() >= 264 * 384
