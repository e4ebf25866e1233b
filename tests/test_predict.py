"""Prediction on a user's own pictures."""

import numpy as np
from PIL import Image
import pytest

from configs import demo
from input_pipeline import pipeline
from taskexpert_jax import predict, train
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import from_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, workdir) of a one-step run on one device."""
    config = demo.get_config("tiny")
    config.num_steps = 1
    config.mesh.data, config.mesh.fsdp = 4, 2
    config.batch_size = config.eval.batch_size = 8
    tasks = from_config(config)
    folder = tmp_path_factory.mktemp("predict") / "run"
    batches = lambda start: pipeline.train_batches(config, tasks, start_step=start)  # noqa: E731
    train.train(config, folder, batches, lambda: pipeline.eval_batches(config, tasks, batch_size=8))
    return config, folder


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


def test_an_unreadable_image_is_named_and_the_others_are_predicted(run, tmp_path):
    config, workdir = run
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a_broken.png").write_bytes(b"not a picture")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "images" / "b_good.png")
    with pytest.raises(UserError, match=r"a_broken.png.*1 of 2 images not predicted"):
        predict.predict(config, workdir, "latest", tmp_path / "images", tmp_path / "out")
    assert (tmp_path / "out" / "b_good" / "montage.png").is_file()


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
    frame, found = predict.fit(image, 448, 576)
    assert tuple(found) == window
    top, left, rows, columns = window
    assert (frame[top : top + rows, left : left + columns] == 200).all()
    assert frame.sum() == 200 * 3 * rows * columns
