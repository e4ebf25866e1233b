"""Uncertainty weighting: each task's noise is learned with the model (Kendall, Gal and Cipolla, CVPR 2018)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from taskexpert_jax.tasks import Task
from taskexpert_jax.training.balancing.method import Balancing, Tree


class Uncertainty(Balancing):
    """Minimises the sum of a_t exp(-s_t) L_t + s_t / 2 over the model and s = log sigma^2.

    That is L / (2 sigma^2) + log sigma for regression, a = 1/2, and L / sigma^2 + log sigma for classification, a = 1.
    s starts at 0 and follows Adam with a constant rate of its own, without weight decay.

    scales: a of each task.
    """

    def __init__(self, scales: tuple[float, ...], learning_rate: float):
        self._scales = scales
        self._adam = optax.adam(learning_rate)

    def init(self) -> Tree:
        log_variances = jnp.zeros(len(self._scales))
        return {"log_variances": log_variances, "optimizer": self._adam.init(log_variances)}

    def weights(self, state: Tree, losses: jax.Array) -> jax.Array:
        del losses
        return jnp.array(self._scales) * jnp.exp(-state["log_variances"])

    def updated(self, state: Tree, losses: jax.Array) -> Tree:
        gradient = 0.5 - self.weights(state, losses) * losses
        change, moments = self._adam.update(gradient, state["optimizer"])
        return {"log_variances": optax.apply_updates(state["log_variances"], change), "optimizer": moments}


def from_config(config: ConfigDict, tasks: tuple[Task, ...]) -> Uncertainty:
    """The method with `config.uncertainty`."""
    scales = tuple(1.0 if task.kind.categorical else 0.5 for task in tasks)
    return Uncertainty(scales, config.uncertainty.learning_rate)
