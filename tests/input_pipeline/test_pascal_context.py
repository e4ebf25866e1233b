"""PASCAL-Context: decoded values and batches compared with reference values and definitions; its config."""

import json
import pathlib
import re
import shutil

import cv2
import ml_collections
import numpy as np
import pascal_layout
from PIL import Image
import pytest
from skimage import morphology

from configs import pascal_context as pascal_config
from input_pipeline import archives, class_names, pascal_archive, pascal_context, pipeline, prepare
from input_pipeline.records import Example
from taskexpert_jax import tasks

TASKS = ("semseg", "human_parts", "sal", "normals", "edge")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def build(layout: pathlib.Path, data_dir: pathlib.Path) -> ml_collections.ConfigDict:
    """Builds the layout and returns a config that reads it."""
    prepare.prepare("pascal_context", layout, data_dir, allow_subset=True)
    config = pascal_config.get_config("vit_b16")
    config.dataset.data_dir = str(data_dir)
    return config


def decoded(config: ml_collections.ConfigDict, split: str) -> list[Example]:
    """The decoded examples of a split, in order."""
    source = pascal_context.source(config.dataset, split)
    return [source.load(index) for index in range(len(source))]


@pytest.fixture(scope="module")
def real(data_dir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    return build(data_dir / "PASCALContext_mini", tmp_path_factory.mktemp("real"))


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return pascal_layout.write(tmp_path / "PASCALContext")


def test_real_labels_equal_the_reference(real: ml_collections.ConfigDict, golden_dir: pathlib.Path) -> None:
    golden = np.load(golden_dir / "pascal_context_decoded.npz")
    examples = {example["id"]: example for split in ("train", "val") for example in decoded(real, split)}
    assert set(examples) == {name.split("/")[0] for name in golden}
    for example_id, example in examples.items():
        for task in TASKS:
            expected = golden[f"{example_id}/raw/{task}"]
            assert example[task].dtype == expected.dtype
            np.testing.assert_array_equal(example[task], expected, err_msg=f"{example_id} {task}")


def test_real_evaluation_batch_equals_the_reference(real: ml_collections.ConfigDict, golden_dir: pathlib.Path) -> None:
    golden = np.load(golden_dir / "pascal_context_decoded.npz")
    records = tasks.from_config(real)
    batches = pipeline.eval_batches(real, records, batch_size=6, split="train")
    batch = next(batches)
    assert next(batches, None) is None
    compared = 0
    for row, example_id in enumerate(batch["id"]):
        if f"{example_id}/eval/image" not in golden:
            continue
        for task in records:
            expected = golden[f"{example_id}/eval/{task.name}"].astype(task.label_dtype)
            np.testing.assert_array_equal(batch[task.name][row], expected, err_msg=f"{example_id} {task.name}")
        top, left, height, width = batch["window"][row]
        assert set(np.unique(batch["edge_benchmark"][row])) == {0, 1, 255}  # for odsF
        image = np.zeros((512, 512, 3))
        inside = np.s_[top : top + height, left : left + width]
        image[inside] = (batch["image"][row][inside] / 255 - MEAN) / STD
        np.testing.assert_allclose(image, golden[f"{example_id}/eval/image"].astype(float), rtol=1e-3, atol=1e-6)
        compared += 1
    assert compared == 2


def test_an_image_without_persons_counts_nowhere_for_their_parts(
    real: ml_collections.ConfigDict, golden_dir: pathlib.Path
) -> None:
    golden = np.load(golden_dir / "pascal_context_decoded.npz")
    records = tasks.from_config(real)
    seen = {True: 0, False: 0}
    for split in ("train", "val"):
        for batch in pipeline.eval_batches(real, records, batch_size=3, split=split):
            for example_id, label in zip(batch["id"], batch["human_parts"], strict=True):
                persons = bool(golden[f"{example_id}/raw/human_parts"].any())
                assert (label == 255).all() == (not persons)
                seen[persons] += 1
    assert seen == {True: 5, False: 4}


def test_classes_with_normals_equal_the_reference(golden_dir: pathlib.Path) -> None:
    expected = json.loads((golden_dir / "pascal_normals_valid_classes.json").read_text())["ids"]
    assert list(pascal_archive.NORMALS_CLASSES) == expected


def test_decoded_values_follow_the_definition(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = build(layout, tmp_path / "built")
    valid = np.isin(np.arange(460), pascal_archive.NORMALS_CLASSES)
    assert valid.sum() == 170
    for split, ids in (("train", pascal_layout.TRAIN), ("val", pascal_layout.VAL)):
        examples = decoded(config, split)
        assert [example["id"] for example in examples] == list(ids)  # in the order of the id file
        for example in examples:
            held = pascal_layout.example(example["id"])
            context = held["context"]
            jpeg = Image.open(layout / "JPEGImages" / f"{example['id']}.jpg")
            changes = np.abs(cv2.Laplacian(context, cv2.CV_64F)) > 0
            vectors = (2 * held["normals"].astype(np.float64) / 255 - 1) * valid[context][..., None]
            np.testing.assert_array_equal(example["image"], np.asarray(jpeg))
            np.testing.assert_array_equal(example["semseg"][..., 0], held["semseg"])
            np.testing.assert_array_equal(example["sal"][..., 0], held["sal"] / 255 > 0.5)
            np.testing.assert_array_equal(example["edge"][..., 0], morphology.thin(changes))
            np.testing.assert_allclose(example["normals"].astype(np.float64), vectors, rtol=0, atol=2**-11)
            np.testing.assert_array_equal((example["normals"] != 0).any(axis=-1), valid[context])
            np.testing.assert_array_equal(
                example["human_parts"][..., 0], pascal_layout.human_parts(held["objects"], 30, 40)
            )


def test_the_orientation_that_a_camera_noted_turns_nothing(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Labels refer to the stored pixels, so EXIF is ignored; grey JPEG files get three equal channels."""
    exif = Image.Exif()
    exif[274] = 6  # rotate by 90 degrees for display
    path = layout / "JPEGImages" / "2008_000007.jpg"
    image = np.asarray(Image.open(path))
    pascal_layout.save_image(path, image[..., 0], exif=exif)
    stored = np.asarray(Image.open(path))
    assert stored.shape == (30, 40)
    example = decoded(build(layout, tmp_path / "built"), "train")[0]
    np.testing.assert_array_equal(example["image"], np.repeat(stored[..., None], 3, axis=2))


def test_prepare_names_what_the_archive_lacks(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.rmtree(layout / "semseg" / "pascal-context")
    part = f"human_parts/{pascal_layout.TRAIN[1]}.mat"
    (layout / part).unlink()
    with pytest.raises(archives.Problems) as caught:
        prepare.prepare("pascal_context", layout, tmp_path / "built", allow_subset=True)
    lists = "ImageSets/Context"
    patterns = [
        rf"{part} is missing.* {lists}/train.txt .*{pascal_layout.TRAIN[1]}",
        *(
            rf"semseg/VOC12/{example_id}.png or semseg/pascal-context/{example_id}.png is missing.* "
            rf"{lists}/val.txt .*{example_id}"
            for example_id in pascal_layout.VAL
        ),
    ]
    for line, pattern in zip(caught.value.lines, patterns, strict=True):
        assert re.match(pattern, line), line
    assert not any((tmp_path / "built").iterdir())


def test_the_config_follows_the_protocol() -> None:
    config = pascal_config.get_config()
    records = tasks.from_config(config)
    weights = {task.name: task.loss_weight for task in records}
    assert weights == {"semseg": 1, "human_parts": 2, "sal": 5, "normals": 10, "edge": 50} and tuple(weights) == TASKS
    assert config.optimizer.learning_rate == 2e-5
    assert tuple(config.dataset.image_size) == (512, 512)
    assert config.variant == "vit_l16"
    assert (
        len(class_names.VOC) == 21
        and class_names.VOC[0] == "background"
        and class_names.VOC[pascal_layout.PERSON] == "person"
    )
    assert set(records[0].class_names) == set(class_names.VOC)


def test_the_tiny_config_reads_images_of_every_allowed_size(tmp_path: pathlib.Path) -> None:
    layout = pascal_layout.write(
        tmp_path / "PASCALContext", train=["2008_000003"], val=["2008_000002"], height=500, width=500
    )
    build(layout, tmp_path / "built")
    config = pascal_config.get_config("tiny")
    config.dataset.data_dir = str(tmp_path / "built")
    records = tasks.from_config(config)
    train = next(pipeline.train_batches(config, records))
    evaluated = next(pipeline.eval_batches(config, records, batch_size=config.eval.batch_size))
    assert train["normals"].shape == evaluated["normals"].shape == (2, 64, 64, 3)
    assert evaluated["window"][0].tolist() == [1, 1, 62, 62]
