"""Answers of the page: what they hold is what `Run` returns."""

import dataclasses
import io
import json

import numpy as np
from PIL import Image, ImageOps
import pytest

import taskexpert_jax
from taskexpert_jax.app import answers, keys
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import panels

RANDOM = np.random.default_rng(3)


def random_image(height, width):
    return RANDOM.integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, form="PNG", **settings):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **settings)
    return file.getvalue()


def unpacked(content):
    """(facts, arrays by task, "gates" included, images by name) of an answer."""
    with np.load(io.BytesIO(content)) as archive:
        found = {name: archive[name] for name in archive.files}
    facts = json.loads(found.pop("answer.json"))
    images = {
        name: np.asarray(Image.open(io.BytesIO(found.pop(name)))) for name in list(found) if name.endswith(".png")
    }
    return facts, found, images


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((32, 48), (32, 48)),  # the model's own size
        ((27, 41), (27, 41)),  # padded; the borders of its tokens are not those of the image
        ((13, 9), (13, 9)),  # upscaled by 2.46 for the model, and its results downscaled
        ((320, 480), (32, 48)),  # reduced to fit, and shown as the model sees it
        ((64, 500), (6, 48)),
    ],
)
def test_values_and_colours_are_those_of_the_run(run, size, shown):
    image = random_image(*size)
    facts, arrays, images = unpacked(answers.answer(run, encoded(image)))
    assert (facts["size"], facts["original_size"]) == (list(shown), list(size))
    assert facts["diverged"] == [] and facts["milliseconds"] > 0
    expected = run.predict(images["input.png"])
    assert arrays.keys() == {*run.tasks, "gates"} and images.keys() == {f"{name}.png" for name in run.tasks} | {
        "input.png",
        "montage.png",
    }
    for name, task in run.tasks.items():
        assert arrays[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(arrays[name], expected[name])
        np.testing.assert_array_equal(images[f"{name}.png"], panels.colour(task, expected[name]))
    np.testing.assert_array_equal(images["montage.png"], run.draw(expected, images["input.png"])["montage"])
    if size == shown:
        np.testing.assert_array_equal(images["input.png"], image)
    else:  # the values are those of the whole image, before they are upsampled to its size
        for name, task in run.tasks.items():
            np.testing.assert_array_equal(task.kind.resize(arrays[name], *size), run.predict(image)[name])


@pytest.mark.parametrize("size", [(32, 48), (27, 41), (29, 21), (320, 480)])
def test_gate_weights_lie_where_their_tokens_are(run, size):
    facts, arrays, images = unpacked(answers.answer(run, encoded(random_image(*size))))
    expected = run.gates(images["input.png"])
    gates = facts["gates"]
    assert (gates["slots"], gates["tasks"]) == (list(expected.slots), list(run.tasks))
    at_pixels = arrays["gates"][:, :, np.array(gates["rows"])[:, None], np.array(gates["columns"])]
    np.testing.assert_array_equal(at_pixels, expected.at_pixels())
    assert arrays["gates"].shape[2:4] == (gates["rows"][-1] + 1, gates["columns"][-1] + 1)  # none of the padding alone


def test_tokens_of_an_image_that_is_upscaled_for_the_model():
    # 5 pixels become 20, from pixel 6 of the frame on: their centres are at 8, 12, 16, 20 and 24.
    assert answers._tokens(6, 20, 5, patch=8).tolist() == [1, 1, 2, 2, 3]


def test_keys_have_the_shares_and_the_ends_of_the_colour_bar(run):
    facts, arrays, _ = unpacked(answers.answer(run, encoded(random_image(32, 48))))
    known = {task["name"]: task for task in answers.about(run)["tasks"]}
    ids = arrays["semseg"]
    shares = facts["tasks"]["semseg"]["shares"]
    assert len(shares) == len(run.classes["semseg"]) and sum(shares) == pytest.approx(1)
    assert shares[ids[0, 0]] == pytest.approx((ids == ids[0, 0]).mean())
    assert known["semseg"]["classes"] == list(run.classes["semseg"])
    colours = np.array(known["semseg"]["colours"])
    np.testing.assert_array_equal(colours[ids], panels.colour(run.tasks["semseg"], ids))
    depth = facts["tasks"]["depth"]
    assert depth["limits"] == pytest.approx(np.percentile(arrays["depth"], (0.5, 99.5)).tolist())
    assert (depth["minimum"], depth["maximum"]) == (arrays["depth"].min(), arrays["depth"].max())
    assert facts["tasks"]["edge"]["limits"] == [0, 1] and facts["tasks"]["normals"] == {}
    # The legend of the normals has the colours that vectors in these directions are drawn with.
    legend = dict(known["normals"]["legend"])
    down = panels.colour(run.tasks["normals"], np.array([[[0, 1, 0]]], np.float32))[0, 0]
    assert legend["down"] == down.tolist() and legend["to the camera"] == [128, 128, 255]


def test_a_task_that_diverges_has_no_map_and_no_array(diverged):
    facts, arrays, images = unpacked(answers.answer(diverged, encoded(random_image(32, 48))))
    assert facts["diverged"] == ["depth"]
    assert "depth" not in arrays and "depth.png" not in images and "depth" not in facts["tasks"]
    assert "semseg" in arrays and "montage.png" in images


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize(
    "form", [("JPEG", {"exif": exif(6), "quality": 95}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})]
)
def test_files_of_all_formats_are_read_upright(run, form):
    data = encoded(random_image(24, 30), form[0], **form[1])
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    _, _, images = unpacked(answers.answer(run, data))
    np.testing.assert_array_equal(images["input.png"], np.asarray(expected))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"is damaged, or none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"),
        (encoded(np.zeros((40, 40, 3), np.uint8), "ICO"), r"is damaged, or none of BMP"),
        (encoded(np.zeros((40, 40, 3), np.uint8))[:60], r"."),
        (encoded(Image.new("1", (9000, 9000))), r"9000x9000 pixels, but at most 67 megapixels are read: reduce it"),
    ],
)
def test_what_is_no_image_is_one_line(run, data, line):
    with pytest.raises(UserError, match=rf"^not a readable image \(.*{line}.*\)$"):
        answers.answer(run, data)


def test_every_kind_of_value_has_a_key():
    """A task of a kind that the page does not know gets the drawn key of `predict`."""
    from taskexpert_jax.tasks import kinds

    record = next(iter(taskexpert_jax.tasks.build(("depth",), loss_weights={"depth": 1.0})))
    flow = dataclasses.replace(record, name="flow", title="flow", kind=kinds.vector(2, unit="pixels"))
    assert (keys.of_task(flow)["caption"], keys.of_task(flow)["unit"]) == ("", "pixels")
    key = keys.of_values(flow, RANDOM.normal(size=(8, 9, 2)).astype(np.float32))
    assert key["key"].startswith("data:image/png;base64,")
