"""FAMO: all losses fall at the same rate, for one backward pass (Liu, Feng, Stone and Liu, NeurIPS 2023)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from taskexpert_jax.tasks import Task
from taskexpert_jax.training.balancing.method import Balancing, Tree


class Famo(Balancing):
    """Weights c z_t / L_t with z = softmax(xi), and c such that they sum to 1: the gradient of c sum z_t log L_t.

    xi follows Adam on the loss decrease: its gradient is J^T (log L(before) - log L(now)) + gamma xi, with J the
    Jacobian of the softmax. The paper computes L(now) on the batch before, in a second forward pass; here it is the
    loss of the present step, on its own batch, so the method costs nothing. On a constant batch both are the same.

    A task with a loss of 0, as without any valid label, is left out of a step. A negative loss gives NaN.
    """

    def __init__(self, tasks: int, learning_rate: float, gamma: float):
        self._tasks = tasks
        self._adam = optax.chain(optax.add_decayed_weights(gamma), optax.adam(learning_rate))

    def init(self) -> Tree:
        xi = jnp.zeros(self._tasks)
        return {
            "xi": xi,
            "optimizer": self._adam.init(xi),
            "log_losses": jnp.zeros(self._tasks),
            "seen": jnp.zeros(self._tasks, bool),
        }

    def weights(self, state: Tree, losses: jax.Array) -> jax.Array:
        xi, _ = self._moved(state, losses)
        zero = losses == 0
        log_weights = jnp.where(zero, -jnp.inf, jax.nn.log_softmax(xi) - jnp.log(jnp.where(zero, 1.0, losses)))
        return jnp.where(jnp.all(zero), 0.0, jax.nn.softmax(log_weights))

    def updated(self, state: Tree, losses: jax.Array) -> Tree:
        xi, moments = self._moved(state, losses)
        zero = losses == 0
        log_losses = jnp.where(zero, state["log_losses"], jnp.log(losses))
        return {"xi": xi, "optimizer": moments, "log_losses": log_losses, "seen": state["seen"] | ~zero}

    def _moved(self, state: Tree, losses: jax.Array) -> tuple[jax.Array, Tree]:
        """xi and its moments after the decrease from the losses before to these; as they are in the first step."""
        known = state["seen"] & (losses != 0)
        decrease = jnp.where(known, state["log_losses"] - jnp.log(losses), 0.0)
        z = jax.nn.softmax(state["xi"])
        change, moments = self._adam.update(z * (decrease - jnp.sum(z * decrease)), state["optimizer"], state["xi"])
        moved = (optax.apply_updates(state["xi"], change), moments)
        any_known = jnp.any(known)
        return jax.tree.map(lambda new, old: jnp.where(any_known, new, old), moved, (state["xi"], state["optimizer"]))


def from_config(config: ConfigDict, tasks: tuple[Task, ...]) -> Famo:
    """The method with `config.famo`."""
    return Famo(len(tasks), config.famo.learning_rate, config.famo.gamma)
