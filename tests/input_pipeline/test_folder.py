"""Folder data set: reading of labels, missing labels, and error messages."""

from collections.abc import Callable
import dataclasses
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from configs import folder as folder_config
from input_pipeline import folder, pipeline, show
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation.best_constant import LabelSample
from taskexpert_jax.tasks import build, from_config, kinds

ALL = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
CLASSES = ("road", "grass", "sky", "car")
HEIGHT, WIDTH = 32, 48
RECORDS = {task.name: task for task in build(ALL, loss_weights=dict.fromkeys(ALL, 1.0), semseg_classes=CLASSES)}


def save(path: pathlib.Path, array: np.ndarray) -> pathlib.Path:
    """Writes a .npy or an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def numbers(random: np.random.Generator, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[str, np.ndarray]:
    """Contents of an example's files."""
    return {
        "images": random.integers(0, 256, (*size, 3), np.uint8),
        "semseg": random.integers(0, 4, size, np.uint8),
        "depth": random.uniform(0.5, 9, size).astype(np.float32),
        "normals": random.normal(size=(*size, 3)).astype(np.float32) / 10 + np.float32([0, 0, -1]),
        "edge": random.integers(0, 2, size, np.uint8) * np.uint8(255),
        "human_parts": random.integers(0, 7, size, np.uint8),
        "sal": random.integers(0, 2, size, np.uint8),
    }


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """Folder of four training images and one validation image; a/2 and a/5 have all labels, 1 has none."""
    random = np.random.default_rng(0)
    (tmp_path / "train.txt").write_text("1\na/2\n\n3.b\r\n4\n")
    (tmp_path / "val.txt").write_text("a/5")
    kept = {"1": (), "a/2": ALL, "3.b": ("semseg",), "4": ("depth", "edge"), "a/5": ALL}
    for example_id, names in kept.items():
        for part, array in numbers(random).items():
            if part in ("images", *names):
                save(tmp_path / part / f"{example_id}.{'npy' if part in ('depth', 'normals') else 'png'}", array)
    return tmp_path


@pytest.fixture
def config(root: pathlib.Path) -> ConfigDict:
    """Small config with all six tasks of the folder."""
    config = folder_config.get_config("tiny")
    config.tasks = ALL
    config.dataset.data_dir = str(root)
    config.dataset.semseg_classes = CLASSES
    config.dataset.image_size = (HEIGHT, WIDTH)
    config.dataset.threads = 1
    return config


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


# --- faults ---


def spoilt(root: pathlib.Path, fault: str) -> None:
    """Introduces one fault."""
    semseg, depth = root / "semseg" / "a" / "5.png", root / "depth" / "a" / "5.npy"
    size = (HEIGHT, WIDTH)
    damage: dict[str, Callable[[], object]] = {
        "no list": (root / "val.txt").unlink,
        "empty list": lambda: (root / "val.txt").write_text("\n"),
        "no image": lambda: (root / "val.txt").write_text("a/5\nb/6\n"),
        "suffix": lambda: (root / "val.txt").write_text("a/5.png\n"),
        "no label": semseg.unlink,
        "two files": lambda: save(semseg.with_suffix(".npy"), np.zeros(size, np.uint8)),
        "format": lambda: semseg.rename(semseg.with_suffix(".tif")),
        "broken png": lambda: semseg.write_bytes(semseg.read_bytes()[:100]),
        "broken npy": lambda: depth.write_bytes(b"not an array"),
        "broken image": lambda: (root / "images/a/5.png").write_bytes(b"not a picture"),
        "size": lambda: save(semseg, np.zeros((HEIGHT, WIDTH + 1), np.uint8)),
        "channels": lambda: save(semseg, np.zeros((*size, 3), np.uint8)),
        "class": lambda: save(semseg, np.full(size, 4, np.uint8)),
        "negative": lambda: (semseg.unlink(), save(semseg.with_suffix(".npy"), np.full(size, -2))),
        "fractions": lambda: (semseg.unlink(), save(semseg.with_suffix(".npy"), np.ones(size))),
        "grey mask": lambda: save(root / "edge/a/5.png", np.full(size, 37, np.uint8)),
        "mixed mask": lambda: save(root / "sal/a/5.png", np.uint8([[0, 1, 255] * (WIDTH // 3)] * HEIGHT)),
        "millimetres": lambda: save(depth, np.linspace(600, 8000, HEIGHT * WIDTH, dtype=np.float32).reshape(size)),
        "near millimetres": lambda: save(depth, np.arange(50, 50 + HEIGHT * WIDTH, dtype=np.float32).reshape(size)),
        "far": lambda: save(depth, np.linspace(100, 300, HEIGHT * WIDTH, dtype=np.float32).reshape(size)),
        "8 bits": lambda: (depth.unlink(), save(depth.with_suffix(".png"), np.ones(size, np.uint8))),
        "long normals": lambda: save(root / "normals/a/5.npy", np.full((*size, 3), 127.0, np.float32)),
    }
    damage[fault]()


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("no list", r"no id list \S+/val.txt; .*'val'.* one per line"),
        ("empty list", r"\S+/val.txt is empty; .*'val'"),
        (
            "no image",
            r"\S+/val.txt: no image \S+/images/b/6.jpg, .png or the like \(1 of 2 ids.*; add the image or remove",
        ),
        ("suffix", r"\S+/val.txt: no image .*; write ids without suffix"),
        ("no label", r"\S+/semseg: no label of semseg, .* for any of the 1 images of val.txt; add some or remove"),
        ("two files", r"\S+/semseg/a/5: there are .npy and .png; keep one"),
        ("format", r"\S+/semseg/a/5.tif: convert this file to .png or .npy"),
        ("broken png", r"\S+/semseg/a/5.png: not a readable label \(.*\); replace it, or remove it"),
        ("broken npy", r"\S+/depth/a/5.npy: not a readable label \(.*\); replace it, or remove it"),
        ("broken image", r"\S+/images/a/5.png: not a readable"),
        ("size", r"\S+/semseg/a/5.png: 32x49, .*32x48; .*size of its image"),
        ("channels", r"\S+/semseg/a/5.png: uint8 of shape \(32, 48, 3\), .*semseg has 1 .*; save it as"),
        ("class", r"\S+/semseg/a/5.png: holds 4, .*0 to 3, .*255"),
        ("negative", r"\S+/semseg/a/5.npy: holds -2, .*4 classes"),
        ("fractions", r"\S+/semseg/a/5.npy: holds floating-point"),
        ("grey mask", r"\S+/edge/a/5.png: holds 37; .*0 and 255, .*0 and 1, .*128"),
        ("mixed mask", r"\S+/sal/a/5.png: holds 0, 1, 255; .*0 and 255"),
        (
            "millimetres",
            r"\S+/depth/a/5.npy: depths of 600 to 8000 m, .*depth_max=80 m; .*divide them by 1000",
        ),
        ("near millimetres", r"\S+/depth/a/5.npy: depths of 50 to 1585 m, .*millimetres, divide them by 1000"),
        ("far", r"\S+/depth/a/5.npy: depths of 100 to 300 m, .*if they are metres, set --config.dataset.depth_max"),
        ("8 bits", r"\S+/depth/a/5.png: .*8 bits.*16.*millimetres"),
        ("long normals", r"\S+/normals/a/5.npy: .*beyond 1; "),
    ],
)
def test_a_fault_is_one_line_that_says_what_where_and_what_to_do(config, root, fault, line):
    spoilt(root, fault)
    with pytest.raises(UserError) as raised:
        list(pipeline.eval_batches(config, from_config(config), batch_size=1))
    assert re.match(line, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_said_with_the_field_that_names_it(config):
    config.dataset.data_dir = "/nowhere"
    with pytest.raises(UserError, match=r"/nowhere.*--config.dataset.data_dir="):
        folder.source(config.dataset, "train")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa/5  \r\n\r\n\t4\n", "\ufeff\n a/5\n4".encode(), b"a/5\r4"])
def test_an_id_list_may_have_a_mark_blank_lines_and_any_line_ends(config, root, content):
    (root / "val.txt").write_bytes(content)
    assert [example_id for example_id, _ in folder.source(config.dataset, "val").files] == ["a/5", "4"]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a/5\n".encode("utf-16"), r"\S+/val.txt is not UTF-8 text; save it as UTF-8"),
        (b"a\\5\n", r"\S+/val.txt: no image .*; separate sub-folders by / in the ids"),
        (
            "cafe\u0301\n".encode(),
            r"\S+/images: no file has the id 'cafe\\u0301', but one is named 'caf\\xe9', .*normal form",
        ),
    ],
)
def test_ids_in_another_writing_get_a_hint(config, root, content, line):
    (root / "images/a/5.png").rename(root / "images/caf\u00e9.png")
    (root / "val.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"^{line}"):
        folder.source(config.dataset, "val")


def test_a_label_that_is_named_in_another_normal_form_is_not_left_out(config, root):
    (root / "images/a/5.png").rename(root / "images/caf\u00e9.png")
    (root / "semseg/a/5.png").rename(root / "semseg/cafe\u0301.png")
    (root / "val.txt").write_text("4\ncaf\u00e9\n")
    with pytest.raises(UserError, match=r"/semseg: no file has the id 'caf\\xe9', but one is named 'cafe\\u0301'"):
        folder.source(config.dataset, "val")


def test_zero_is_void_is_refused_for_tasks_without_classes(config):
    config.dataset.zero_is_void = ("semseg", "depth")
    with pytest.raises(UserError, match=r"zero_is_void: 'depth' has no classes"):
        folder.source(config.dataset, "val")


def test_ids_that_occur_twice_or_in_both_splits_are_warned_of_once(config, root, capsys):
    pipeline.record_fingerprint(config)
    assert capsys.readouterr().err == ""
    config.dataset.fingerprint = ""
    (root / "train.txt").write_text("4\n1\na/2\n1\n4\n1\n")
    (root / "val.txt").write_text("a/5\na/2\n")
    pipeline.record_fingerprint(config)
    assert capsys.readouterr().err.splitlines() == [
        "warning: train lists 2 id(s) more than once, first '4': they count each time",
        "warning: train and val share 1 id(s), first 'a/2': scores will be too good",
    ]
    assert show.check(config) == []
    assert "warning: train and val share 1 id(s), first 'a/2'" in capsys.readouterr().out


def test_the_fingerprint_tells_folders_apart(root: pathlib.Path) -> None:
    config = folder_config.get_config("tiny").dataset
    config.data_dir, config.labels, config.semseg_classes = str(root), ALL, CLASSES
    before = folder.fingerprint(config)
    assert folder.fingerprint(config) == before
    (root / "semseg" / "3.b.png").unlink()
    without_label = folder.fingerprint(config)
    (root / "train.txt").write_text("1\na/2\n4\n")
    assert len({before, without_label, folder.fingerprint(config)}) == 3
