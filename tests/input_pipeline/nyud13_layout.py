"""Writer of the folder layout of NYUv2 with 13 classes with small random arrays, for tests without the real data."""

import pathlib

import numpy as np

COUNTS = {"train": 11, "val": 2}  # with the number 10, which is not after 1
SIZE = (24, 32)  # instead of 288x384


def frame(split: str, number: int) -> dict[str, np.ndarray]:
    """Arrays of an example's files: all classes, pixels without class, depth and normals occur."""
    random = np.random.default_rng([len(split), number])
    normals = random.normal(size=(*SIZE, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[random.random(SIZE) < 0.1] = 0
    return {
        "image": random.random((*SIZE, 3)),
        "label": random.integers(-1, 13, SIZE).astype(np.float64),
        "depth": random.integers(0, 5, (*SIZE, 1)) * random.uniform(0.7, 2, (*SIZE, 1)),
        "normal": normals,
    }


def write(root: pathlib.Path) -> pathlib.Path:
    """Writes the layout into the new folder `root` and returns it."""
    for split, count in COUNTS.items():
        for number in range(count):
            for folder, array in frame(split, number).items():
                path = root / split / folder / f"{number}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, array)
    return root
