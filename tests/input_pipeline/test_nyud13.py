"""NYUv2 with 13 classes: decoded values compared with their definition, faults of the layout and of each file."""

from collections.abc import Callable
import pathlib
import re

import numpy as np
import nyud13_layout
import pytest

from configs import nyud13 as nyud13_config
from input_pipeline import archives, nyud13, pipeline, prepare, show
from taskexpert_jax import tasks


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nyud13, "SIZE", nyud13_layout.SIZE)


@pytest.fixture
def layout(tmp_path: pathlib.Path) -> pathlib.Path:
    return nyud13_layout.write(tmp_path / "nyuv2")


def test_decoded_values_follow_the_definition(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prepare.prepare("nyud13", layout, tmp_path / "built", allow_subset=True)
    config = nyud13_config.get_config("tiny")
    config.dataset.data_dir = str(tmp_path / "built")
    for split, count in nyud13_layout.COUNTS.items():
        source = nyud13.source(config.dataset, split)
        assert len(source) == count
        for number in range(count):
            example, stored = source.load(number), nyud13_layout.frame(split, number)
            assert example["id"] == f"{split}/{number}"
            np.testing.assert_allclose(example["image"] / 255, stored["image"], atol=0.5 / 255 + 1e-6)
            label = stored["label"]
            np.testing.assert_array_equal(example["semseg"][..., 0], np.where(label < 0, 255, label))
            np.testing.assert_array_equal(example["depth"], stored["depth"].astype(np.float32))
            np.testing.assert_allclose(example["normals"], stored["normal"], atol=5e-4)
            assert [example[task.name].dtype for task in tasks.from_config(config)] == ["uint8", "float32", "float16"]
    config.dataset.downscale, config.dataset.image_size = 0.5, (16, 16)
    batch = next(pipeline.train_batches(config, tasks.from_config(config)))
    assert batch["normals"].shape == (2, 16, 16, 3)
    assert show.draw(config, "train", 1, stored=True).width > 100


def _set(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Sets one pixel to `value`."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[3, 4] = value
        return array

    return change


@pytest.mark.parametrize(
    ("folder", "change", "fault"),
    [
        ("image", _set(255), r"has values from .* to 255, but colours are in \[0, 1\]"),
        ("image", _set(np.nan), "has NaN or Inf values"),
        ("image", lambda array: array[..., 0], r"has the shape \(24, 32\) instead of \(height, width, 3\)"),
        ("image", lambda array: array[:20], "is 20x32, but images of this copy are 24x32"),
        ("label", _set(13), r"has class 13, beyond -1 \(void\) and 0 to 12"),
        ("label", _set(0.5), r"has class 0.5, beyond"),
        ("label", lambda array: array[:, :20], "is 24x20 but its image is 24x32"),
        ("label", lambda array: array[..., None], r"has the shape \(24, 32, 1\) instead of \(height, width\)"),
        ("depth", _set(-1), "has the negative depth -1"),
        ("depth", _set(2345), "has the depth 2345, .*millimetres"),
        ("normal", _set(127), "has the component 127, but normals have length 1"),
        ("normal", lambda array: array.astype("U4"), "is corrupt, it does not load as an array of numbers"),
    ],
)
def test_a_fault_of_a_file_is_named(layout: pathlib.Path, folder: str, change, fault: str) -> None:
    path = layout / "train" / folder / "3.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(archives.Problems) as caught:
        nyud13.read_example(layout, "train/3")
    (line,) = caught.value.lines
    assert re.match(rf"train/{folder}/3.npy {fault}", line), line


def test_files_that_are_missing_or_misnamed_are_named(layout: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def faults(allow_subset: bool = True) -> list[str]:
        with pytest.raises(archives.Problems) as caught:
            prepare.prepare("nyud13", layout, tmp_path / "built", allow_subset=allow_subset)
        return list(caught.value.lines)

    train, val = faults(allow_subset=False)
    assert re.match(r"train/image names 11 ids, but 795 are published; .*--allow-subset", train)
    assert re.match(r"val/image names 2 ids, but 654 are published; .*--allow-subset", val)
    (layout / "val" / "depth" / "1.npy").unlink()
    (line,) = faults()
    assert re.match(r"val/depth/1.npy is missing, though val/image names val/1; get the archive again", line)
    (layout / "train" / "image" / "4.npy").rename(layout / "train" / "image" / "04.npy")
    (line,) = faults()
    assert line == "train/image/04.npy has no number as its name; get the archive again"
    for path in (layout / "val" / "image").iterdir():
        path.unlink()
    assert faults()[1] == "val/image has no file *.npy; get the archive again"
