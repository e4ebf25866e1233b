"""NYUD-v2 in its multi-task copy (`NYUDv2.tar.gz`, folder `NYUDv2/`): 795 training and 654 validation frames, 425x560.

Layout: `gt_sets/{train,val}.txt` one id a line; for each id `images/ID.png` RGB, `segmentation/ID.png` 0 void and 1..40
classes, `depth/ID.npy` float metres with 0 invalid, `normals/ID.png` n = 2*v/255 - 1, `edge/ID.png` 0 or 255.
Pictures are stored as they come (PNG); what the values mean is decoded when an example is read.
"""

from collections.abc import Iterator, Mapping
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image
import tensorflow as tf
import tensorflow_datasets as tfds

from input_pipeline import records
from taskexpert_jax.errors import UserError

FOLDER = "NYUDv2"
PUBLISHED_COUNTS = {"train": 795, "val": 654}
MAX_SIZE = (448, 576)  # height and width that no frame of the multi-task copy exceeds
MEMBERS = {  # part of an example: folder, suffix
    "image": ("images", ".png"),
    "semseg": ("segmentation", ".png"),
    "depth": ("depth", ".npy"),
    "normals": ("normals", ".png"),
    "edge": ("edge", ".png"),
}
PICTURE_CHANNELS = {"image": 3, "semseg": 1, "normals": 3, "edge": 1}
VOID = 255


def _member(part: str, example_id: str) -> str:
    folder, suffix = MEMBERS[part]
    return f"{folder}/{example_id}{suffix}"


def _split_ids(root: pathlib.Path) -> dict[str, list[str]]:
    """The ids of each split, in the order of `root/gt_sets/SPLIT.txt`; they may be a part of the published ones.

    Raises:
      UserError: an id file is missing, empty, or names an id twice.
    """
    ids = {}
    for split in PUBLISHED_COUNTS:
        name = f"gt_sets/{split}.txt"
        if not (root / name).is_file():
            raise UserError(
                f"{name} is missing; the archive is {FOLDER}.tar.gz or the folder {FOLDER} extracted from it"
            )
        ids[split] = (root / name).read_text().split()
        if not ids[split]:
            raise UserError(f"{name} names no id; get the archive again")
        if len(set(ids[split])) != len(ids[split]):
            repeated = next(i for i in ids[split] if ids[split].count(i) > 1)
            raise UserError(f"{name} names {repeated} more than once; get the archive again")
    return ids


def verify(root: pathlib.Path) -> dict[str, int]:
    """The number of examples of each split, after checking that every id has its five files.

    root: the folder that holds `gt_sets` and the members.

    Raises:
      UserError: an id file is missing or faulty, or a member is missing; it is named.
    """
    ids = _split_ids(root)
    present = {folder: {path.name for path in (root / folder).glob("*")} for folder, _ in MEMBERS.values()}
    missing = [
        f"{_member(part, example_id)} is missing, though gt_sets/{split}.txt names {example_id}"
        for split in ids
        for example_id in ids[split]
        for part, (folder, suffix) in MEMBERS.items()
        if f"{example_id}{suffix}" not in present[folder]
    ]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}{more}; get the archive again")
    return {split: len(ids[split]) for split in ids}


def _read_picture(root: pathlib.Path, member: str, channels: int) -> tuple[tuple[int, ...], io.BytesIO | np.ndarray]:
    """Size, and the picture: the file's own bytes where a record may hold them as they are, else (h,w,c) uint8.

    Raises:
      UserError: the file is not a readable picture.
    """
    content = (root / member).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format == "PNG" and picture.mode == ("RGB" if channels == 3 else "L"):
                tf.io.decode_png(content)  # as when records are read, so that every kind of damage is found now
                return (picture.height, picture.width), io.BytesIO(content)
            # A palette's indices are the labels; converted or decoded by TensorFlow they would become grey values.
            array = np.asarray(picture.convert("RGB") if channels == 3 else picture)
    except (OSError, SyntaxError, ValueError, tf.errors.InvalidArgumentError) as error:
        raise UserError(f"{member} is corrupt, it does not decode as a picture; get the archive again") from error
    if array.dtype == np.bool_:
        array = array * 255
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] != channels:
        raise UserError(f"{member} has {array.shape[2]} channels instead of {channels}; get the archive again")
    return array.shape[:2], array.astype(np.uint8)


def _read_depth(root: pathlib.Path, member: str) -> np.ndarray:
    """(h,w) float32 metres.

    Raises:
      UserError: the file is not a readable array of numbers.
    """
    try:
        return np.squeeze(np.load(root / member, allow_pickle=False)).astype("<f4")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{member} is corrupt, it does not load as an array; get the archive again") from error


def _check_sizes(example_id: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where the parts of an example differ in size, or are those of another copy of NYUD."""
    height, width = sizes["image"]
    if height > MAX_SIZE[0] or width > MAX_SIZE[1]:
        raise UserError(
            f"{_member('image', example_id)} is {height}x{width}: another copy of NYUD-v2; get the multi-task copy "
            f"with frames of at most {MAX_SIZE[0]}x{MAX_SIZE[1]} (rows 45:470 and columns 40:600 of the 480x640 frames)"
        )
    for part, size in sizes.items():
        if size != (height, width):
            raise UserError(
                f"{_member(part, example_id)} is {'x'.join(map(str, size))} but its image is {height}x{width}; "
                "get the archive again"
            )


def _read_example(root: pathlib.Path, example_id: str) -> dict[str, Any]:
    """The features of one example, every file of it read and checked."""
    features: dict[str, Any] = {"id": example_id}
    sizes = {}
    for part, channels in PICTURE_CHANNELS.items():
        sizes[part], features[part] = _read_picture(root, _member(part, example_id), channels)
    depth = _read_depth(root, _member("depth", example_id))
    sizes["depth"], features["depth"] = depth.shape, depth.tobytes()
    _check_sizes(example_id, sizes)
    return features


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Builds the two splits, in the order of their id files, from the folder given as TFDS's manual directory."""

    name = "nyud"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The folder {FOLDER}, extracted from {FOLDER}.tar.gz."
    # Nothing is downloaded, and TFDS would look for checksums beside this file by a package that it does not require.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            part: tfds.features.Image(shape=(None, None, channels), dtype=np.uint8, encoding_format="png")
            for part, channels in PICTURE_CHANNELS.items()
        }
        # float32, row after row, as bytes. TFDS's lists of floats triple the time to build, and its encoded tensors log
        # a deprecation of its own whenever they are read.
        features["depth"] = tfds.features.Tensor(shape=(), dtype=np.object_)
        features["id"] = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keeps the order of the id files; training shuffles by index
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        root = pathlib.Path(dl_manager.manual_dir)
        return {split: self._generate_examples(root, ids, split) for split, ids in _split_ids(root).items()}

    def _generate_examples(self, root: pathlib.Path, ids: list[str], split: str) -> Iterator[tuple[int, Any]]:
        return records.read_in_parallel(lambda example_id: _read_example(root, example_id), ids, split)


def decode(features: Mapping[str, tf.Tensor]) -> records.Example:
    """Stored features -> the decoded example: void 255, classes from 0, normals in [-1,1], boundaries 0 or 1."""
    stored = features["semseg"]
    return {
        "image": features["image"],
        "semseg": tf.where(stored == 0, tf.constant(VOID, tf.uint8), stored - 1),
        "depth": tf.reshape(tf.io.decode_raw(features["depth"], tf.float32), tf.shape(stored)),
        "normals": tf.cast(tf.cast(features["normals"], tf.float32) * 2 / 255 - 1, tf.float16),
        "edge": features["edge"] // 255,
        "id": features["id"],
    }


def source(config: Any, split: str) -> records.RecordSource:
    """A split of the data set built under `config.data_dir` (config: the `dataset` part of the config)."""
    return records.RecordSource(Builder.name, str(Builder.VERSION), config.data_dir, split, decode)
