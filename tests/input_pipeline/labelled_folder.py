"""A small folder with labels of six tasks, and its config."""

import pathlib

from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from configs import folder as folder_config

ALL = ("semseg", "depth", "normals", "edge", "human_parts", "sal")
CLASSES = ("road", "grass", "sky", "car")
HEIGHT, WIDTH = 32, 48


def save(path: pathlib.Path, array: np.ndarray) -> pathlib.Path:
    """Writes a .npy or an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def numbers(random: np.random.Generator, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[str, np.ndarray]:
    """Contents of an example's files."""
    return {
        "images": random.integers(0, 256, (*size, 3), np.uint8),
        "semseg": random.integers(0, 4, size, np.uint8),
        "depth": random.uniform(0.5, 9, size).astype(np.float32),
        "normals": random.normal(size=(*size, 3)).astype(np.float32) / 10 + np.float32([0, 0, -1]),
        "edge": random.integers(0, 2, size, np.uint8) * np.uint8(255),
        "human_parts": random.integers(0, 7, size, np.uint8),
        "sal": random.integers(0, 2, size, np.uint8),
    }


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes four training images and one validation image; a/2 and a/5 have all labels, 1 has none."""
    random = np.random.default_rng(0)
    (folder / "train.txt").write_text("1\na/2\n\n3.b\r\n4\n")
    (folder / "val.txt").write_text("a/5")
    kept = {"1": (), "a/2": ALL, "3.b": ("semseg",), "4": ("depth", "edge"), "a/5": ALL}
    for example_id, names in kept.items():
        for part, array in numbers(random).items():
            if part in ("images", *names):
                save(folder / part / f"{example_id}.{'npy' if part in ('depth', 'normals') else 'png'}", array)
    return folder


def config_of(folder: pathlib.Path) -> ConfigDict:
    """Small config with all six tasks of the folder."""
    config = folder_config.get_config("tiny")
    config.tasks = ALL
    config.dataset.data_dir = str(folder)
    config.dataset.semseg_classes = CLASSES
    config.dataset.image_size = (HEIGHT, WIDTH)
    config.dataset.threads = 1
    return config
