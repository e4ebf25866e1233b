"""Prediction on a user's own pictures."""

import os

import numpy as np
from PIL import Image
import pytest

from taskexpert_jax import images, predict
from taskexpert_jax.errors import UserError
from tests import random_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir) of random parameters."""
    config = random_runs.padded_scenes()
    workdir = tmp_path_factory.mktemp("predict") / "run"
    random_runs.save(config, workdir)
    return config, workdir


def pictures(folder):
    random = np.random.default_rng(0)
    folder.mkdir()
    colours = random.integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(colours[..., 0]).save(folder / "grey.png")
    Image.fromarray(colours).quantize(16).save(folder / "palette.png")
    Image.fromarray(np.dstack([colours, colours[..., :1]])).save(folder / "rgba.png")
    Image.fromarray(colours[:7, :9]).save(folder / "small.png")
    Image.fromarray(colours).resize((3000, 2000)).save(folder / "large.jpg")
    return {"grey": (60, 80), "palette": (60, 80), "rgba": (60, 80), "small": (7, 9), "large": (2000, 3000)}


def test_images_of_every_kind_and_size(run, tmp_path):
    config, workdir = run
    sizes = pictures(tmp_path / "images")
    predict.predict(config, workdir, "best", tmp_path / "images", tmp_path / "out")
    for name, (height, width) in sizes.items():
        folder = tmp_path / "out" / name
        arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
        assert arrays.keys() == set(config.tasks)
        assert {a.shape[:2] for a in arrays.values()} == {(height, width)}
        assert arrays["semseg"].dtype == np.uint8 and arrays["semseg"].max() < len(config.dataset.semseg_classes)
        np.testing.assert_allclose(np.linalg.norm(arrays["normals"], axis=-1), 1, atol=1e-4)
        assert arrays["depth"].min() >= 0
        assert arrays["sal"].min() >= 0 and arrays["sal"].max() <= 1
        assert {path.stem for path in folder.glob("*.png")} == {*config.tasks, "montage"}
        with Image.open(folder / "montage.png") as montage:
            assert montage.width >= 384


def test_each_unreadable_image_is_named_and_the_others_are_predicted(run, tmp_path, capsys):
    """One of them is not unreadable: its name would lead out of the output folder, and is no text."""
    config, workdir = run
    (tmp_path / "images").mkdir()
    for name in ("a_broken.png", "c_broken.png"):
        (tmp_path / "images" / name).write_bytes(b"not a picture")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "images" / "b.png")
    (tmp_path / "images" / "b.png").rename(tmp_path / "images" / os.fsdecode(b"\xe9.png"))
    with pytest.raises(UserError, match="2 of 3 images not predicted"):
        predict.predict(config, workdir, "latest", tmp_path / "images", tmp_path / "out")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [f"{tmp_path}/images/{name}_broken.png" for name in "ac"]
    assert (tmp_path / "out" / "\\xe9" / "montage.png").is_file()


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_predicted(run, tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "read_each", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=r"results cannot be written to .*a.png.* with --output"):
        predict.predict(*run, "latest", tmp_path / "a.png", tmp_path / "a.png")


def test_a_name_never_leads_out_of_the_output_folder(run, tmp_path):
    config, workdir = run
    Image.new("RGB", (50, 40), "red").save(tmp_path / "...png", "PNG")  # its stem is `..`
    predict.predict(config, workdir, "latest", tmp_path / "...png", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"...png", "out"}
    assert (tmp_path / "out" / "...png" / "montage.png").is_file()


def test_no_image_there_is_an_error(run, tmp_path):
    config, workdir = run
    with pytest.raises(UserError, match=r"missing"):
        predict.predict(config, workdir, "best", tmp_path / "missing", tmp_path / "out")


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((425, 560), (11, 8, 425, 560)),  # fits: only padded, as in evaluation
        ((224, 288), (0, 0, 448, 576)),  # half: enlarged
        ((896, 1152), (0, 0, 448, 576)),  # twice: reduced
        ((480, 640), (8, 0, 432, 576)),  # too large: reduced, its shape kept
    ],
)
def test_fitting_into_the_models_size(size, window):
    image = np.full((*size, 3), 200, np.uint8)
    frame, found = images.fit(image, (448, 576), (448, 576))
    assert frame.shape == (448, 576, 3) and tuple(found) == window
    top, left, rows, columns = window
    assert (frame[top : top + rows, left : left + columns] == 200).all()
    assert frame.sum() == 200 * 3 * rows * columns


@pytest.mark.parametrize(
    ("size", "frame_size", "window"),
    [
        ((425, 560), (448, 576), (11, 8, 425, 560)),  # fits the model: as without larger frames
        ((224, 288), (448, 576), (0, 0, 448, 576)),
        ((480, 640), (900, 1200), (210, 280, 480, 640)),  # in windows, at its own size
        ((100, 640), (900, 1200), (400, 280, 100, 640)),
        ((1800, 1200), (900, 1200), (0, 300, 900, 600)),  # reduced to the larger frame
    ],
)
def test_fitting_into_larger_frames(size, frame_size, window):
    frame, found = images.fit(np.full((*size, 3), 200, np.uint8), (448, 576), (900, 1200))
    assert frame.shape == (*frame_size, 3) and tuple(found) == window
    assert frame.sum() == 200 * 3 * window[2] * window[3]


def test_a_large_image_is_seen_in_windows_only_where_asked_for(run, tmp_path):
    """Twice as large as the model's size; its left and right halves then are what the model sees, alone."""
    config, workdir = run
    height, width = config.dataset.image_size
    halves = np.random.default_rng(5).integers(0, 256, (2, height, width, 3), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(np.concatenate(list(halves), axis=1)).save(tmp_path / "images" / "both.png")
    for name, half in zip(("left", "right"), halves, strict=True):
        Image.fromarray(half).save(tmp_path / "images" / f"{name}.png")
    windows = config.copy_and_resolve_references()
    windows.eval.image_size, windows.eval.overlap = (height, 2 * width), 0.0
    depths = {}
    for way, of in {"whole": config, "windows": windows}.items():
        predict.predict(of, workdir, "best", tmp_path / "images", tmp_path / way)
        depths[way] = {name: np.load(tmp_path / way / name / "depth.npy") for name in ("both", "left", "right")}
    apart = np.concatenate([depths["whole"]["left"], depths["whole"]["right"]], axis=1)
    np.testing.assert_allclose(depths["windows"]["both"], apart, rtol=1e-4, atol=1e-5)
    assert np.abs(depths["whole"]["both"] - apart).max() > 1e-3
    for name in ("left", "right"):
        np.testing.assert_array_equal(depths["windows"][name], depths["whole"][name])
