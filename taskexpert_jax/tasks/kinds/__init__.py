"""Kinds of dense values: one record each, which defines how such values are read, stored, resized, drawn and counted.

    classes      integer class ids
    depth        metres
    disparity    pixels
    normals      unit vectors
    probability  numbers in [0, 1]: masks, boundaries, shares
    vector       vectors of any length with any number of real components per pixel: optical flow, albedo

Encoding of label files: docs/add_a_dataset.md; use by a task: docs/add_a_task.md.
"""

from taskexpert_jax.tasks.kinds.classes import UNNAMED, classes
from taskexpert_jax.tasks.kinds.depth import decoded_disparity, depth, disparity
from taskexpert_jax.tasks.kinds.kind import Counts, Kind
from taskexpert_jax.tasks.kinds.normals import normals
from taskexpert_jax.tasks.kinds.probability import probability
from taskexpert_jax.tasks.kinds.vector import vector

__all__ = [
    "UNNAMED",
    "Counts",
    "Kind",
    "classes",
    "decoded_disparity",
    "depth",
    "disparity",
    "normals",
    "probability",
    "vector",
]
