"""Dynamic weight average: tasks whose losses fall slowly weigh more (Liu, Johns and Davison, CVPR 2019)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from taskexpert_jax.tasks import Task
from taskexpert_jax.training.balancing.method import Balancing, Tree


class DynamicWeightAverage(Balancing):
    """Weights T softmax(r / temperature), r the ratio of a task's mean losses in the last two complete windows.

    A window is a number of steps; the paper's is an epoch. All weights are 1 until two windows are complete. Skipped
    steps count in no window.
    """

    def __init__(self, tasks: int, window: int, temperature: float):
        self._tasks, self._window, self._temperature = tasks, window, temperature

    def init(self) -> Tree:
        zeros = jnp.zeros(self._tasks)
        counts = {"steps": jnp.zeros((), jnp.int32), "windows": jnp.zeros((), jnp.int32)}
        return {"sums": zeros, "last": zeros, "before": zeros, **counts}

    def weights(self, state: Tree, losses: jax.Array) -> jax.Array:
        del losses
        ratios = state["last"] / jnp.maximum(state["before"], jnp.finfo(jnp.float32).tiny)
        ratios = jnp.minimum(ratios, jnp.finfo(jnp.float32).max)  # a mean loss of 0 before
        balanced = self._tasks * jax.nn.softmax(ratios / self._temperature)
        return jnp.where(state["windows"] >= 2, balanced, 1.0)

    def updated(self, state: Tree, losses: jax.Array) -> Tree:
        sums, steps = state["sums"] + losses, state["steps"] + 1
        complete = steps == self._window
        return {
            "sums": jnp.where(complete, 0.0, sums),
            "last": jnp.where(complete, sums / self._window, state["last"]),
            "before": jnp.where(complete, state["last"], state["before"]),
            "steps": jnp.where(complete, 0, steps),
            "windows": jnp.minimum(state["windows"] + complete, 2),
        }


def from_config(config: ConfigDict, tasks: tuple[Task, ...]) -> DynamicWeightAverage:
    """The method with `config.dwa`."""
    return DynamicWeightAverage(len(tasks), config.dwa.window, config.dwa.temperature)
