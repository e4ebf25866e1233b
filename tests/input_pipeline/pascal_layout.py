"""Writer of PASCAL-Context's folder layout with small random examples, for tests without the real data set."""

from collections.abc import Sequence
import pathlib
from typing import Any

import cv2
import numpy as np
from PIL import Image
import scipy.io

TRAIN = ("2008_000007", "2008_000003", "2010_000011", "2009_000005")  # unsorted: the order of the id files is kept
VAL = ("2008_000002", "2010_000009", "2008_000004")
PERSON, SHEEP = 15, 17
PARTS = {  # label -> part names
    1: {"hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"},
    2: {"neck", "torso"},
    3: {"luarm", "ruarm"},
    4: {"lhand", "llarm", "rhand", "rlarm"},
    5: {"luleg", "ruleg"},
    6: {"lfoot", "llleg", "rfoot", "rlleg"},
}
Objects = Sequence[tuple[int, Sequence[tuple[str, np.ndarray]]]]  # class, and for each part name and mask


def example(example_id: str, height: int = 30, width: int = 40) -> dict[str, Any]:
    """Contents of an example's files, a function of its id.

    Returns:
      image (h,w,3), semseg, sal (h,w) and normals (h,w,3) uint8, context (h,w) uint16, and objects: a sheep, a person
      without parts, and for odd ids two persons with overlapping parts.
    """
    random = np.random.default_rng(int(example_id[5:]))

    def blocks(low: int, high: int, dtype: type) -> np.ndarray:
        return cv2.resize(
            random.integers(low, high, (4, 5)).astype(dtype), (width, height), interpolation=cv2.INTER_NEAREST
        )

    def person(*names: str) -> tuple[int, list[tuple[str, np.ndarray]]]:
        return PERSON, [(name, blocks(0, 2, np.uint8)) for name in names]

    objects = [(SHEEP, [("head", blocks(0, 2, np.uint8)), ("lfleg", blocks(0, 2, np.uint8))]), (PERSON, [])]
    if int(example_id[5:]) % 2:
        objects += [person("head", "leye", "torso", "rlarm"), person("neck", "luarm", "ruleg", "lfoot", "hair")]
    return {
        "image": blocks(0, 256, np.uint8)[..., None] + random.integers(0, 60, 3, np.uint8),
        "semseg": random.choice([*range(21), 255], (height, width)).astype(np.uint8),
        "sal": random.integers(0, 256, (height, width), np.uint8),
        "normals": random.integers(0, 256, (height, width, 3), np.uint8),
        "context": blocks(1, 460, np.uint16),
        "objects": objects,
    }


def human_parts(objects: Objects, height: int, width: int) -> np.ndarray:
    """Label by its definition: the last part of a person at each pixel."""
    label = np.zeros((height, width), np.uint8)
    for y, x in np.ndindex(height, width):
        for kind, parts in objects:
            for name, mask in parts:
                if kind == PERSON and mask[y, x]:
                    label[y, x] = next(number for number, names in PARTS.items() if name in names)
    return label


def annotation(objects: Objects) -> np.ndarray:
    """PASCAL-Part's struct `anno` for SciPy to write; without parts, `parts` is an empty struct array."""
    found = np.empty((1, len(objects)), [(name, object) for name in ("class", "class_ind", "mask", "parts")])
    for index, (kind, parts) in enumerate(objects):
        structs = np.empty((1, len(parts)) if parts else (0, 0), [("part_name", object), ("mask", object)])
        for number, part in enumerate(parts):
            structs[0, number] = part
        found[0, index] = ("person" if kind == PERSON else "sheep", kind, np.ones((3, 4), np.uint8), structs)
    anno = np.empty((1, 1), [("imname", object), ("objects", object)])
    anno[0, 0] = ("image", found)
    return anno


def save_matrix(path: pathlib.Path, **variables: Any) -> None:
    """Writes a compressed MATLAB file, as in the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, variables, do_compression=True)


def save_image(path: pathlib.Path, array: np.ndarray, **options: Any) -> None:
    """Writes a PNG or JPEG file, depending on the suffix; options: of Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write(
    root: pathlib.Path, *, train: Sequence[str] = TRAIN, val: Sequence[str] = VAL, height: int = 30, width: int = 40
) -> pathlib.Path:
    """Writes the layout into the new folder `root` and returns it; only training images have VOC masks."""
    lists = root / "ImageSets" / "Context"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("\n".join(train) + "\n")
    (lists / "val.txt").write_text("\n".join(val) + "\n")
    for example_id in (*train, *val):
        held = example(example_id, height, width)
        source = "VOC12" if example_id in train else "pascal-context"
        save_image(root / "JPEGImages" / f"{example_id}.jpg", held["image"])
        save_image(root / "semseg" / source / f"{example_id}.png", held["semseg"])
        save_image(root / "sal_distill" / f"{example_id}.png", held["sal"])
        save_image(root / "normals_distill" / f"{example_id}.png", held["normals"])
        save_matrix(root / "pascal-context" / "trainval" / f"{example_id}.mat", LabelMap=held["context"])
        save_matrix(root / "human_parts" / f"{example_id}.mat", anno=annotation(held["objects"]))
    return root
