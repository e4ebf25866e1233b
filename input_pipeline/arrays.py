"""Verified reading of the .npy files of an archive."""

import io
import pathlib

import numpy as np

from input_pipeline import archives
from input_pipeline.archives import AGAIN, Problems
from taskexpert_jax import images
from taskexpert_jax.tasks.losses import DEPTH_MAX


def read_numbers(root: pathlib.Path, member: str) -> np.ndarray:
    """Reads the array of real numbers in the .npy file `root/member`.

    Raises:
      Problems: the file is missing or damaged, or holds other values.
    """
    content = io.BytesIO(archives.read_bytes(root, member))
    try:
        stored = images.read_array(content)
        if stored.dtype.kind not in "fiu":
            raise ValueError("not an array of real numbers")
    except ValueError as error:
        raise Problems([f"{member} is corrupt, it does not load as an array of numbers; {AGAIN}"]) from error
    return stored


def read_depth(root: pathlib.Path, member: str) -> np.ndarray:
    """Reads depth, (h,w,1) float32 metres with 0 where invalid, from a .npy file of (h,w) or (h,w,1).

    Raises:
      Problems: the file is missing or damaged, or has other values: NaN, negative, or 80 m and more.
    """
    stored = read_numbers(root, member)
    depth = stored[..., None] if stored.ndim == 2 else stored
    if depth.ndim != 3 or depth.shape[2] != 1 or not depth.size:
        raise Problems([f"{member} has the shape {stored.shape} instead of (height, width); {AGAIN}"])
    if not np.isfinite(depth).all():
        raise Problems([f"{member} has NaN or Inf values, but invalid depth is 0; {AGAIN}"])
    if depth.min() < 0:
        raise Problems([f"{member} has the negative depth {depth.min():g}, but invalid depth is 0; {AGAIN}"])
    if depth.max() >= DEPTH_MAX:  # the sensor's range is 10 m
        raise Problems(
            [f"{member} has the depth {depth.max():g}, beyond {DEPTH_MAX:g} m: probably millimetres; divide by 1000"]
        )
    return depth.astype(np.float32)
