"""NYUv2 with 13 classes, the preprocessed copy of MTAN and LibMTL: 795 training and 654 validation images of 288x384.

Layout, for N = 0, 1, ... in each of the folders `train` and `val`: `image/N.npy` RGB in [0, 1]; `label/N.npy` -1 void,
0..12 classes; `depth/N.npy` metres with 0 invalid; `normal/N.npy` unit vectors, x first, with 0 where invalid. The copy
has the axes of its source (Eigen and Fergus, ICCV 2015); that a flip negates x is all that MTAN's code says of them.
"""

import functools
import pathlib

from ml_collections import ConfigDict
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import archives, arrays, class_names, records
from input_pipeline.archives import AGAIN, Problems
from input_pipeline.records import Part
from taskexpert_jax.tasks import kinds

FOLDER = "nyuv2"
GIVEN = "the folder with train and val, or a tar file of it"  # what --archive takes
ID_FILES = {"train": "train/image", "val": "val/image"}
PUBLISHED_COUNTS = {"train": 795, "val": 654}
SIZE = (288, 384)
PARTS = {
    "image": Part("uint8", 3),
    "semseg": Part("uint8", 1),
    "depth": Part("float32", 1),
    "normals": Part("float16", 3),
}
CLASSES = class_names.NYUD13
VOID = 255
_FOLDERS = {"image": "image", "semseg": "label", "depth": "depth", "normals": "normal"}
_TOLERANCE = 1e-3  # of bounds of floating-point numbers


def ids_in(folder: pathlib.Path, name: str) -> list[str]:
    """Ids SPLIT/N of the images in a folder, in the order of their numbers."""
    stems = [path.stem for path in archives.listed(folder, name, "*.npy")]
    if wrong := [stem for stem in stems if not (stem.isdecimal() and stem.isascii() and str(int(stem)) == stem)]:
        raise Problems([f"{name}/{stem}.npy has no number as its name; {AGAIN}" for stem in wrong])
    return [f"{folder.parent.name}/{number}" for number in sorted(map(int, stems))]


def members(example_id: str) -> dict[str, tuple[str, ...]]:
    """Part of an example -> file in the archive."""
    split, number = example_id.split("/")
    return {part: (f"{split}/{folder}/{number}.npy",) for part, folder in _FOLDERS.items()}


def read_example(root: pathlib.Path, example_id: str) -> dict[str, np.ndarray]:
    """Reads and checks all files of one example; returns its parts as they are stored.

    Returns:
      image (h,w,3) uint8 RGB, rounded; semseg (h,w,1) uint8, void 255; depth (h,w,1) float32 metres, 0 invalid; normals
      (h,w,3) float16 of length 1, 0 invalid.

    Raises:
      Problems: a file is missing, damaged, of another size than the image, or has values out of range.
    """
    read = {"image": _read_image, "semseg": _read_classes, "depth": arrays.read_depth, "normals": _read_normals}
    files = {part: file for part, (file,) in members(example_id).items()}
    parts = archives.read_all({part: functools.partial(read[part], root, file) for part, file in files.items()})
    size = parts["image"].shape[:2]
    if size != SIZE:
        height, width = SIZE
        raise Problems(
            [f"{files['image']} is {size[0]}x{size[1]}, but images of this copy are {height}x{width}; {AGAIN}"]
        )
    archives.check_sizes(parts, files)
    return parts


def _read_vectors(root: pathlib.Path, member: str) -> np.ndarray:
    stored = arrays.read_numbers(root, member)
    if stored.ndim != 3 or stored.shape[2] != 3 or not stored.size:
        raise Problems([f"{member} has the shape {stored.shape} instead of (height, width, 3); {AGAIN}"])
    if not np.isfinite(stored).all():
        raise Problems([f"{member} has NaN or Inf values; {AGAIN}"])
    return stored


def _read_image(root: pathlib.Path, member: str) -> np.ndarray:
    stored = _read_vectors(root, member)
    low, high = float(stored.min()), float(stored.max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise Problems([f"{member} has values from {low:g} to {high:g}, but colours are in [0, 1]; {AGAIN}"])
    return np.rint(255 * np.clip(stored, 0, 1)).astype(np.uint8)


def _read_classes(root: pathlib.Path, member: str) -> np.ndarray:
    stored = arrays.read_numbers(root, member)
    if stored.ndim != 2 or not stored.size:
        raise Problems([f"{member} has the shape {stored.shape} instead of (height, width); {AGAIN}"])
    if np.any(wrong := ~np.isin(stored, np.arange(-1, len(CLASSES)))):
        last = len(CLASSES) - 1
        raise Problems([f"{member} has class {stored[wrong][0]:g}, beyond -1 (void) and 0 to {last}; {AGAIN}"])
    return np.where(stored == -1, VOID, stored).astype(np.uint8)[..., None]


def _read_normals(root: pathlib.Path, member: str) -> np.ndarray:
    stored = _read_vectors(root, member)
    if (largest := float(np.abs(stored).max())) > 1 + _TOLERANCE:
        raise Problems([f"{member} has the component {largest:g}, but normals have length 1; {AGAIN}"])
    return kinds.normals().read_label(stored, False).astype(np.float16)


class Builder(records.ArchiveBuilder):
    """NYUv2 with 13 classes: splits `train` and `val`, examples in the order of their numbers."""

    name = "nyud13"
    VERSION = tfds.core.Version("1.0.0")
    PARTS = PARTS


def source(config: ConfigDict, split: str) -> records.RecordSource:
    """A split of the data set built under `config.data_dir` (config: the `dataset` part of the config)."""
    return records.RecordSource(Builder, config.data_dir, split)
