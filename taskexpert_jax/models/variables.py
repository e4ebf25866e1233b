"""A model's variables without optimiser state: random initialisation, and shapes with shardings."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.parallel import sharding


def init(model: MultiTaskModel, key: jax.Array) -> dict[str, Any]:
    """Random `params` and initial `batch_stats` (empty without batch norm), boxed with logical axis names.

    Call it under `jax.jit` or `jax.eval_shape`, because it includes a forward pass of one image.
    """
    image = jnp.zeros((1, *model.image_size, 3))
    return {"batch_stats": {}, **model.init(key, image, train=False)}


def placed(boxed: Any, mesh: Mesh) -> Any:
    """Unboxed tree of shapes, dtypes and shardings, from a tree boxed with logical axis names."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        sharding.unbox(boxed),
        sharding.shardings_of(boxed, mesh),
    )


def abstract_variables(model: MultiTaskModel, mesh: Mesh) -> dict[str, Any]:
    """Shapes, dtypes and shardings of parameters and batch statistics: {"params": ..., "batch_stats": ...}."""
    return placed(jax.eval_shape(lambda: init(model, jax.random.key(0))), mesh)
