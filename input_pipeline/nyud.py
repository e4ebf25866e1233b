"""NYUD-v2, multi-task copy (`NYUDv2.tar.gz`, folder `NYUDv2/`): 795 training and 654 validation images of 425x560.

Layout: `gt_sets/{train,val}.txt` one id per line; for each id `images/ID.png` RGB, `segmentation/ID.png` 0 void, 1..40
classes, `depth/ID.npy` float metres with 0 invalid, `normals/ID.png` n = 2*v/255 - 1, `edge/ID.png` 0 or 255.
"""

import functools
import pathlib

import cv2
from ml_collections import ConfigDict
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import archives, arrays, class_names, records
from input_pipeline.archives import AGAIN, Problems
from input_pipeline.records import Example, Part

FOLDER = "NYUDv2"
GIVEN = "NYUDv2.tar.gz or the folder extracted from it"  # what --archive takes
ID_FILES = {"train": "gt_sets/train.txt", "val": "gt_sets/val.txt"}
PUBLISHED_COUNTS = {"train": 795, "val": 654}
MAX_SIZE = (448, 576)  # largest height and width in the multi-task copy
PARTS = {
    "image": Part("uint8", 3),
    "semseg": Part("uint8", 1),
    "depth": Part("float32", 1),
    "normals": Part("uint8", 3),  # encoded as in the file: half the bytes of decoded float16
    "edge": Part("uint8", 1),
}
CLASSES = class_names.NYUD
VOID = 255
# Byte -> component of a normal, as the bits of a float16, because cv2.LUT takes no float16.
_COMPONENTS = (np.arange(256, dtype=np.float32) * 2 / 255 - 1).astype(np.float16).view(np.uint16)


def members(example_id: str) -> dict[str, tuple[str, ...]]:
    """Part of an example -> file in the archive."""
    folders = {"image": "images", "semseg": "segmentation", "depth": "depth", "normals": "normals", "edge": "edge"}
    return {part: (f"{folder}/{example_id}.{'npy' if part == 'depth' else 'png'}",) for part, folder in folders.items()}


def read_example(root: pathlib.Path, example_id: str) -> dict[str, np.ndarray]:
    """Reads and checks all files of one example; returns its parts as they are stored.

    Returns:
      image (h,w,3) uint8 RGB; semseg (h,w,1) uint8, classes from 0, void 255; depth (h,w,1) float32 metres, 0 invalid;
      normals (h,w,3) uint8, encoded as in the file; edge (h,w,1) uint8, 0 or 1.

    Raises:
      Problems: a file is missing, damaged, of another size than the image, or has values out of range.
    """
    read = {
        "image": functools.partial(archives.read_picture, channels=3),
        "semseg": _read_classes,
        "depth": arrays.read_depth,
        "normals": functools.partial(archives.read_picture, channels=3),
        "edge": _read_boundaries,
    }
    files = {part: file for part, (file,) in members(example_id).items()}
    parts = archives.read_all({part: functools.partial(read[part], root, file) for part, file in files.items()})
    _check_sizes(parts, files)
    return parts


def _read_classes(root: pathlib.Path, member: str) -> np.ndarray:
    stored = archives.read_picture(root, member, 1, ids=True)
    if stored.max() > len(CLASSES):
        raise Problems([f"{member} has class {stored.max()}, beyond 0 (void) and 1 to {len(CLASSES)}; {AGAIN}"])
    return np.where(stored == 0, np.uint8(VOID), stored - np.uint8(1))


def _read_boundaries(root: pathlib.Path, member: str) -> np.ndarray:
    stored = archives.read_picture(root, member, 1)
    if np.any(wrong := (stored != 0) & (stored != 255)):
        raise Problems([f"{member} has the value {stored[wrong][0]}, but boundaries are 0 or 255; {AGAIN}"])
    return stored // np.uint8(255)


def _check_sizes(parts: dict[str, np.ndarray], files: dict[str, str]) -> None:
    """Raises Problems if the parts of an example differ in size, or exceed the size of the multi-task copy."""
    height, width = parts["image"].shape[:2]
    if height > MAX_SIZE[0] or width > MAX_SIZE[1]:
        raise Problems(
            [
                f"{files['image']} is {height}x{width}: another copy of NYUD-v2; get the multi-task copy with images "
                f"of at most {MAX_SIZE[0]}x{MAX_SIZE[1]} (rows 45:470 and columns 40:600 of the 480x640 originals)"
            ]
        )
    archives.check_sizes(parts, files)


class Builder(records.ArchiveBuilder):
    """NYUD-v2: splits `train` and `val`, examples in the order of the id files."""

    name = "nyud"
    VERSION = tfds.core.Version("2.0.0")
    PARTS = PARTS


def _decoded(parts: Example) -> Example:
    """Decodes stored parts: normals to float16 in [-1, 1]."""
    return {**parts, "normals": cv2.LUT(parts["normals"], _COMPONENTS).view(np.float16)}


def source(config: ConfigDict, split: str) -> records.RecordSource:
    """A split of the data set built under `config.data_dir` (config: the `dataset` part of the config)."""
    return records.RecordSource(Builder, config.data_dir, split, _decoded)
