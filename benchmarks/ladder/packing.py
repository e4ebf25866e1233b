"""Writes packed frames (`packed`) from NYUD-v2 as `input_pipeline` reads it; needs TensorFlow."""

import json
import os
import pathlib
from typing import Any
import zipfile

import cv2
import numpy as np

from benchmarks.ladder import packed
from configs import nyud as nyud_config
from input_pipeline import pipeline, prepare, records, transforms
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import threads
from taskexpert_jax.progress import Progress
from taskexpert_jax.tasks import Task, from_config

# Kinect's colour camera in pixels of the multi-task copy's images, which are rows 45:470 and columns 40:600 of 480x640.
CAMERA = {"fx": 518.858, "fy": 519.470, "cx": 325.582 - 40, "cy": 253.736 - 45}
MOST_BYTES = 60_000_000
PATCH = 16  # frames are multiples of it


def pack(
    folder: pathlib.Path | None, data_dir: pathlib.Path, output: pathlib.Path, downscale: float, quality: int
) -> dict[str, Any]:
    """Packs both splits of the data set in `data_dir`, built there first from `folder` if it is missing.

    Returns:
      The facts in the file; `depth_error` is the largest relative error of a depth.

    Raises:
      UserError: faulty data, images of several sizes, or a file that would be too large.
    """
    if folder is not None and not (data_dir / "nyud").is_dir():
        prepare.prepare("nyud", folder, data_dir, allow_subset=True)
    config = nyud_config.get_config("vit_s16")
    config.dataset.data_dir, config.dataset.cache = str(data_dir), False
    tasks = tuple(task for task in from_config(config) if task.name in packed.FILES)
    pipeline.record_fingerprint(config)
    sources = {split: pipeline.open_source(config.dataset, tasks, split) for split in ("train", "val")}
    frames = {
        split: list(threads.in_order(lambda i, s=source: small(s.load(i), tasks, downscale), range(len(source))))
        for split, source in sources.items()
    }
    together = [frame for of_split in frames.values() for frame in of_split]
    sizes = {frame["image"].shape[:2] for frame in together}
    if len(sizes) > 1:
        raise UserError(f"{data_dir}: images of {len(sizes)} sizes; packed frames must have the same")
    (height, width), of_depth = sizes.pop(), packed.levels([frame["depth"] for frame in together])
    about = {
        "camera": {name: value * downscale for name, value in CAMERA.items()},
        "depth_levels": of_depth.tolist(),
        "downscale": downscale,
        "fingerprint": config.dataset.fingerprint,
        "frame_size": [-(-side // PATCH) * PATCH for side in (height, width)],
        "image_size": [height, width],
        "quality": quality,
        "splits": {split: [frame["id"] for frame in of_split] for split, of_split in frames.items()},
    }
    return write(output, frames, about, of_depth, quality)


def small(example: records.Example, tasks: tuple[Task, ...], factor: float) -> records.Example:
    """The example at `factor` times its size, as `dataset.downscale` reduces it, boundaries apart.

    There a pixel is a boundary if any of the pixels that it covers is: taking every second pixel would lose half of a
    line, which has the width of one.
    """
    reduced = transforms.downscale(example, tasks, factor)
    height, width = reduced["image"].shape[:2]
    for task in tasks:
        if task.boundary_benchmark:
            share = cv2.resize(example[task.name].astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
            reduced[task.name] = (share > 0).astype(np.uint8)[..., None]
    return reduced


def write(
    output: pathlib.Path, frames: dict[str, list[Any]], about: dict[str, Any], of_depth: np.ndarray, quality: int
) -> dict[str, Any]:
    """Writes the file; replaces an existing one when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    total, error = sum(map(len, frames.values())), 0.0
    with zipfile.ZipFile(partial, "w") as archive, Progress("packing", total, "frames") as shown:
        for split, of_split in frames.items():
            encoded = threads.in_order(lambda frame: packed.encode(frame, of_depth, quality), of_split)
            for frame, files in zip(of_split, encoded, strict=True):
                for name, content in files.items():
                    archive.writestr(f"{split}/{frame['id']}/{name}", content)
                again = packed.decode(files, of_depth, about["camera"])["depth"]
                error = max(error, float(np.max(np.abs(again / np.maximum(frame["depth"], 1e-6) - 1) * (again > 0))))
                shown.add()
        about = {**about, "depth_error": error}
        archive.writestr(packed.FACTS, json.dumps(about))
    size = partial.stat().st_size
    if size > MOST_BYTES:
        partial.unlink()
        raise UserError(
            f"{output} would have {size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}: give a lower --quality or a "
            "smaller --downscale"
        )
    os.replace(partial, output)
    return about


def line(path: pathlib.Path, about: dict[str, Any]) -> str:
    """One line about the packed frames."""
    frames = {split: len(ids) for split, ids in about["splits"].items()}
    size, depths = path.stat().st_size / 1e6, len(about["depth_levels"])
    height, width = about["image_size"]
    what = f"{frames} frames of {height}x{width}, {depths} depths, right to {about['depth_error']:.2%}"
    return f"{path}: {size:.1f} MB, {what}"
