"""A trained model from its run's directory, without its optimiser."""

import contextlib
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from taskexpert_jax.config import check
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.tasks import Task, from_config
from taskexpert_jax.training import optimizer
from taskexpert_jax.training import state as train_state

def best_task(config: ConfigDict, tasks: tuple[Task, ...]) -> Task:
    """The task that decides which checkpoint is the best."""
    return next(task for task in tasks if task.name == config.checkpoint.best_task)


def load(config: ConfigDict, workdir: pathlib.Path, which: str, mesh: Mesh) -> tuple[TaskExpert, Any, int]:
    """(model, variables on the mesh, step) of a run's checkpoint, without its optimiser.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      mesh: where the variables go.

    Raises:
      UserError: an invalid config, or a checkpoint that is not there, is damaged or does not fit.
    """
    check(config)
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    averaged = config.optimizer.ema_decay > 0
    _, abstract, _ = train_state.abstract_and_shardings(
        model, optimizer.build(config), mesh, config.seed, averaged=averaged
    )
    params = jax.tree.map(lambda leaf: leaf.update(dtype=config.eval.params_dtype), (abstract.params, abstract.ema))
    abstract = abstract.replace(params=params[0], ema=params[1])
    with contextlib.closing(Checkpoints(workdir, best_task(config, tasks), read_only=True)) as checkpoints:
        step = checkpoints.select(which)
        variables = checkpoints.restore_variables(step, abstract)
    return model, variables, step
