"""Packed frames: one file with a small copy of NYUD-v2, and its decoded form. Needs no TensorFlow.

The file is a ZIP archive without compression: SPLIT/ID/PART.jpg or .png, and `FACTS`, a JSON text. Boundaries are one
bit a pixel, depth is one byte, an index of `facts["depth_levels"]`. Normals are not in it: in any lossless form they
are larger than all else. They are fitted to the depth when it is decoded.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import io
import os
import pathlib
from typing import Any
import zipfile

import cv2
import numpy as np
from PIL import Image

from taskexpert_jax import json_file
from taskexpert_jax.errors import UserError

FACTS = "pack.json"
LEVELS = 256  # of depth; the first is 0 m, invalid
FILES = {"image": "image.jpg", "semseg": "semseg.png", "depth": "depth.png", "edge": "edge.png"}
LABELS = ("semseg", "depth", "normals", "edge")
_FORM = {
    "camera": dict,
    "depth_levels": object,
    "downscale": float,
    "fingerprint": str,
    "frame_size": [int, int],
    "image_size": [int, int],
    "quality": int,
    "splits": json_file.Each(object),
}
_SMOOTHING = 0.75  # pixels; standard deviation for the depth before planes are fitted to it
_WINDOW = 9  # pixels; side of the square to which a plane is fitted

Example = dict[str, Any]


def facts(path: pathlib.Path) -> dict[str, Any]:
    """The facts of a packed file, its splits' ids among them.

    Raises:
      UserError: no such file, or none that `pack` wrote.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return json_file.parse(archive.read(FACTS), _FORM)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: write it with `benchmarks/device_ladder.py pack`") from None
    except (zipfile.BadZipFile, KeyError, json_file.MalformedError, OSError) as error:
        raise UserError(f"{path} is no packed file ({error}): write it again") from None


def levels(depths: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) float32, at most `LEVELS`: 0 and the depths that occur, or, if there are more, equal ratios between them.

    depths: metres, 0 invalid.
    """
    found = np.zeros(0, np.float32)
    for depth in depths:
        found = np.unique(np.concatenate([found, depth[depth > 0]]))
        if len(found) >= LEVELS:
            valid = [depth[depth > 0] for depth in depths if (depth > 0).any()]
            ends = min(each.min() for each in valid), max(each.max() for each in valid)
            found = np.geomspace(*ends, LEVELS - 1)
            break
    return np.concatenate([[0.0], found]).astype(np.float32)


def encode(example: Example, of_depth: np.ndarray, quality: int) -> dict[str, bytes]:
    """The files of an example by name; of_depth: `levels`."""
    depth = example["depth"][..., 0]
    index = np.searchsorted((of_depth[1:-1] + of_depth[2:]) / 2, depth) + 1
    pictures = {
        "image": Image.fromarray(example["image"]),
        "semseg": Image.fromarray(example["semseg"][..., 0]),
        "depth": Image.fromarray(np.where(depth > 0, index, 0).astype(np.uint8)),
        "edge": Image.fromarray(example["edge"][..., 0] > 0),
    }
    return {FILES[part]: _file(picture, quality) for part, picture in pictures.items()}


def _file(picture: Image.Image, quality: int) -> bytes:
    content = io.BytesIO()
    if picture.mode == "RGB":
        picture.save(content, "JPEG", quality=quality, optimize=True)
    else:
        picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def decode(files: Mapping[str, bytes], of_depth: np.ndarray, camera: Mapping[str, float]) -> Example:
    """Inverse of `encode`, and the normals: parts as a data set's `source` has them, without the id."""
    parts = {part: np.asarray(Image.open(io.BytesIO(files[name]))) for part, name in FILES.items()}
    depth = of_depth[parts["depth"]]
    return {
        "image": parts["image"],
        "semseg": parts["semseg"][..., None],
        "depth": depth[..., None],
        "normals": normals(depth, camera),
        "edge": parts["edge"].astype(np.uint8)[..., None],
    }


def normals(depth: np.ndarray, camera: Mapping[str, float]) -> np.ndarray:
    """Unit normals (h, w, 3) float16 of the planes that fit the points around each pixel best.

    x right, y down, z forward, and they face the camera. 0 where a depth in the window is invalid. The normal is the
    eigenvector of the points' covariance with the smallest eigenvalue: the limit of powers of its adjugate.

    depth: (h, w) metres, 0 invalid.
    camera: focal lengths fx, fy and principal point cx, cy, in pixels.
    """
    smooth = cv2.GaussianBlur(depth.astype(np.float64), (0, 0), _SMOOTHING)
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]]
    x = (columns - camera["cx"]) * smooth / camera["fx"]
    y = (rows - camera["cy"]) * smooth / camera["fy"]
    points = np.stack([x, y, smooth])

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.boxFilter(values, -1, (_WINDOW, _WINDOW))

    centre = [mean(each) for each in points]
    xx, xy, xz, yy, yz, zz = (
        mean(points[i] * points[j]) - centre[i] * centre[j] for i in range(3) for j in range(i, 3)
    )
    least = 1e-9 * (xx + yy + zz) + 1e-12  # or the adjugate of a perfect line would be 0
    xx, yy, zz = xx + least, yy + least, zz + least
    a, b, c = yy * zz - yz**2, xz * yz - xy * zz, xy * yz - xz * yy
    d, e, f = xx * zz - xz**2, xy * xz - xx * yz, xx * yy - xy**2
    x, y, z = -points  # towards the camera
    for _ in range(8):
        x, y, z = a * x + b * y + c * z, b * x + d * y + e * z, c * x + e * y + f * z
        length = np.sqrt(x**2 + y**2 + z**2) + 1e-300
        x, y, z = x / length, y / length, z / length
    found = np.stack([x, y, z])
    found *= -np.sign((found * points).sum(axis=0))
    known = cv2.erode((depth > 0).astype(np.uint8), np.ones((_WINDOW, _WINDOW), np.uint8))
    return (found * known).transpose(1, 2, 0).astype(np.float16)


def unpack(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Decodes all frames in threads into `folder`, as arrays that `Frames` maps into memory.

    Raises:
      UserError: as `facts`, or a damaged frame.
    """
    about = facts(path)
    of_depth = np.array(about["depth_levels"], np.float32)
    shapes = {"image": (np.uint8, 3), "semseg": (np.uint8, 1), "depth": (np.float32, 1)}
    shapes |= {"normals": (np.float16, 3), "edge": (np.uint8, 1)}
    with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, ids in about["splits"].items():
            arrays = {
                part: np.lib.format.open_memmap(
                    folder / f"{split}_{part}.npy", "w+", dtype, (len(ids), *about["image_size"], channels)
                )
                for part, (dtype, channels) in shapes.items()
            }

            def fill(index: int, name: str, arrays: Any = arrays, split: str = split) -> None:
                try:
                    files = {file: archive.read(f"{split}/{name}/{file}") for file in FILES.values()}
                    for part, value in decode(files, of_depth, about["camera"]).items():
                        arrays[part][index] = value
                except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
                    raise UserError(f"{path}: frame {name} of {split} is damaged ({error}): write it again") from None

            list(pool.map(fill, range(len(ids)), ids))


class Frames:
    """Decoded frames of a split; a `records.Source`.

    Args:
      folder: where `unpack` has put them; several processes share the memory.
      ids: of `facts["splits"]`.
    """

    labels: tuple[str, ...] = LABELS

    def __init__(self, folder: pathlib.Path, split: str, ids: list[str]):
        self._ids = ids
        self._arrays = {
            part: np.asarray(np.load(folder / f"{split}_{part}.npy", mmap_mode="r")) for part in ("image", *LABELS)
        }

    def __len__(self) -> int:
        return len(self._ids)

    def load(self, index: int) -> Example:
        """See `Source.load`."""
        return {"id": self._ids[index], **{part: array[index] for part, array in self._arrays.items()}}
