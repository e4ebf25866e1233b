"""Groups of images and parts of images by which benchmarks/breakdown.py divides an evaluation set.

Dims: N images of the set, B images of a batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from taskexpert_jax.models import inputs
from taskexpert_jax.tasks import Task

ALL = "all"
NEAR, FAR = 2.0, 4.0  # metres, between the bands of distance
REACH = 2  # pixels from a change of class that are boundary, on both sides of it
THIRDS = ("low", "middle", "high")
BANDS = (f"nearer than {NEAR:g} m", f"{NEAR:g} to {FAR:g} m", f"farther than {FAR:g} m")
PARTS = (*BANDS, "boundary", "interior")


class ImageGroups(NamedTuple):
    """Groups of the images of a set.

    Attributes:
      members: group -> which images belong to it, (N,) bool in the order of the set.
      bounds: statistic -> the two values between its thirds.
    """

    members: dict[str, np.ndarray]
    bounds: dict[str, tuple[float, float]]


def of_images(
    batches: Iterable[Mapping[str, np.ndarray]], tasks: Sequence[Task], conditions: Sequence[Sequence[str]] = ()
) -> ImageGroups:
    """Groups of the images of a set: all, those of each condition, and thirds by statistics of image and labels.

    Args:
      batches: evaluation batches of the set.
      tasks: tasks whose labels are in the batches.
      conditions: names of the conditions of each image; empty: the set has none.
    """
    rows = [found for batch in batches for found in _statistics(batch, tasks)]
    members = {ALL: np.ones(len(rows), bool)}
    for name in dict.fromkeys(name for one in conditions for name in one):
        members[name] = np.array([name in one for one in conditions])
    bounds = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        low, high = np.nanquantile(values, (1 / 3, 2 / 3)).tolist()
        bounds[name] = (low, high)
        # NaN, without any label, is in no third.
        parts = (values < low, (values >= low) & (values < high), values >= high)
        members |= {f"{name} {third}": part for third, part in zip(THIRDS, parts, strict=True)}
    return ImageGroups(members, bounds)


def _statistics(batch: Mapping[str, np.ndarray], tasks: Sequence[Task]) -> list[dict[str, float]]:
    """Mean brightness of each image, its median depth and its number of semantic regions, of the labels there are."""
    found = []
    for row in np.flatnonzero(batch["mask"]):
        top, left, height, width = batch["window"][row]
        inside = np.s_[row, top : top + height, left : left + width]
        values = {"brightness": float(batch["image"][inside].mean())}
        for task in tasks:
            label = batch[task.name][inside][..., 0]
            if task.name == "depth":
                metres = label[(label != task.ignore) & (label > 0)]
                values["median depth"] = float(np.median(metres)) if metres.size else np.nan
            elif task.name == "semseg":
                classes = np.unique(label[label != task.ignore])
                values["semantic regions"] = float(sum(ndimage.label(label == number)[1] for number in classes))
        found.append(values)
    return found


def parts_of_images(tasks: Sequence[Task], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parts of the images of a batch, name of PARTS -> (B, H, W) bool: bands of distance, boundary and interior.

    Those that need a label that is not there are left out; padding of the frames is in none.
    """
    parts = {}
    for task in tasks:
        label = batch[task.name][..., 0]
        if task.name == "depth":
            valid = label > 0  # ignored pixels are negative
            bands = (valid & (label < NEAR), (label >= NEAR) & (label < FAR), label >= FAR)
            parts |= dict(zip(BANDS, bands, strict=True))
        elif task.name == "semseg":
            boundary = _near_a_change(label, task.ignore)
            parts |= {"boundary": boundary, "interior": ~boundary}
    inside = inputs.inside(batch["window"], *batch["image"].shape[1:3])
    return {name: part & inside for name, part in parts.items()}


def _near_a_change(label: jax.Array, ignore: float) -> jax.Array:
    """Pixels (B, H, W) bool within REACH pixels of a change of class; next to an ignored pixel nothing changes."""
    change = jnp.zeros(label.shape, bool)
    for here, there in (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1]):
        differs = (label[here] != label[there]) & (label[here] != ignore) & (label[there] != ignore)
        change = change.at[here].max(differs).at[there].max(differs)
    window = (2 * REACH - 1,) * 2
    grown = nn.max_pool(change[..., None].astype(jnp.float32), window, (1, 1), padding="SAME")
    return grown[..., 0] > 0
