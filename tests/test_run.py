"""The Python API: predictions, gates and metrics of a run, and what importing it costs."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import taskexpert_jax
from taskexpert_jax import predict
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.run import Prediction
from taskexpert_jax.tasks.metrics.boundary import counts as boundary
from tests import random_runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (24, 36, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("api") / "run"
    random_runs.save(random_runs.padded_scenes(), workdir)
    return taskexpert_jax.load_run(workdir)


def same(found, expected):
    assert list(found) == list(expected)
    for task, array in expected.items():
        np.testing.assert_array_equal(found[task], array)


def test_the_shapes_and_dtypes_are_those_of_the_docstring(run):
    found = run.predict(IMAGE)
    assert list(found) == list(run.tasks) == ["semseg", "depth", "normals", "edge", "human_parts", "sal"]
    ids = ("semseg", "human_parts")
    assert {name: array.dtype.name for name, array in found.items()} == {
        name: "uint8" if name in ids else "float32" for name in run.tasks
    }
    assert {name: array.shape for name, array in found.items()} == {
        name: (24, 36, 3) if name == "normals" else (24, 36) for name in run.tasks
    }
    assert run.classes.keys() == set(ids) and found["semseg"].max() < len(run.classes["semseg"])


def test_predict_mode_writes_the_same_bits(run, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    predict.predict(read_run(run.path), run.path, "best", tmp_path / "a.png", tmp_path / "out")
    written = {task: np.load(tmp_path / "out" / "a" / f"{task}.npy") for task in run.tasks}
    same(run.predict(tmp_path / "a.png"), written)
    drawn = run.draw(run.predict(IMAGE), IMAGE)
    for name, picture in drawn.items():
        with Image.open(tmp_path / "out" / "a" / f"{name}.png") as saved:
            np.testing.assert_array_equal(picture, saved)


def test_every_form_of_an_image_is_the_same_image(run, tmp_path):
    expected = run.predict(IMAGE)
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    opaque = np.dstack([IMAGE, np.full((24, 36), 255, np.uint8)])
    for image in (str(tmp_path / "a.png"), Image.fromarray(IMAGE), opaque, np.asfortranarray(IMAGE)):
        same(run.predict(image), expected)
    grey = IMAGE[..., 0]
    same(run.predict(grey), run.predict(np.repeat(grey[..., None], 3, axis=2)))
    turned = Image.fromarray(IMAGE)
    turned.getexif()[0x0112] = 3  # upside down
    same(run.predict(turned), run.predict(np.ascontiguousarray(IMAGE[::-1, ::-1])))


def test_a_list_is_predicted_in_its_order_whatever_the_sizes_and_the_batch(run):
    images = [RANDOM.integers(0, 256, size, np.uint8) for size in ((24, 36, 3), (60, 50, 3), (10, 12, 3), (32, 48, 3))]
    singly = [run.predict(image) for image in images]
    for found, expected in zip(run.predict(images), singly, strict=True):
        same(found, expected)
    batched = run.predict(images, batch_size=3)
    for found, expected, image in zip(batched, singly, images, strict=True):
        assert found["depth"].shape == image.shape[:2]
        np.testing.assert_allclose(found["depth"], expected["depth"], rtol=1e-4, atol=1e-5)
    assert run.predict([]) == []


def test_several_threads_may_call_it(run):
    images = [RANDOM.integers(0, 256, (24, 36, 3), np.uint8) for _ in range(4)]
    singly = [run.predict(image) for image in images]
    fresh = dataclasses.replace(run, _steps={})
    with ThreadPoolExecutor(2) as threads:
        for found, expected in zip(threads.map(fresh.predict, images), singly, strict=True):
            same(found, expected)


def test_views_are_averaged_and_compiled_once_each(run):
    plain = run.predict(IMAGE)["edge"]
    flipped = run.predict(IMAGE, flip=True)["edge"]
    of_mirror = run.predict(np.ascontiguousarray(IMAGE[:, ::-1]))["edge"][:, ::-1]
    np.testing.assert_allclose(flipped, (plain + of_mirror) / 2, rtol=1e-4, atol=1e-5)
    assert np.abs(flipped - plain).max() > 1e-3
    height, width = run.config.dataset.image_size
    large = np.zeros((height, 2 * width, 3), np.uint8)
    assert run.predict(large, image_size=(height, 2 * width))["depth"].shape == large.shape[:2]
    before = {key: step._cache_size() for key, step in run._steps.items()}
    run.predict([IMAGE, IMAGE, large[:10, :10]])
    run.predict(IMAGE, flip=True)
    assert {key: step._cache_size() for key, step in run._steps.items()} == before
    assert not run.config.eval.flip


def test_gates_are_weights_over_the_tokens(run):
    gates = run.gates(IMAGE)
    assert gates.weights.shape == (4, 6, 4, 6, 6) and gates.tasks == tuple(run.tasks)
    assert gates.slots[-1] == "memory" and len(gates.slots) == 6
    np.testing.assert_allclose(gates.weights.sum(axis=-1), 1, atol=1e-5)
    assert tuple(gates.window) == (4, 6, 24, 36)
    np.testing.assert_array_equal(gates.picture, IMAGE)
    assert gates.at_pixels().shape == (4, 6, 24, 36, 6)
    np.testing.assert_allclose(gates.prediction["depth"], run.predict(IMAGE)["depth"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gates.summary.weights, gates.at_pixels().mean(axis=(2, 3)).swapaxes(0, 1), atol=1e-5)


def test_a_diverged_task_is_left_out_and_says_so(run):
    variables = {**run.variables, "params": {**run.variables["params"]}}
    head = variables["params"]["head_depth"]
    variables["params"]["head_depth"] = jax.tree.map(lambda leaf: leaf * np.nan, head)
    diverged = dataclasses.replace(run, variables=variables)
    found = diverged.predict(IMAGE)
    assert found.diverged == ("depth",) and list(found) == [task for task in run.tasks if task != "depth"]
    with pytest.raises(UserError, match="NaN or Inf in the prediction of depth"):
        found["depth"]
    with pytest.raises(KeyError):
        found["albedo"]
    np.testing.assert_array_equal(found["semseg"], run.predict(IMAGE)["semseg"])


@pytest.mark.parametrize(
    ("image", "settings", "message"),
    [
        (IMAGE.astype(np.float32), {}, r"must be \(H, W, 3\) uint8, .*not \(24, 36, 3\) float32"),
        (IMAGE[..., :2], {}, r"not \(24, 36, 2\) uint8"),
        (np.zeros((0, 3, 3), np.uint8), {}, r"not \(0, 3, 3\)"),
        (7, {}, "must be a path, an image of Pillow or an array, not int"),
        ("missing.png", {}, "missing.png: no such image"),
        (str(ROOT / "README.md"), {}, "README.md: not a readable image"),
        (np.ma.masked_array(IMAGE, mask=IMAGE > 99), {}, "has masked pixels"),
        (np.broadcast_to(IMAGE[:1, :1], (8192, 8193, 3)), {}, "8192x8193 pixels, but at most 67 megapixels are read"),
        (Image.new("1", (8193, 8192)), {}, "8192x8193 pixels, but at most 67 megapixels are read"),
        (Image.new("RGB", (0, 5)), {}, "5x0, no pixels"),
        (b"image.png", {}, "not bytes"),
        (IMAGE, {"scales": (0,)}, r"scales=\(0,\): give one or more factors in"),
        (IMAGE, {"scales": 1.0}, "scales=1.0: give one or more factors in"),
        (IMAGE, {"flip": "yes"}, "flip='yes': must be True or False"),
        (IMAGE, {"image_size": 64}, "image_size=64: give a height and a width in pixels"),
        (IMAGE, {"image_size": (8, 8)}, "config.eval.image_size=8x8 is smaller"),
        (IMAGE, {"batch_size": 0}, "batch_size=0: must be a whole number, at least 1"),
        (IMAGE, {"batch_size": 1.5}, "batch_size=1.5: must be a whole number"),
        (IMAGE, {"batch_size": "2"}, "batch_size='2': must be a whole number"),
    ],
)
def test_wrong_input_is_one_line(run, image, settings, message):
    with pytest.raises(UserError, match=message) as error:
        run.predict(image, **settings)
    assert "\n" not in str(error.value)


def test_a_path_without_a_run_is_one_line(tmp_path):
    for path, message in ((tmp_path, "config.json is missing"), ("", "the path is empty"), ("s3://a/b", "s3://")):
        with pytest.raises(ValueError, match=message):
            taskexpert_jax.load_run(path)


def test_a_batch_without_the_needed_arrays_is_one_line(run):
    label = np.zeros((1, 32, 48, 1), np.float32)
    for batches, message in (
        ([], "no batch"),
        ([{"image": IMAGE[None]}], "no labels in the batch"),
        ([{"image": IMAGE, "depth": label}], r"batch\[\"image\"\] must be"),
        ([{"image": np.zeros((1, 32, 48, 3), np.uint8), "depth": label[0]}], r"batch\['depth'\] must have the shape"),
        ([{"image": np.zeros((1, 24, 36, 3), np.uint8), "depth": label[:, :24, :36]}], "24x36"),
        ([{"depth": label}, None], "a batch is a dict of arrays, not NoneType|must be"),
        ({"depth": label}, "give a list of batches, each a dict of arrays, not dict"),
    ):
        with pytest.raises(UserError, match=message):
            run.evaluate(batches)


def test_drawing_another_models_task_is_refused(run):
    with pytest.raises(UserError, match="'albedo' is not a task of"):
        run.draw(Prediction({"albedo": IMAGE}))
    with pytest.raises(UserError, match="a prediction is a dict of arrays by task, not list"):
        run.draw([IMAGE])


def test_odsf_alone_is_that_of_the_counts():
    label = np.zeros((30, 40), np.uint8)
    label[:, 20:] = 1
    edges = np.zeros((30, 40), np.float32)
    edges[:, 19] = 0.8
    counts = boundary.image_counts(np.floor(255 * edges).astype(np.uint8), label, 0.02)
    assert taskexpert_jax.odsf([edges], [label], max_dist=0.02) == boundary.scores(counts)
    assert 90 < boundary.scores(counts)["odsF"] < 100
    for predictions, labels, message in (
        ([], [], "no prediction"),
        ([edges], [], "different numbers"),
        ([edges + 1], [label], r"outside of \[0, 1\]"),
        ([edges * np.nan], [label], r"outside of \[0, 1\]"),
        ([edges > 0], [label], "must be float"),
        ([edges[:5]], [label], "resize it"),
        ([edges], [edges], "a boundary label must be whole numbers or bool, and this float32 is not"),
    ):
        with pytest.raises(UserError, match=message):
            taskexpert_jax.odsf(predictions, labels)


IMPORTED = """
import logging, signal, sys, warnings
import absl.flags, absl.logging
before = [list(warnings.filters), signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook]
flags = set(absl.flags.FLAGS)
import taskexpert_jax
light = "jax" not in sys.modules
for name in taskexpert_jax.__all__:
    getattr(taskexpert_jax, name)
assert light and set(dir(taskexpert_jax)) >= set(taskexpert_jax.__all__)
assert "tensorflow" not in sys.modules and "matplotlib" not in sys.modules
ours = [name for name in set(absl.flags.FLAGS) - flags if absl.flags.FLAGS.find_module_defining_flag(name) or ""]
ours = [name for name in ours if "taskexpert" in absl.flags.FLAGS.find_module_defining_flag(name)]
print("flags:", ours)
loggers = [logging.root, absl.logging.get_absl_logger(), logging.getLogger("asyncio")]
print("log filters:", [filter for logger in loggers for filter in logger.filters])
modules = [filter[3].pattern for filter in warnings.filters if filter[3] is not None and filter not in before[0]]
print("warnings:", [pattern for pattern in modules if "PIL" in pattern])
print("hooks:", [signal.getsignal(signal.SIGINT), sys.excepthook, sys.unraisablehook] == before[1:])
"""


def test_importing_sets_no_flags_filters_or_handlers():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["flags: []", "log filters: []", "warnings: []", "hooks: True"]
