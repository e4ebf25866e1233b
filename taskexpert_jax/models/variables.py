"""A model's variables before training: freshly drawn, and as shapes with shardings, without an optimiser."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.parallel import sharding


def init(model: TaskExpert, key: jax.Array) -> dict[str, Any]:
    """Fresh `params` and `batch_stats` (empty for models without batch norm), boxed with logical axis names.

    To be traced (`jax.jit`, `jax.eval_shape`) rather than run: it contains a forward pass of one image.
    """
    patch = model.backbone.patch_size
    image = jnp.zeros((1, model.grid[0] * patch, model.grid[1] * patch, 3))
    return {"batch_stats": {}, **model.init(key, image, train=False)}


def placed(boxed: Any, mesh: Mesh) -> Any:
    """Shape, dtype and sharding of every array of a tree boxed with logical axis names; the boxes are removed."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        sharding.unbox(boxed),
        sharding.shardings_of(boxed, mesh),
    )


def abstract_variables(model: TaskExpert, mesh: Mesh) -> dict[str, Any]:
    """Shape, dtype and sharding of every parameter and batch statistic: {"params": ..., "batch_stats": ...}."""
    return placed(jax.eval_shape(lambda: init(model, jax.random.key(0))), mesh)
