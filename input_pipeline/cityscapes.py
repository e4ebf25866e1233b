"""Cityscapes: 2975 training and 500 validation images of 1024x2048 with 19 classes and disparity.

Layout of the official zips `leftImg8bit_trainvaltest`, `gtFine_trainvaltest` and `disparity_trainvaltest`, extracted
into one folder; for each split, city and frame `leftImg8bit/SPLIT/CITY/FRAME_leftImg8bit.png` RGB,
`gtFine/SPLIT/CITY/FRAME_gtFine_labelIds.png` 0..33 label ids (255: the licence plates' -1) and
`disparity/SPLIT/CITY/FRAME_disparity.png` 16 bits, 0 invalid, else (p - 1) / 256 pixels.
"""

import functools
import pathlib

import cv2
from ml_collections import ConfigDict
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import archives, class_names, records
from input_pipeline.archives import AGAIN, Problems
from input_pipeline.records import Example, Part
from taskexpert_jax.tasks import kinds

FOLDER = "cityscapes"
GIVEN = "the folder with leftImg8bit, gtFine and disparity, extracted from the official zips"  # what --archive takes
ID_FILES = {"train": "leftImg8bit/train", "val": "leftImg8bit/val"}
PUBLISHED_COUNTS = {"train": 2975, "val": 500}
SIZE = (1024, 2048)
PARTS = {
    "image": Part("uint8", 3),
    "semseg": Part("uint8", 1),
    "disparity": Part("uint16", 1),  # encoded as in the file: half the bytes of float32
}
CLASSES = class_names.CITYSCAPES
VOID = 255
LAST_ID = 33
LARGEST_DISPARITY = 128  # pixels, the range of the stereo method
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label ids of CLASSES
_IMAGE = "_leftImg8bit.png"
_CLASS_OF = np.full(256, VOID, np.uint8)
_CLASS_OF[list(EVALUATED)] = np.arange(len(EVALUATED))


def ids_in(folder: pathlib.Path, name: str) -> list[str]:
    """Ids SPLIT/FRAME of the images in the folders of the cities, sorted."""
    found = archives.listed(folder, name, f"*/*{_IMAGE}")
    if wrong := [path for path in found if _city(path.name) != path.parent.name]:
        raise Problems(
            [f"{name}/{path.parent.name}/{path.name} is in the folder of another city; {AGAIN}" for path in wrong]
        )
    return [f"{folder.name}/{path.name.removesuffix(_IMAGE)}" for path in found]


def _city(frame: str) -> str:
    return frame.split("_", 1)[0]


def members(example_id: str) -> dict[str, tuple[str, ...]]:
    """Part of an example -> file in the archive."""
    split, frame = example_id.split("/")
    place = f"{split}/{_city(frame)}/{frame}"
    return {
        "image": (f"leftImg8bit/{place}{_IMAGE}",),
        "semseg": (f"gtFine/{place}_gtFine_labelIds.png",),
        "disparity": (f"disparity/{place}_disparity.png",),
    }


def read_example(root: pathlib.Path, example_id: str) -> dict[str, np.ndarray]:
    """Reads and checks all files of one example; returns its parts as they are stored.

    Returns:
      image (h,w,3) uint8 RGB; semseg (h,w,1) uint8, the 19 evaluated classes from 0, all others void, 255; disparity
      (h,w,1) uint16, encoded as in the file.

    Raises:
      Problems: a file is missing, damaged, of another size than 1024x2048, or has values out of range.
    """
    read = {
        "image": functools.partial(archives.read_picture, channels=3),
        "semseg": _read_classes,
        "disparity": _read_disparity,
    }
    files = {part: file for part, (file,) in members(example_id).items()}
    parts = archives.read_all({part: functools.partial(read[part], root, file) for part, file in files.items()})
    size = parts["image"].shape[:2]
    if size != SIZE:
        height, width = SIZE
        raise Problems(
            [
                f"{files['image']} is {size[0]}x{size[1]}: not the official {height}x{width}, in which disparities are "
                f"pixels; {AGAIN}, and reduce images by dataset.downscale"
            ]
        )
    archives.check_sizes(parts, files)
    return parts


def _read_classes(root: pathlib.Path, member: str) -> np.ndarray:
    stored = archives.read_picture(root, member, 1, ids=True)
    if np.any(wrong := (stored > LAST_ID) & (stored != VOID)):
        raise Problems([f"{member} has the label id {stored[wrong][0]}, beyond 0 to {LAST_ID} and {VOID}; {AGAIN}"])
    return cv2.LUT(stored, _CLASS_OF)[..., None]


def _read_disparity(root: pathlib.Path, member: str) -> np.ndarray:
    stored = archives.read_picture(root, member, 1, dtype="uint16")
    if (largest := float(kinds.decoded_disparity(stored).max())) > LARGEST_DISPARITY:
        raise Problems([f"{member} has a disparity of {largest:g} px, beyond {LARGEST_DISPARITY}; {AGAIN}"])
    return stored


class Builder(records.ArchiveBuilder):
    """Cityscapes: splits `train` and `val`, examples sorted by city and frame."""

    name = "cityscapes"
    VERSION = tfds.core.Version("1.0.0")
    PARTS = PARTS


def _decoded(parts: Example) -> Example:
    """Decodes stored parts: disparity to pixels, float32, 0 where invalid."""
    return {**parts, "disparity": kinds.decoded_disparity(parts["disparity"])}


def source(config: ConfigDict, split: str) -> records.RecordSource:
    """A split of the data set built under `config.data_dir` (config: the `dataset` part of the config)."""
    return records.RecordSource(Builder, config.data_dir, split, _decoded)
