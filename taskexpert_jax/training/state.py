"""What training carries from step to step, and how it is made on a mesh."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.parallel import sharding

Tree = Any  # a pytree of arrays


class TrainState(struct.PyTreeNode):
    """Everything that a step changes. A checkpoint of it, with the config, resumes a run exactly.

    step: int32 scalar, steps done. rng: (2,) uint32 key data; step i draws from fold_in(rng, i).
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    rng: jax.Array
    ema: Tree  # moving average of the parameters; {} where `optimizer.ema_decay` is 0

    def variables(self) -> dict[str, Tree]:
        """The variables of the model that is evaluated: with the averaged parameters where there are such."""
        return {"params": self.ema or self.params, "batch_stats": self.batch_stats}


def abstract_and_shardings(
    model: TaskExpert, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, *, averaged: bool = False
) -> tuple[Any, TrainState, TrainState]:
    """(initialiser, abstract state, its shardings): nothing is allocated.

    The initialiser is a function without arguments that returns the unboxed state; jit it with the shardings.
    averaged: whether the state has a moving average of the parameters.
    """
    patch = model.backbone.patch_size
    image = jnp.zeros((1, model.grid[0] * patch, model.grid[1] * patch, 3))

    def boxed() -> TrainState:
        params_key, state_key = jax.random.split(jax.random.key(seed))
        variables = model.init(params_key, image, train=False)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(variables["params"]),
            rng=jax.random.key_data(state_key),
            ema=variables["params"] if averaged else {},
        )

    def initialise() -> TrainState:
        return sharding.unbox(boxed())

    shapes = jax.eval_shape(boxed)
    shardings = sharding.shardings_of(shapes, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        sharding.unbox(shapes),
        shardings,
    )
    return initialise, abstract, shardings
