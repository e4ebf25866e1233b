"""Training state: its fields, initialisation on a mesh, and conversion to checkpoint items."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from taskexpert_jax.models import variables
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.tree import Tree
from taskexpert_jax.training.balancing.method import Balancing


class TrainState(struct.PyTreeNode):
    """Everything that a step changes; with the config it is enough to resume a run exactly.

    Attributes:
      step: int32 scalar, number of steps done.
      rng: (2,) uint32 key data; step i draws from fold_in(rng, i).
      ema: moving average of the parameters; {} if `optimizer.ema_decay` is 0.
      balancing: state of the balancing method; {} if it has none.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    rng: jax.Array
    ema: Tree
    balancing: Tree = struct.field(default_factory=dict)

    def variables(self) -> dict[str, Tree]:
        """Variables for evaluation: averaged parameters if the run has them, and batch statistics."""
        return {"params": self.ema or self.params, "batch_stats": self.batch_stats}

    def to_items(self) -> dict[str, dict[str, Tree]]:
        """Converts to the items of a checkpoint: `params`, which evaluation needs, and `train`, the rest."""
        averaged = {"ema": self.ema} if self.ema else {}
        balancing = {"balancing": self.balancing} if self.balancing else {}
        return {
            "params": {"params": self.params, "batch_stats": self.batch_stats, **averaged},
            "train": {"opt_state": self.opt_state, "step": self.step, "rng": self.rng, **balancing},
        }

    @classmethod
    def from_items(cls, items: Mapping[str, Mapping[str, Tree]]) -> "TrainState":
        """Inverse of `to_items`."""
        return cls(**{"ema": {}, **items["params"]}, **items["train"])


def abstract_and_shardings(
    model: MultiTaskModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    *,
    averaged: bool = False,
    balancing: Balancing | None = None,
) -> tuple[Callable[[], TrainState], TrainState, TrainState]:
    """Returns (initialiser, abstract state, its shardings), without allocating arrays.

    The initialiser takes no arguments and returns the unboxed state; jit it with the shardings.
    averaged: adds a moving average of the parameters to the state.
    balancing: adds the state of this method, the same on every device.
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
            balancing=balancing.init() if balancing else {},
        )

    def initialise() -> TrainState:
        return sharding.unbox(boxed())

    abstract = variables.placed(jax.eval_shape(boxed), mesh)
    shardings: Any = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return initialise, abstract, shardings
