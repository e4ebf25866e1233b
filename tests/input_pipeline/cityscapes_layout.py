"""Writer of Cityscapes' folder layout with small random images, for tests without the real data set."""

import pathlib
import zlib

import numpy as np
from PIL import Image

TRAIN = ("aachen_000000_000019", "aachen_000001_000019", "ulm_000003_000019")
VAL = ("frankfurt_000000_000294", "munster_000002_000019")
SIZE = (32, 64)  # instead of 1024x2048


def frame(name: str) -> dict[str, np.ndarray]:
    """Arrays of a frame's files, a function of its name: all label ids, and pixels without disparity, occur."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    ids = random.integers(0, 35, SIZE).astype(np.uint8)
    ids[ids == 34] = 255  # the licence plates' -1
    return {
        "leftImg8bit": random.integers(0, 256, (*SIZE, 3), np.uint8),
        "gtFine_labelIds": ids,
        "disparity": (random.integers(0, 5, SIZE) * random.integers(1, 8000, SIZE)).astype(np.uint16),
    }


def path_of(root: pathlib.Path, split: str, name: str, part: str) -> pathlib.Path:
    """Path of a file of a frame; part: its name's last part, such as `gtFine_labelIds`."""
    return root / part.split("_")[0] / split / name.split("_")[0] / f"{name}_{part}.png"


def write(root: pathlib.Path) -> pathlib.Path:
    """Writes the layout into the new folder `root` and returns it."""
    for split, names in (("train", TRAIN), ("val", VAL)):
        for name in names:
            for part, array in frame(name).items():
                path = path_of(root, split, name, part)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root
