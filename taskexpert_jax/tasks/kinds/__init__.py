"""Kinds of dense values: one record each, with everything that a file, a picture or a summary of such values needs.

    classes      whole numbers that name classes
    depth        metres
    normals      unit vectors
    probability  numbers in [0, 1]: masks, boundaries, shares
    vector       real numbers, any number a pixel, of any length: optical flow, albedo

docs/add_a_dataset.md says how label files of each kind are coded, docs/add_a_task.md how a task names its kind.
"""

from taskexpert_jax.tasks.kinds.class_maps import UNNAMED, classes
from taskexpert_jax.tasks.kinds.depths import depth
from taskexpert_jax.tasks.kinds.kind import Counts, Kind
from taskexpert_jax.tasks.kinds.masks import probability
from taskexpert_jax.tasks.kinds.unit_vectors import normals
from taskexpert_jax.tasks.kinds.vectors import vector

__all__ = ["UNNAMED", "Counts", "Kind", "classes", "depth", "normals", "probability", "vector"]
