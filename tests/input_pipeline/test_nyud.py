"""NYUD-v2: decoded values compared with reference values and with their definition; faults of each file."""

from collections.abc import Callable
import io
import pathlib
import re
import shutil

import ml_collections
import numpy as np
import nyud_layout
from PIL import Image
import pytest

from configs import nyud as nyud_config
from input_pipeline import archives, nyud, pipeline, prepare
from taskexpert_jax import tasks
from taskexpert_jax.errors import UserError

TASKS = ("semseg", "depth", "normals", "edge")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def build(layout: pathlib.Path, data_dir: pathlib.Path) -> ml_collections.ConfigDict:
    """Builds the layout and returns a config that reads it."""
    prepare.prepare("nyud", layout, data_dir, allow_subset=True)
    config = nyud_config.get_config("vit_b16")
    config.dataset.data_dir = str(data_dir)
    return config


def decoded(config: ml_collections.ConfigDict, split: str) -> list[dict]:
    """The decoded examples of a split, in order."""
    source = nyud.source(config.dataset, split)
    return [source.load(index) for index in range(len(source))]


@pytest.fixture(scope="module")
def real(data_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    return build(data_dir / "NYUDv2_mini", tmp_path_factory.mktemp("real"))


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud_layout.write(tmp_path / "NYUDv2")


def test_real_labels_equal_the_reference(real: ml_collections.ConfigDict, golden_dir: pathlib.Path) -> None:
    golden = np.load(golden_dir / "nyud_decoded.npz")
    examples = {e["id"]: e for split in ("train", "val") for e in decoded(real, split)}
    assert len(examples) == 12
    for example_id in ("0237", "0405", "0002"):
        for task in tasks.from_config(real):
            expected = golden[f"{example_id}/raw/{task.name}"]
            found = examples[example_id][task.name]
            assert found.dtype == task.label_dtype
            np.testing.assert_array_equal(found, expected, err_msg=f"{example_id} {task.name}")


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
        assert [e["id"] for e in examples] == list(ids)  # in the order of the id file
        for example in examples:
            stored = nyud_layout.frame(example["id"], 30, 40)
            segmentation = stored["segmentation"].astype(int)
            normals = (2 * stored["normals"].astype(np.float32) / 255 - 1).astype(np.float16)
            np.testing.assert_array_equal(example["image"], stored["images"])
            np.testing.assert_array_equal(example["semseg"][..., 0], np.where(segmentation == 0, 255, segmentation - 1))
            np.testing.assert_array_equal(example["depth"][..., 0], stored["depth"])
            np.testing.assert_array_equal(example["normals"], normals)
            np.testing.assert_array_equal(example["edge"][..., 0], stored["edge"] // 255)


def test_other_kinds_of_pictures_decode_to_the_same_labels(layout: pathlib.Path) -> None:
    """Palette images of classes, 1-bit images of boundaries, depth of another dtype and shape."""
    palette = Image.open(layout / "segmentation" / "0002.png")
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    palette.save(layout / "segmentation" / "0002.png")
    Image.open(layout / "edge" / "0002.png").convert("1").save(layout / "edge" / "0002.png")
    Image.open(layout / "images" / "0002.png").convert("RGBA").save(layout / "images" / "0002.png")
    np.save(layout / "depth" / "0002.npy", np.load(layout / "depth" / "0002.npy")[..., None].astype(np.float64))
    parts, stored = nyud.read_example(layout, "0002"), nyud_layout.frame("0002", 30, 40)
    np.testing.assert_array_equal(parts["image"], stored["images"])
    np.testing.assert_array_equal(parts["semseg"][..., 0], stored["segmentation"] - 1)  # uint8: 0 wraps to 255
    np.testing.assert_array_equal(parts["edge"][..., 0], stored["edge"] // 255)
    np.testing.assert_array_equal(parts["depth"][..., 0], stored["depth"])


def _flip_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut(share: float) -> Callable[[pathlib.Path], None]:
    def cut(path: pathlib.Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return cut


def _set(value: float) -> Callable[[pathlib.Path], None]:
    """Sets one pixel of a label to `value`."""

    def change(path: pathlib.Path) -> None:
        if path.suffix == ".npy":
            array = np.load(path)
            array[3, 4] = value
            np.save(path, array)
        else:
            array = np.array(Image.open(path))
            array[3, 4] = value
            Image.fromarray(array).save(path)

    return change


def _replace_by_a_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def _save_compressed(path: pathlib.Path) -> None:
    content = io.BytesIO()
    np.savez(content, depth=np.load(path))
    path.write_bytes(content.getvalue())


IMAGE = "is corrupt.*decode"
NUMBERS = "is corrupt.*load"


@pytest.mark.parametrize(
    ("member", "damage", "fault"),
    [
        ("images/0002.png", _flip_a_bit, IMAGE),
        ("normals/0005.png", _cut(0.5), IMAGE),
        ("edge/0004.png", lambda path: path.write_bytes(path.read_bytes()[:-6]), IMAGE),  # inside of the last chunk
        ("segmentation/0011.png", lambda path: path.write_text("<html>not found</html>"), IMAGE),
        ("images/0011.png", lambda path: path.write_bytes(b""), IMAGE),
        ("edge/0003.png", lambda path: path.unlink(), "is missing"),
        ("edge/0003.png", _replace_by_a_folder, r"cannot be read \(Is a directory\).*permissions"),
        (
            "segmentation/0003.png",
            lambda path: shutil.copy(path.parent.parent / "images" / path.name, path),
            "has 3 channels instead of 1",
        ),
        (
            "segmentation/0003.png",
            lambda path: Image.fromarray(np.ones((30, 40), np.uint16)).save(path),
            r"has .*uint16 \(I;16\) instead of 8 bits",
        ),
        ("segmentation/0003.png", _set(41), r"has class 41, .*0 \(void\) and 1 to 40"),
        ("edge/0003.png", _set(1), "has the value 1, .*0 or 255"),
        ("depth/0009.npy", _cut(0.9), NUMBERS),
        ("depth/0001.npy", lambda path: path.write_bytes(b""), NUMBERS),
        ("depth/0001.npy", _save_compressed, NUMBERS),
        ("depth/0001.npy", lambda path: np.save(path, np.full((30, 40), "1.5")), NUMBERS),
        (
            "depth/0001.npy",
            lambda path: np.save(path, np.ones((30, 40, 3))),
            r"has the shape \(30, 40, 3\) instead of \(height, width\)",
        ),
        ("depth/0001.npy", _set(np.nan), "has NaN or Inf .*invalid depth is 0"),
        ("depth/0001.npy", _set(-1), "has the negative depth -1.*invalid depth is 0"),
        (
            "depth/0001.npy",
            lambda path: np.save(path, np.full((30, 40), 2345, np.uint16)),
            "has the depth 2345, .*millimetres; divide by 1000",
        ),
        (
            "depth/0001.npy",
            lambda path: np.save(path, np.full((30, 40), 640.5, np.float32)),
            "has the depth 640.5, beyond 80 m: probably millimetres",
        ),
        (
            "depth/0003.npy",
            lambda path: np.save(path, np.ones((30, 41), np.float32)),
            "is 30x41 but its image is 30x40",
        ),
    ],
)
def test_a_fault_of_a_file_is_named(layout: pathlib.Path, member: str, damage, fault: str) -> None:
    damage(layout / member)
    with pytest.raises(archives.Problems) as caught:
        nyud.read_example(layout, pathlib.Path(member).stem)
    (line,) = caught.value.lines
    assert re.match(rf"{member} {fault}", line), line


def test_the_480x640_copy_is_named(tmp_path: pathlib.Path) -> None:
    layout = nyud_layout.write(tmp_path / "NYUDv2", train=["0001"], val=["0002"], height=480, width=640)
    with pytest.raises(archives.Problems) as caught:
        nyud.read_example(layout, "0001")
    (line,) = caught.value.lines
    assert re.match(r"images/0001.png is 480x640: .*at most 448x576 \(rows 45:470 and columns 40:600 ", line), line


def test_all_faults_of_an_example_are_named(layout: pathlib.Path) -> None:
    _set(99)(layout / "segmentation" / "0002.png")
    _set(np.inf)(layout / "depth" / "0002.npy")
    (layout / "edge" / "0002.png").write_bytes(b"")
    with pytest.raises(archives.Problems) as caught:
        nyud.read_example(layout, "0002")
    assert [line.split()[0] for line in caught.value.lines] == [
        "segmentation/0002.png",
        "depth/0002.npy",
        "edge/0002.png",
    ]


@pytest.mark.parametrize("folder", ["images", "segmentation", "depth"])
def test_random_damage_is_a_fault_or_changes_nothing(layout: pathlib.Path, folder: str) -> None:
    """Arbitrary bytes lead to `Problems`, never to another error, and never to a changed image without a fault."""
    expected = nyud.read_example(layout, "0002")
    path = next((layout / folder).glob("0002.*"))
    content, random, faults = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(len(damaged) if folder != "depth" else 128)] = random.integers(256)
        path.write_bytes(damaged)
        try:
            parts = nyud.read_example(layout, "0002")
        except archives.Problems:
            faults += 1
        else:
            for part in parts if folder != "depth" else ():  # arrays have no checksums
                np.testing.assert_array_equal(parts[part], expected[part])
    assert faults > 200


def test_an_unknown_split_lists_the_known_ones(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = build(layout, tmp_path / "built")
    with pytest.raises(UserError, match=r"'test'.*train, val"):
        nyud.source(config.dataset, "test")


def test_without_built_data_the_command_is_told(tmp_path: pathlib.Path) -> None:
    config = nyud_config.get_config().dataset
    config.data_dir = str(tmp_path)
    command = re.escape(f"`python -m input_pipeline.prepare nyud --archive=PATH --data_dir={tmp_path}`")
    with pytest.raises(UserError, match=command):
        nyud.source(config, "train")
