"""Folder data set: reading of labels, missing labels, EXIF orientation and links."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from input_pipeline import folder, pipeline
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation.best_constant import LabelSample
from taskexpert_jax.tasks import build, from_config, kinds
from tests.input_pipeline.labelled_folder import ALL, CLASSES, HEIGHT, WIDTH, numbers, save

RECORDS = {task.name: task for task in build(ALL, loss_weights=dict.fromkeys(ALL, 1.0), semseg_classes=CLASSES)}


# --- decoding of labels ---


@pytest.mark.parametrize(
    ("name", "suffix", "stored", "expected"),
    [
        ("semseg", "png", np.uint8([[0, 3, 255]]), [[0, 3, 255]]),
        ("semseg", "npy", np.int64([[0, 3, 255]]), [[0, 3, 255]]),
        ("edge", "png", np.uint8([[0, 255, 128]]), [[0, 1, 255]]),
        ("edge", "png", np.uint8([[0, 1, 128]]), [[0, 1, 255]]),
        ("sal", "png", np.array([[False, True]]), [[0, 1]]),  # a 1-bit PNG
        ("depth", "png", np.uint16([[0, 1500, 65534, 65535]]), [[0, 1.5, 65.534, 0]]),  # 65535: no depth
        ("depth", "npy", np.float64([[0, 1.5, np.nan, np.inf, -1]]), [[0, 1.5, 0, 0, 0]]),
        ("depth", "npy", np.float32([[79.9, 80, 65504, 655.35]]), [[79.9, 0, 0, 0]]),  # the sky is far
        ("depth", "npy", np.float16([[2.5]])[..., None], [[2.5]]),
        (
            "normals",
            "npy",
            np.float32([[[0, 0.6, -0.8], [0, 0, 0], [0, 0, np.nan]]]),
            [[[0, 0.6, -0.8], [0] * 3, [0] * 3]],
        ),
    ],
)
def test_a_label_is_read_as_its_kind_says(tmp_path, name, suffix, stored, expected):
    task = RECORDS[name]
    path = save(tmp_path / f"label.{suffix}", stored)
    label = folder.read_label(path, task, stored.shape[:2])
    wanted = np.asarray(expected, task.label_dtype).reshape(*stored.shape[:2], task.label_channels)
    assert label.dtype == task.label_dtype
    np.testing.assert_allclose(label, wanted, rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_pngs_of_few_bits_hold_the_ids_stored(tmp_path, bits):
    ids = np.uint8([[0, 1, 1, 0]]) * np.uint8(1 if bits == 1 else 3)
    Image.fromarray(ids).save(tmp_path / "a.png", bits=bits)
    assert folder.read_label(tmp_path / "a.png", RECORDS["semseg"], (1, 4)).tolist() == ids[..., None].tolist()
    with pytest.raises(UserError, match=r"a\.png: "):  # a depth has no such bits
        folder.read_label(tmp_path / "a.png", RECORDS["depth"], (1, 4))


def test_normals_as_bytes_are_unit_vectors_and_grey_is_none(tmp_path):
    stored = np.uint8([[[128, 128, 0], [255, 128, 128], [0, 0, 0], [128, 128, 128], [255, 255, 255]]])
    label = folder.read_label(save(tmp_path / "n.png", stored), RECORDS["normals"], (1, 5))
    np.testing.assert_allclose(label[0, :2], [[0, 0, -1], [1, 0, 0]], atol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(label[0, :2].astype(np.float32), axis=-1), 1, rtol=1e-3)
    assert not label[0, 2:].any()


def test_of_a_palette_png_the_indices_count_and_not_the_colours(tmp_path):
    image = Image.fromarray(np.uint8([[0, 3, 255]]), mode="P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(tmp_path / "p.png")
    assert folder.read_label(tmp_path / "p.png", RECORDS["semseg"], (1, 3)).ravel().tolist() == [0, 3, 255]


def test_where_zero_is_void_classes_count_from_one(tmp_path):
    path = save(tmp_path / "s.png", np.uint8([[0, 1, 4, 255]]))
    label = folder.read_label(path, RECORDS["semseg"], (1, 4), zero_is_void=True)
    assert label.ravel().tolist() == [255, 0, 3, 255]
    with pytest.raises(UserError, match=r"holds 4, .*0 to 3"):
        folder.read_label(path, RECORDS["semseg"], (1, 4))


def test_zero_is_void_is_that_of_the_config_and_of_no_other_task(config):
    plain = folder.source(config.dataset, "val").load(0)
    config.dataset.zero_is_void = ("semseg",)
    config.dataset.semseg_classes = CLASSES[:3]
    moved = folder.source(config.dataset, "val").load(0)
    np.testing.assert_array_equal(moved["semseg"], np.where(plain["semseg"] == 0, 255, plain["semseg"] - 1))
    np.testing.assert_array_equal(moved["human_parts"], plain["human_parts"])


def test_a_floating_point_label_in_shares_is_read_from_bytes_and_arrays(tmp_path):
    """A task added by a user, unknown to the folder data set's code."""
    sal = RECORDS["sal"]
    shading = dataclasses.replace(sal, name="shading", kind=kinds.probability(shares=True))
    for path, stored in (
        ("a.png", np.uint8([[0, 51, 255]])),
        ("b.png", np.uint16([[0, 13107, 65535]])),
        ("c.npy", np.float32([[0, 0.2, 1]])),
    ):
        label = folder.read_label(save(tmp_path / path, stored), shading, (1, 3))
        np.testing.assert_allclose(label.ravel(), [0, 0.2, 1], rtol=1e-3)
    unlabelled = folder.read_label(save(tmp_path / "d.npy", np.float32([[np.nan]])), shading, (1, 1))
    assert unlabelled.ravel().tolist() == [-1]
    with pytest.raises(UserError, match=r"outside of \[0, 1\]"):
        folder.read_label(save(tmp_path / "e.npy", np.float32([[7.0]])), shading, (1, 1))


# --- examples ---


def test_examples_come_in_the_lists_order_with_the_labels_that_they_have(config, root):
    source = folder.source(config.dataset, "train")
    assert len(source) == 4 and source.labels == ALL
    examples = [source.load(index) for index in range(4)]
    assert [example["id"] for example in examples] == ["1", "a/2", "3.b", "4"]
    assert [tuple(name for name in ALL if name in example) for example in examples] == [
        (), ALL, ("semseg",), ("depth", "edge"),
    ]  # fmt: skip
    np.testing.assert_array_equal(examples[1]["image"], np.asarray(Image.open(root / "images/a/2.png")))
    np.testing.assert_array_equal(examples[1]["depth"][..., 0], np.load(root / "depth/a/2.npy"))


def test_only_the_labels_of_the_configs_tasks_are_read(config, root):
    config.tasks = ("depth", "edge")
    (root / "semseg" / "3.b.png").write_bytes(b"no picture")
    source = folder.source(config.dataset, "train")
    assert source.labels == ("depth", "edge")
    assert set(source.load(1)) == {"id", "image", "depth", "edge"}


def test_images_of_other_formats_and_names_are_found(config, root):
    Image.new("L", (WIDTH, HEIGHT), 77).save(root / "images" / "grey.JPG", format="jpeg")
    (root / "images" / "grey.json").write_text("{}")  # as written by annotation tools
    (root / "train.txt").write_text("grey\na/2\n")
    assert folder.source(config.dataset, "train").load(0)["image"][0, 0].tolist() == [77, 77, 77]


@pytest.mark.parametrize(("downscale", "size"), [(1.0, (24, 48)), (0.5, (48, 96))])
def test_images_that_are_too_large_are_reduced_until_they_fit(config, root, downscale, size):
    random = np.random.default_rng(1)
    for part, array in numbers(random, (96, 192)).items():
        save(root / part / f"large.{'npy' if part in ('depth', 'normals') else 'png'}", array)
    (root / "val.txt").write_text("large\na/2\n")
    config.dataset.downscale = downscale
    example = folder.source(config.dataset, "val").load(0)
    assert {example[name].shape[:2] for name in ("image", *ALL)} == {size}
    assert np.isin(example["depth"], np.load(root / "depth/large.npy")).all()  # metres stay metres
    config.eval.batch_size = 1
    frames = pipeline.eval_batches(config, from_config(config), batch_size=1)
    windows = [batch["window"][0].tolist() for batch in frames]
    assert windows[0] == [4, 0, 24, 48]  # the whole image at the largest size that fits


def test_a_label_that_an_image_lacks_counts_in_no_loss_and_no_gradient(config):
    config.batch_size = 1
    batches = itertools.islice(pipeline.train_batches(config, from_config(config)), 20)
    labelled = [{name for name in ALL if (batch[name] != RECORDS[name].ignore).any()} for batch in batches]
    assert {"semseg"} in labelled  # a crop of 3.b, which has classes only
    batch = next(
        itertools.islice(pipeline.train_batches(config, from_config(config)), labelled.index({"semseg"}), None)
    )
    random = np.random.default_rng(0)
    for name, task in RECORDS.items():
        prediction = random.normal(size=(*batch["image"].shape[:3], task.channels)).astype(np.float32)
        loss, gradient = jax.value_and_grad(task.loss)(jnp.asarray(prediction), batch[name], batch["mask"])
        assert (loss > 0) == (name == "semseg"), name
        assert np.isfinite(gradient).all() and gradient.any() == (name == "semseg"), name


def test_far_depth_is_trained_on_and_scored_by_one_limit(config, root):
    """Depths of 60 to 180 m: the pixels below `depth_max`, and no other, count in loss, metric and constants."""
    depth = np.linspace(60, 180, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    config.tasks, config.augment.scale_min, config.augment.scale_max = ("depth",), 0.5, 0.5
    for name in ("a/2", "4", "a/5"):
        save(root / "depth" / f"{name}.npy", depth)
    for limit, valid in ((80.0, (depth < 80).mean()), (200.0, 1.0)):
        config.dataset.depth_max = limit
        (task,) = tasks = from_config(config)
        (scored,) = pipeline.eval_batches(config, tasks, batch_size=1)
        assert (scored["depth"] != -1).mean() == pytest.approx(valid)
        assert scored["depth"].max() < limit
        state = task.metric.from_model_output(prediction=scored["depth"] + 3, label=scored["depth"], mask=None)
        assert int(state.pixels.value()) == (scored["depth"] != -1).sum()
        assert state.compute()["rmse"] == pytest.approx(3)
        sample = LabelSample(tasks)
        sample.add(scored)
        assert 60 < float(task.best_constant(sample._kept["depth"][0])[0]) < limit
        # In training the images are half as large and so twice as far, but no pixel is lost or gained by that.
        batches = itertools.islice(pipeline.train_batches(config, tasks), 4)
        trained = np.concatenate([batch["depth"].ravel() for batch in batches])
        assert limit < trained.max() < 2 * limit
        assert set(np.unique(trained[trained != -1])) <= set(np.unique(2 * depth[depth < limit]))


# --- EXIF orientation ---


def turned(root: pathlib.Path, example_id: str, part: str, orientation: int) -> None:
    """Gives a file of an example an EXIF orientation."""
    path = root / part / f"{example_id}.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientation", "turn"), [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1))]
)
def test_image_and_label_are_turned_alike(config, root, orientation, turn):
    config.tasks = ("semseg",)
    config.dataset.image_size = (WIDTH, WIDTH)
    plain = folder.source(config.dataset, "val").load(0)
    for part in ("images", "semseg"):
        turned(root, "a/5", part, orientation)
    example = folder.source(config.dataset, "val").load(0)
    for part in ("image", "semseg"):
        np.testing.assert_array_equal(example[part], turn(plain[part]))


@pytest.mark.parametrize(("label", "file"), [("semseg", "semseg/a/5.png"), ("depth", "depth/a/5.npy")])
@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_turned_image_whose_label_may_be_turned_or_not_is_refused(config, root, orientation, label, file):
    config.tasks = (label,)
    turned(root, "a/5", "images", orientation)
    with pytest.raises(UserError, match=rf"images/a/5.png: EXIF orientation {orientation} turns .*{file} has none, "):
        folder.source(config.dataset, "val").load(0)


def test_sizes_tell_whether_a_label_is_turned_by_90_degrees(config, root):
    config.tasks = ("semseg",)
    turned(root, "a/5", "images", 6)
    with pytest.raises(UserError, match=r"5.png: 32x48, but the image is 48x32"):
        folder.source(config.dataset, "val").load(0)
    save(root / "semseg/a/5.png", np.uint8(np.eye(WIDTH, HEIGHT)))
    config.dataset.image_size = (WIDTH, WIDTH)
    example = folder.source(config.dataset, "val").load(0)
    np.testing.assert_array_equal(example["semseg"][..., 0], np.eye(WIDTH, HEIGHT))
    turned(root, "a/5", "semseg", 1)  # says that it is upright
    folder.source(config.dataset, "val").load(0)


# --- links and sizes ---


def test_links_are_followed_where_an_id_leads_and_nowhere_else(config, root):
    (root / "images" / "self").symlink_to(".")
    (root / "images" / "up").symlink_to("..")
    (root / "images" / "b").symlink_to("a")
    (root / "val.txt").write_text("b/5\na/5\n")
    assert [example_id for example_id, _ in folder.source(config.dataset, "val").files] == ["b/5", "a/5"]


@pytest.mark.parametrize("target", ["nowhere", "5.png"])
def test_a_label_that_is_a_link_to_nothing_is_no_image_without_label(config, root, target):
    (root / "semseg" / "a").mkdir(exist_ok=True)
    path = root / "semseg" / "a" / "5.png"
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    (root / "val.txt").write_text("a/5")
    with pytest.raises(UserError, match=rf"^{path}: a link to a file that is missing; restore the file$"):
        folder.source(config.dataset, "val")


@pytest.mark.parametrize("example_id", ["../images/1", "/etc/1", "a//2", "./1", "a/../1", "1\0"])
def test_ids_that_lead_elsewhere_name_no_image(config, root, example_id):
    (root / "val.txt").write_text(example_id)
    with pytest.raises(UserError, match="no image"):
        folder.source(config.dataset, "val")


def test_images_wider_than_opencv_remaps_are_reduced(config, root):
    config.tasks = ("semseg",)
    for part, values in (("images", np.zeros((4, 33000, 3), np.uint8)), ("semseg", np.ones((4, 33000), np.uint8))):
        save(root / part / "wide.png", values)
    (root / "val.txt").write_text("wide")
    example = folder.source(config.dataset, "val").load(0)
    assert example["image"].shape == (1, WIDTH, 3) and (example["semseg"] == np.ones((1, WIDTH, 1))).all()
