"""The training state: what a step changes, its initial value on a mesh, and its items in a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from taskexpert_jax.models import variables
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.tree import Tree


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
        """The variables that are evaluated: averaged parameters where the run has them."""
        return {"params": self.ema or self.params, "batch_stats": self.batch_stats}

    def to_items(self) -> dict[str, dict[str, Tree]]:
        """The two items of a checkpoint: `params`, all that evaluation needs, and `train`, the rest."""
        averaged = {"ema": self.ema} if self.ema else {}
        return {
            "params": {"params": self.params, "batch_stats": self.batch_stats, **averaged},
            "train": {"opt_state": self.opt_state, "step": self.step, "rng": self.rng},
        }

    @classmethod
    def from_items(cls, items: Mapping[str, Mapping[str, Tree]]) -> "TrainState":
        """The inverse of `to_items`."""
        return cls(**{"ema": {}, **items["params"]}, **items["train"])


def abstract_and_shardings(
    model: TaskExpert, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, *, averaged: bool = False
) -> tuple[Callable[[], TrainState], TrainState, TrainState]:
    """(initialiser, abstract state, its shardings): nothing is allocated.

    The initialiser is a function without arguments that returns the unboxed state; jit it with the shardings.
    averaged: adds a moving average of the parameters to the state.
    """

    def boxed() -> TrainState:
        params_key, state_key = jax.random.split(jax.random.key(seed))
        fresh = variables.init(model, params_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=fresh["params"],
            batch_stats=fresh["batch_stats"],
            opt_state=optimizer.init(fresh["params"]),
            rng=jax.random.key_data(state_key),
            ema=fresh["params"] if averaged else {},
        )

    def initialise() -> TrainState:
        return sharding.unbox(boxed())

    abstract = variables.placed(jax.eval_shape(boxed), mesh)
    shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return initialise, abstract, shardings
