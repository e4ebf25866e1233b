"""Writer of NYUD-v2's folder layout with small random images, for tests without the real data set."""

from collections.abc import Sequence
import pathlib
import tarfile

import numpy as np
from PIL import Image

TRAIN = ("0007", "0003", "0011", "0005", "0001")  # unsorted: the order of the id files is kept
VAL = ("0002", "0009", "0004")


def frame(example_id: str, height: int, width: int) -> dict[str, np.ndarray]:
    """Arrays of an example's files, a function of its id: all classes, invalid depth and both boundary values occur."""
    random = np.random.default_rng(int(example_id))
    return {
        "images": random.integers(0, 256, (height, width, 3), np.uint8),
        "segmentation": random.integers(0, 41, (height, width), np.uint8),
        "depth": (random.integers(0, 5, (height, width)) * random.uniform(0.7, 2, (height, width))).astype(np.float32),
        "normals": random.integers(0, 256, (height, width, 3), np.uint8),
        "edge": random.integers(0, 2, (height, width), np.uint8) * np.uint8(255),
    }


def write_part(root: pathlib.Path, folder: str, example_id: str, array: np.ndarray) -> pathlib.Path:
    """Writes one file of an example, `depth` as .npy, the others as .png; returns its path."""
    path = root / folder / f"{example_id}.{'npy' if folder == 'depth' else 'png'}"
    path.parent.mkdir(exist_ok=True)
    if folder == "depth":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def write(
    root: pathlib.Path, *, train: Sequence[str] = TRAIN, val: Sequence[str] = VAL, height: int = 30, width: int = 40
) -> pathlib.Path:
    """Writes the layout into the new folder `root` and returns it."""
    (root / "gt_sets").mkdir(parents=True)
    (root / "gt_sets" / "train.txt").write_text("\n".join(train) + "\n")
    (root / "gt_sets" / "val.txt").write_text("\n".join(val) + "\n")
    for example_id in (*train, *val):
        for folder, array in frame(example_id, height, width).items():
            write_part(root, folder, example_id, array)
    return root


def write_archive(layout: pathlib.Path, path: pathlib.Path, mode: str = "w:gz") -> pathlib.Path:
    """Packs a layout into a tar file like the published archive; returns the file's path."""
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        tar.add(layout, "NYUDv2")
    return path
