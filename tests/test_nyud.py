"""NYUD-v2: decoded values against reference values and against the layout's definition; faults are named."""

import pathlib
import shutil

import ml_collections
import numpy as np
import nyud_layout
from PIL import Image
import pytest
import tensorflow as tf

from configs import nyud as nyud_config
from input_pipeline import nyud, pipeline, prepare
from taskexpert_jax import tasks
from taskexpert_jax.errors import UserError

TASKS = ("semseg", "depth", "normals", "edge")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def build(layout: pathlib.Path, data_dir: pathlib.Path) -> ml_collections.ConfigDict:
    """Builds the layout and returns a config that reads it."""
    prepare.prepare("nyud", layout, data_dir)
    config = nyud_config.get_config("vit_b16")
    config.dataset.data_dir = str(data_dir)
    return config


def decoded(config: ml_collections.ConfigDict, split: str) -> list[dict]:
    """The decoded examples of a split, in order."""
    source = nyud.source(config.dataset, split)
    return list(tf.data.Dataset.range(len(source)).map(source.load).as_numpy_iterator())


@pytest.fixture(scope="module")
def real(data_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    return build(data_dir / "NYUDv2_mini", tmp_path_factory.mktemp("real"))


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write(tmp_path / "NYUDv2")


def test_real_labels_equal_the_reference(real: ml_collections.ConfigDict, golden_dir: pathlib.Path) -> None:
    golden = np.load(golden_dir / "nyud_decoded.npz")
    examples = {e["id"].decode(): e for split in ("train", "val") for e in decoded(real, split)}
    assert len(examples) == 12
    for example_id in ("0237", "0405", "0002"):
        for task in TASKS:
            expected = golden[f"{example_id}/raw/{task}"]
            assert examples[example_id][task].dtype == expected.dtype
            np.testing.assert_array_equal(examples[example_id][task], expected, err_msg=f"{example_id} {task}")


def test_real_evaluation_batch_equals_the_reference(real: ml_collections.ConfigDict, golden_dir: pathlib.Path) -> None:
    golden = np.load(golden_dir / "nyud_decoded.npz")
    batches = pipeline.eval_batches(real, tasks.from_config(real), batch_size=8, split="train")
    batch = next(batches)
    row = list(batch["id"]).index("0237")
    for task in tasks.from_config(real):
        expected = golden[f"0237/eval/{task.name}"].astype(task.label_dtype)
        np.testing.assert_array_equal(batch[task.name][row], expected, err_msg=task.name)
    top, left, height, width = batch["window"][row]
    image = np.zeros((448, 576, 3))
    inside = np.s_[top : top + height, left : left + width]
    image[inside] = (batch["image"][row][inside] / 255 - MEAN) / STD
    np.testing.assert_allclose(image, golden["0237/eval/image"].astype(np.float64), rtol=1e-3, atol=1e-6)
    assert next(batches, None) is None


def test_decoded_values_follow_the_definition(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = build(layout, tmp_path / "built")
    for split, ids in (("train", nyud_layout.TRAIN), ("val", nyud_layout.VAL)):
        examples = decoded(config, split)
        assert [e["id"].decode() for e in examples] == list(ids)  # in the order of the id file
        for example in examples:
            stored = nyud_layout.frame(example["id"].decode(), 30, 40)
            segmentation = stored["segmentation"].astype(int)
            normals = (2 * stored["normals"].astype(np.float32) / 255 - 1).astype(np.float16)
            np.testing.assert_array_equal(example["image"], stored["images"])
            np.testing.assert_array_equal(example["semseg"][..., 0], np.where(segmentation == 0, 255, segmentation - 1))
            np.testing.assert_array_equal(example["depth"][..., 0], stored["depth"])
            np.testing.assert_array_equal(example["normals"], normals)
            np.testing.assert_array_equal(example["edge"][..., 0], stored["edge"] // 255)


def test_other_kinds_of_pictures_decode_to_the_same_labels(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A palette holds class indices, one bit a pixel holds boundaries; frames of one set may differ in size."""
    labels = Image.open(layout / "segmentation" / "0002.png")
    palette = labels.copy()
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    palette.save(layout / "segmentation" / "0002.png")
    Image.open(layout / "edge" / "0002.png").convert("1").save(layout / "edge" / "0002.png")
    Image.open(layout / "images" / "0002.png").convert("RGBA").save(layout / "images" / "0002.png")
    np.save(layout / "depth" / "0002.npy", np.load(layout / "depth" / "0002.npy")[..., None].astype(np.float64))
    example = decoded(build(layout, tmp_path / "built"), "val")[0]
    stored = nyud_layout.frame("0002", 30, 40)
    np.testing.assert_array_equal(example["image"], stored["images"])
    np.testing.assert_array_equal(example["semseg"][..., 0], stored["segmentation"] - 1)  # uint8: 0 wraps to 255
    np.testing.assert_array_equal(example["edge"][..., 0], stored["edge"] // 255)
    np.testing.assert_array_equal(example["depth"][..., 0], stored["depth"])


def test_verify_counts_the_examples_of_a_part_of_the_set(layout: pathlib.Path) -> None:
    assert nyud.verify(layout) == {"train": 5, "val": 3}


@pytest.mark.parametrize("member", ["images/0003.png", "depth/0009.npy", "edge/0001.png"])
def test_a_missing_member_is_named(layout: pathlib.Path, member: str) -> None:
    (layout / member).unlink()
    with pytest.raises(UserError, match=rf"^{member} is missing, though gt_sets/(train|val).txt names 000\d; get"):
        nyud.verify(layout)


def test_missing_members_are_counted(layout: pathlib.Path) -> None:
    shutil.rmtree(layout / "normals")
    with pytest.raises(UserError, match=r"^normals/0007.png is missing.* \(and 7 more are missing\)"):
        nyud.verify(layout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "^gt_sets/val.txt is missing; the archive is NYUDv2.tar.gz or"),
        ("\n", "^gt_sets/val.txt names no id"),
        ("0002\n0004\n0002\n", "^gt_sets/val.txt names 0002 more than once"),
    ],
)
def test_a_faulty_id_file_is_named(layout: pathlib.Path, content: str | None, message: str) -> None:
    path = layout / "gt_sets" / "val.txt"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        nyud.verify(layout)


def _flip_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(path: pathlib.Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    ("member", "damage"),
    [
        ("images/0002.png", _flip_a_bit),
        ("normals/0005.png", lambda path: _cut(path, 0.5)),
        ("edge/0004.png", lambda path: path.write_bytes(path.read_bytes()[:-6])),  # ends inside of the last chunk
        ("segmentation/0011.png", lambda path: path.write_text("<html>not found</html>")),
        ("depth/0009.npy", lambda path: _cut(path, 0.9)),
        ("depth/0001.npy", lambda path: path.write_bytes(b"")),
    ],
)
def test_a_corrupt_member_is_named_and_nothing_stays(layout: pathlib.Path, member: str, damage) -> None:
    damage(layout / member)
    data_dir = layout.parent / "built"
    with pytest.raises(UserError, match=rf"NYUDv2: {member} is corrupt"):
        prepare.prepare("nyud", layout, data_dir)
    assert list(data_dir.iterdir()) == []


def test_the_480x640_copy_is_refused(tmp_path: pathlib.Path) -> None:
    layout = nyud_layout.write(tmp_path / "NYUDv2", train=["0001"], val=["0002"], height=480, width=640)
    with pytest.raises(UserError, match=r"images/0001.png is 480x640: another copy of NYUD-v2; .*rows 45:470"):
        prepare.prepare("nyud", layout, tmp_path / "built")


def test_parts_of_different_sizes_are_named(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    np.save(layout / "depth" / "0003.npy", np.ones((30, 41), np.float32))
    with pytest.raises(UserError, match=r"depth/0003.npy is 30x41 but its image is 30x40"):
        prepare.prepare("nyud", layout, tmp_path / "built")


def test_labels_with_colour_are_named(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copy(layout / "images" / "0003.png", layout / "segmentation" / "0003.png")
    with pytest.raises(UserError, match=r"segmentation/0003.png has 3 channels instead of 1"):
        prepare.prepare("nyud", layout, tmp_path / "built")


def test_an_unknown_split_lists_the_known_ones(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = build(layout, tmp_path / "built")
    with pytest.raises(UserError, match=r"has no split 'test'; it has train, val"):
        nyud.source(config.dataset, "test")


def test_without_built_data_the_command_is_told(tmp_path: pathlib.Path) -> None:
    config = nyud_config.get_config().dataset
    config.data_dir = str(tmp_path)
    with pytest.raises(UserError, match=rf"python -m input_pipeline.prepare nyud --archive=PATH --data_dir={tmp_path}"):
        nyud.source(config, "train")
