"""Cityscapes: decoded values compared with their definition, faults of the layout and of each file."""

import pathlib
import re
import shutil

import cityscapes_layout
import numpy as np
from PIL import Image
import pytest

from configs import cityscapes as cityscapes_config
from input_pipeline import archives, cityscapes, pipeline, prepare, show
from taskexpert_jax import tasks

NAME = cityscapes_layout.TRAIN[0]
EVALUATED = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
EVALUATED |= {28: 15, 31: 16, 32: 17, 33: 18}  # label id -> class, as the data set's own scripts have it


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cityscapes, "SIZE", cityscapes_layout.SIZE)


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return cityscapes_layout.write(tmp_path / "cityscapes")


def built(layout: pathlib.Path, data_dir: pathlib.Path):
    """Config of the tiny variant that reads the layout, at a quarter of its size."""
    prepare.prepare("cityscapes", layout, data_dir, allow_subset=True)
    config = cityscapes_config.get_config("tiny")
    config.dataset.data_dir = str(data_dir)
    config.dataset.downscale, config.dataset.image_size = 0.5, (16, 32)
    return config


def test_decoded_values_follow_the_definition(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = built(layout, tmp_path / "built")
    for split, names in (("train", cityscapes_layout.TRAIN), ("val", cityscapes_layout.VAL)):
        source = cityscapes.source(config.dataset, split)
        examples = [source.load(index) for index in range(len(source))]
        assert [example["id"] for example in examples] == [f"{split}/{name}" for name in names]
        for name, example in zip(names, examples, strict=True):
            stored = cityscapes_layout.frame(name)
            classes = np.vectorize(lambda label_id: EVALUATED.get(label_id, 255))(stored["gtFine_labelIds"])
            p = stored["disparity"].astype(float)
            pixels = np.where(p > 0, (p - 1) / 256, 0)
            np.testing.assert_array_equal(example["image"], stored["leftImg8bit"])
            np.testing.assert_array_equal(example["semseg"][..., 0], classes)
            np.testing.assert_array_equal(example["disparity"][..., 0], pixels)
            assert example["disparity"].dtype == np.float32


def test_training_examples_are_drawn_and_disparity_follows_the_scale(
    layout: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Reduced images keep the disparities of the whole ones; an image enlarged by 2 doubles them; a flip keeps them."""
    config = built(layout, tmp_path / "built")
    config.augment.flip_probability = 1.0
    found = []
    for scale in (1.0, 2.0):
        config.augment.scale_min = config.augment.scale_max = scale
        found.append(next(pipeline.train_batches(config, tasks.from_config(config)))["disparity"])
        found[-1] = found[-1][found[-1] > 0]
    stored = {
        (float(p) - 1) / 256
        for name in cityscapes_layout.TRAIN
        for p in np.unique(cityscapes_layout.frame(name)["disparity"])
    }
    assert len(found[0]) and set(found[0].tolist()) <= stored
    assert len(found[1]) and {value / 2 for value in found[1].tolist()} <= stored
    assert show.draw(config, "train", 1, stored=True).width > 100


def test_a_summary_of_disparity_is_in_pixels(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lines = prepare.prepare("cityscapes", layout, tmp_path / "built", allow_subset=True)
    (greatest,) = [line.split() for line in lines if line.strip().startswith("greatest (px)")]
    frames = [cityscapes_layout.frame(name) for name in cityscapes_layout.TRAIN]
    largest = max(frame["disparity"].max() for frame in frames)
    assert float(greatest[2]) == pytest.approx((float(largest) - 1) / 256, abs=0.005)


def _faults(layout: pathlib.Path, *, allow_subset: bool = True) -> list[str]:
    with pytest.raises(archives.Problems) as caught:
        prepare.prepare("cityscapes", layout, layout.parent / "built", allow_subset=allow_subset)
    assert not list((layout.parent / "built").glob("*"))
    return list(caught.value.lines)


def test_counts_are_the_published_ones(layout: pathlib.Path) -> None:
    train, val = _faults(layout, allow_subset=False)
    assert re.match(r"leftImg8bit/train names 3 ids, but 2975 are published; .*--allow-subset", train)
    assert re.match(r"leftImg8bit/val names 2 ids, but 500 are published; .*--allow-subset", val)


def test_a_zip_that_was_not_extracted_is_named(layout: pathlib.Path) -> None:
    shutil.rmtree(layout / "leftImg8bit" / "val")
    assert _faults(layout) == ["the folder leftImg8bit/val is missing; give the folder that contains it"]
    shutil.rmtree(layout / "disparity")
    cityscapes_layout.write(layout)
    shutil.rmtree(layout / "disparity")
    lines = _faults(layout)
    assert len(lines) == 5
    assert re.match(
        rf"disparity/train/aachen/{NAME}_disparity.png is missing, though leftImg8bit/train names", lines[0]
    )


def test_an_image_in_the_folder_of_another_city_is_named(layout: pathlib.Path) -> None:
    path = cityscapes_layout.path_of(layout, "train", NAME, "leftImg8bit")
    path.rename(layout / "leftImg8bit" / "train" / "ulm" / path.name)
    (line,) = _faults(layout)
    assert re.match(rf"leftImg8bit/train/ulm/{NAME}_leftImg8bit.png is in the folder of another city", line)


@pytest.mark.parametrize(
    ("part", "array", "fault"),
    [
        ("leftImg8bit", np.zeros((16, 32, 3), np.uint8), "is 16x32: not the official 32x64, .*dataset.downscale"),
        ("gtFine_labelIds", np.zeros((32, 60), np.uint8), "is 32x60 but its image is 32x64"),
        ("gtFine_labelIds", np.full((32, 64), 34, np.uint8), "has the label id 34, beyond 0 to 33 and 255"),
        ("gtFine_labelIds", np.zeros((32, 64, 3), np.uint8), "has 3 channels instead of 1"),
        ("disparity", np.zeros((32, 64), np.uint8), r"has pixels of uint8 \(L\) instead of 16 bits"),
        ("disparity", np.full((32, 64), 60000, np.uint16), r"has a disparity of 234.371 px, beyond 128"),
    ],
)
def test_a_fault_of_a_file_is_named(layout: pathlib.Path, part: str, array: np.ndarray, fault: str) -> None:
    path = cityscapes_layout.path_of(layout, "train", NAME, part)
    Image.fromarray(array).save(path)
    (line,) = _faults(layout)
    assert re.match(rf"{path.relative_to(layout)} {fault}", line), line


def test_a_folder_is_what_the_command_takes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    assert prepare.main(["cityscapes", f"--archive={absent}", f"--data_dir={tmp_path}"]) == 2
    assert "give the folder with leftImg8bit, gtFine and disparity" in capsys.readouterr().err
