"""Inference averaged over flips, scales and sliding windows."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from configs import demo
from input_pipeline import pipeline
from taskexpert_jax.config import IMAGENET
from taskexpert_jax.evaluation import inference
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config

SIZE = (32, 48)  # image size of the tiny model


def config_with(**fields):
    config = demo.get_config("tiny")
    config.eval.update(fields)
    return config


TASKS = from_config(config_with())
BY_NAME = {task.name: task for task in TASKS}


@pytest.fixture(scope="module")
def model():
    """The tiny model of all six tasks and its variables, perturbed so that none is exactly 0."""
    config = config_with()
    built = taskexpert.from_config(config, TASKS)
    variables = sharding.unbox(
        jax.jit(lambda x: built.init(jax.random.key(0), x, train=False))(jnp.zeros((1, *SIZE, 3)))
    )
    leaves, tree = jax.tree.flatten(variables)
    random = np.random.default_rng(0)
    return built, jax.tree.unflatten(tree, [leaf + 0.05 * random.normal(size=leaf.shape) for leaf in leaves])


class PixelByPixel:
    """Stand-in for the model: each pixel's prediction is a linear map of its colour plus `bias`."""

    def __init__(self, tasks=TASKS, bias=0.0):
        random = np.random.default_rng(1)
        self.tasks = tasks
        self.maps = {task.name: random.normal(size=(3, task.channels)).astype(np.float32) for task in tasks}
        self.bias = bias

    def apply(self, variables, image, *, train):
        assert variables is None and not train
        return {name: jnp.einsum("bhwc,cd->bhwd", image, of) + self.bias for name, of in self.maps.items()}


def frames(*windows, frame=SIZE, seed=0):
    """Random frames, whose padding is random too, and the windows of their images."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (len(windows), *frame, 3), np.uint8), np.array(windows, np.int32)


def infer(model, variables, config, image, window):
    found = jax.jit(inference.make_inference(model, config))(variables, image, window)
    return {name: np.asarray(of) for name, of in found.items()}


def inside(maps, window):
    """Crops of the images from their frames."""
    return [
        of[top : top + height, left : left + width] for of, (top, left, height, width) in zip(maps, window, strict=True)
    ]


def assert_same_inside(ours, theirs, window, **tolerance):
    """Asserts equal predictions in the form of `to_mean`, because logits may differ by a constant."""
    for task in TASKS:
        pairs = zip(inside(ours[task.name], window), inside(theirs[task.name], window), strict=True)
        for own, other in pairs:
            np.testing.assert_allclose(task.to_mean(own), task.to_mean(other), err_msg=task.name, **tolerance)


@pytest.mark.parametrize("scales", [(1.0,), (1,)])
def test_without_views_it_is_the_models_own_prediction_bit_for_bit(model, scales):
    image, window = frames((0, 0, 32, 48), (3, 5, 20, 31))
    built, variables = model
    ours = infer(built, variables, config_with(scales=scales), image, window)
    theirs = jax.jit(lambda v, *of: built.apply(v, inputs.normalise(*of, IMAGENET), train=False))(
        variables, image, window
    )
    for name, of in theirs.items():
        np.testing.assert_array_equal(ours[name], of)


def test_with_flip_a_mirrored_image_has_the_mirrored_prediction(model):
    image, window = frames((0, 0, 32, 48), (3, 5, 20, 31))
    mirrored = window.copy()
    mirrored[:, 1] = SIZE[1] - window[:, 1] - window[:, 3]
    config = config_with(flip=True)
    straight = infer(*model, config, image, window)
    turned = infer(*model, config, image[:, :, ::-1], mirrored)
    plain = infer(*model, config_with(), image, window)
    mirror = infer(*model, config_with(), image[:, :, ::-1], mirrored)
    for task in TASKS:
        turned_back, as_it_is = task.undo_flip(turned[task.name][:, :, ::-1]), straight[task.name]
        if task.name == "normals":
            # Where two vectors nearly cancel, the direction of the mean has a rounding error of about 1 / its length.
            both = task.to_mean(plain[task.name]) + task.to_mean(task.undo_flip(mirror[task.name][:, :, ::-1]))
            length = np.linalg.norm(both, axis=-1, keepdims=True)
            assert length.min() < 0.1  # such vectors occur
            turned_back, as_it_is = turned_back * length, as_it_is * length
        np.testing.assert_allclose(turned_back, as_it_is, rtol=1e-5, atol=1e-6, err_msg=task.name)
        assert np.abs(task.to_mean(straight[task.name]) - task.to_mean(plain[task.name])).max() > 1e-3, task.name


class ByColumn:
    """Stand-in whose prediction depends only on the column: with flip, pixels average both columns' predictions."""

    def __init__(self, task, columns):
        self.tasks = (task,)
        self.columns = np.asarray(columns, np.float32)  # (W, channels)

    def apply(self, variables, image, *, train):
        del variables, train
        return {self.tasks[0].name: jnp.broadcast_to(self.columns, (*image.shape[:3], self.columns.shape[1]))}


def flipped_twice(name, left, right):
    """Means at the left and right border with flip, for a model that predicts `left` and `right` in any image."""
    columns = [left] * (SIZE[1] // 2) + [right] * (SIZE[1] // 2)
    image, window = frames((0, 0, *SIZE))
    found = infer(ByColumn(BY_NAME[name], columns), None, config_with(flip=True), image, window)[name]
    return np.asarray(BY_NAME[name].to_mean(found))[0, 0, [0, -1]]


def test_probabilities_are_averaged_not_logits():
    channels = BY_NAME["semseg"].channels
    left, right = np.zeros(channels), np.zeros(channels)
    left[0], right[1] = 20.0, 3.0
    probability = np.exp(right) / np.exp(right).sum()
    expected = (np.eye(channels)[0] + probability) / 2
    np.testing.assert_allclose(flipped_twice("semseg", left, right), [expected, expected], rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(flipped_twice("sal", [0.0, 30.0], [0.0, 0.0]), [[0.25, 0.75]] * 2, rtol=1e-6)
    np.testing.assert_allclose(flipped_twice("edge", [-40.0], [0.0]), [[0.75, 0.25]] * 2, rtol=1e-6)


def test_metres_are_averaged_and_normals_as_unit_vectors_with_x_turned_back():
    np.testing.assert_allclose(flipped_twice("depth", [1.0], [4.0]), [[2.5], [2.5]])
    # Predictions have any length; in the mirror image, the right one points to the left.
    found = flipped_twice("normals", [0.0, 0.0, 5.0], [0.1, 0.0, 0.0])
    np.testing.assert_allclose(found, [[-(0.5**0.5), 0, 0.5**0.5], [0.5**0.5, 0, 0.5**0.5]], atol=1e-6)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_mean_of_equal_predictions_is_that_prediction(task):
    prediction = jnp.asarray(10 * np.random.default_rng(0).normal(size=(1, 8, 9, task.channels)), jnp.float32)
    mean = task.from_mean((task.to_mean(prediction) + task.to_mean(prediction)) / 2)
    np.testing.assert_allclose(task.values(mean), task.values(prediction), rtol=1e-5, atol=1e-7)
    label = np.zeros((1, 8, 9, task.label_channels), task.label_dtype)
    label[..., -1] = 1
    ours, theirs = (
        task.metric.from_model_output(prediction=of, label=label, mask=None).compute() for of in (mean, prediction)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_one_metre_in_an_image_enlarged_by_two_is_two():
    image, window = frames((0, 0, *SIZE))
    for scale in (2.0, 0.5):
        config = config_with(scales=(scale,))
        depth = infer(ByColumn(BY_NAME["depth"], np.full((1, 1), 1.0)), None, config, image, window)["depth"]
        np.testing.assert_allclose(depth, scale)


def test_scales_are_averaged():
    image, window = frames((0, 0, *SIZE))
    config = config_with(scales=(0.5, 1.0, 2.0))
    depth = infer(ByColumn(BY_NAME["depth"], np.full((1, 1), 1.0)), None, config, image, window)["depth"]
    np.testing.assert_allclose(depth, 3.5 / 3, rtol=1e-6)


def test_the_model_sees_multiples_of_the_patch_size_and_the_window_at_their_scale():
    seen = []

    class Watching(PixelByPixel):
        def apply(self, variables, image, *, train):
            seen.append(image.shape[1:3])
            return super().apply(variables, image, train=train)

    image, window = frames((0, 0, *SIZE))
    infer(Watching(), None, config_with(scales=(0.6, 1.3)), image, window)
    assert set(seen) == {(16, 32), (40, 64)}  # 19.2 x 28.8 and 41.6 x 62.4, rounded to patches of 8
    assert inference.resized((32, 48), 0.01, 8) == (8, 8)
    # Rows [8, 27) of 32 become [4, 13.5) of 16, which contains the pixel centres 4.5 to 12.5.
    found = inference.resized_window(jnp.array([[8, 6, 19, 36]]), (32, 48), (16, 16))
    np.testing.assert_array_equal(found, [[4, 2, 9, 12]])


VIEWS = {
    "flip": ({"flip": True}, SIZE),
    "scales": ({"scales": (0.5, 1.0, 1.75)}, SIZE),
    "windows": ({"image_size": (50, 90)}, (50, 90)),
    "all": ({"flip": True, "scales": (0.75, 2.0), "image_size": (50, 90), "overlap": 0.5}, (50, 90)),
}


@pytest.mark.parametrize(("fields", "frame"), VIEWS.values(), ids=VIEWS)
def test_a_picture_of_one_colour_keeps_its_value_up_to_the_border(fields, frame):
    """Bright padding has no influence in any combination of flips, scales and windows."""
    window = np.array([(3, 5, 20, 31), (0, 0, *frame), (frame[0] - 21, 0, 21, 5)], np.int32)
    image = np.full((3, *frame, 3), 255, np.uint8)
    for of, (top, left, height, width) in zip(image, window, strict=True):
        of[top : top + height, left : left + width] = (200, 30, 90)
    ours = infer(PixelByPixel(), None, config_with(**fields), image, window)
    uniform = jnp.full((3, *frame, 3), jnp.array((200, 30, 90), jnp.uint8))
    colour = inputs.normalise(uniform, jnp.asarray(window), IMAGENET)
    theirs = PixelByPixel().apply(None, colour, train=False)
    assert all(np.isfinite(of).all() for of in ours.values())
    for task in TASKS:
        if task.flip_signs or task.scale_exponent:
            continue  # the stand-in does not adapt its prediction to flips or scales
        for own, other in zip(inside(ours[task.name], window), inside(theirs[task.name], window), strict=True):
            np.testing.assert_allclose(task.to_mean(own), task.to_mean(other), rtol=1e-4, err_msg=task.name)


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.9])
def test_windows_of_a_map_that_looks_at_single_pixels_equal_the_whole(overlap):
    frame = (50, 90)
    image, window = frames((0, 0, *frame), (1, 2, 40, 50), (20, 20, 10, 70), (9, 21, 32, 48), frame=frame)
    model = PixelByPixel(bias=0.3)
    ours = infer(model, None, config_with(image_size=frame, overlap=overlap), image, window)
    whole = model.apply(None, inputs.normalise(jnp.asarray(image), jnp.asarray(window), IMAGENET), train=False)
    assert_same_inside(ours, whole, window, rtol=1e-4, atol=1e-6)


def test_a_picture_that_fits_is_seen_as_it_would_be_without_windows(model):
    """In frames of even and odd size, with any amount of padding."""
    for height, width, frame in ((32, 48, (50, 91)), (21, 30, (65, 90))):
        picture = np.random.default_rng(4).integers(0, 256, (height, width, 3), np.uint8)
        found = {}
        for size in (SIZE, frame):
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            image = np.zeros((1, *size, 3), np.uint8)
            image[0, top : top + height, left : left + width] = picture
            window = np.array([(top, left, height, width)], np.int32)
            of = infer(*model, config_with(image_size=frame), image, window)
            found[size] = {name: np.stack(inside(maps, window)) for name, maps in of.items()}
        whole = np.array([(0, 0, height, width)])
        assert_same_inside(found[frame], found[SIZE], whole, rtol=1e-4, atol=1e-6)


def test_windows_change_what_the_model_says_of_a_larger_picture(model):
    image, window = frames((0, 0, 48, 64), frame=(48, 64))
    whole = infer(*model, config_with(), image, window)
    parts = infer(*model, config_with(image_size=(48, 64)), image, window)
    more = infer(*model, config_with(image_size=(48, 64), overlap=0.8), image, window)
    for one, other in ((whole, parts), (parts, more)):
        assert np.abs(one["depth"] - other["depth"]).max() > 1e-3


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.75])
@pytest.mark.parametrize("frame", [(50, 90), (32, 200), (33, 49)])
def test_windows_cover_every_picture_and_overlap(frame, overlap):
    random = np.random.default_rng(5)
    heights, widths = (random.integers(1, side + 1, 50) for side in frame)
    tops, lefts = ((side - sides) // 2 for side, sides in zip(frame, (heights, widths), strict=True))
    window = np.stack([tops, lefts, heights, widths], axis=1).astype(np.int32)
    starts = np.asarray(inference.window_starts(jnp.asarray(window), frame, SIZE, overlap))
    assert (starts >= 0).all() and (starts + SIZE <= frame).all()
    for axis in (0, 1):
        first, last = window[:, axis], window[:, axis] + window[:, axis + 2]
        assert (starts[..., axis].min(axis=0) <= first).all()
        assert (starts[..., axis].max(axis=0) + SIZE[axis] >= last).all()
        steps = np.diff(np.sort(starts[..., axis], axis=0), axis=0)
        assert steps.max(initial=0) <= np.ceil(SIZE[axis] * (1 - overlap))


def test_a_window_of_the_frames_size_is_one_forward_pass():
    assert inference.is_single(inference.views(config_with(image_size=SIZE)), SIZE)
    assert not inference.is_single(inference.views(config_with(image_size=(32, 56))), (32, 56))
    assert inference.is_single(inference.views(config_with(image_size=(32, 56))), SIZE)


@pytest.mark.multidevice
def test_windows_of_a_batch_on_eight_devices_are_those_on_one():
    """Equal predictions, and devices exchange neither images nor maps."""
    frame = (40, 64)
    image, window = frames(*((i % 3, i, 30, 50 + i) for i in range(8)), frame=frame)
    config = config_with(image_size=frame, flip=True, scales=(1.0, 1.5))
    single = infer(PixelByPixel(), None, config, image, window)
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1}, {})
    with sharding.use(mesh):
        batch = jax.device_put((image, window), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        step = jax.jit(inference.make_inference(PixelByPixel(), config), out_shardings=sharding.batch_sharding(mesh))
        compiled = step.lower(None, *batch).compile()
        sharded = compiled(None, *batch)
    for name, of in single.items():
        np.testing.assert_allclose(sharded[name], of, rtol=1e-4, atol=1e-5)
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in compiled.as_text()]


def test_evaluation_reads_frames_of_its_own_size():
    config = config_with(image_size=(40, 64))
    batch = next(iter(pipeline.eval_batches(config, TASKS, batch_size=2)))
    assert batch["image"].shape == (2, 40, 64, 3) and batch["depth"].shape == (2, 40, 64, 1)
    np.testing.assert_array_equal(batch["window"], [(0, 0, 40, 64)] * 2)  # scenes are rendered at the requested size
    assert next(iter(pipeline.train_batches(config, TASKS)))["image"].shape[1:3] == SIZE
