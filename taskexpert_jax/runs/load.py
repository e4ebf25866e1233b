"""Loads a trained model from its run's directory or from a released folder, without the optimiser state."""

import contextlib
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from taskexpert_jax.config import check
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.models.variables import abstract_variables
from taskexpert_jax.parallel import processes
from taskexpert_jax.runs import released
from taskexpert_jax.runs.config import FREE_TO_LOAD, check_checkpoint
from taskexpert_jax.tasks import Task, best_task, from_config


class Selected(NamedTuple):
    """Checkpoint that was loaded.

    which: "best", "latest" or a step, as asked for, but "latest" if there is no best; "released" for a released folder.
    """

    step: int
    which: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.which})"


def load(config: ConfigDict, workdir: pathlib.Path, which: str, mesh: Mesh) -> tuple[MultiTaskModel, Any, Selected]:
    """Loads (model, variables on the mesh, selected checkpoint) of a run, without the optimiser state.

    Its scans are unrolled only with `config.model.unroll=yes`: in inference that saves no time, and it takes twice as
    long to compile.

    Args:
      config: the run's config.
      workdir: the run's directory, or a released folder.
      which: "best", "latest" or a step; of a released folder, all three are its only step.
      mesh: mesh for the variables.

    Raises:
      UserError: an invalid config, or a checkpoint that is missing, damaged or does not fit.
    """
    check(config)
    tasks = from_config(config)
    scanned = config.copy_and_resolve_references()
    scanned.model.unroll = "yes" if config.model.unroll == "yes" else "no"
    model = taskexpert.from_config(scanned, tasks)
    abstract = abstract_variables(model, mesh)
    abstract["params"] = jax.tree.map(lambda leaf: leaf.update(dtype=config.eval.params_dtype), abstract["params"])
    if released.is_released(workdir):
        variables, facts = released.restore_variables(workdir, which, abstract, config, FREE_TO_LOAD)
        selected = Selected(facts.step, "released")
    else:
        variables, selected = _from_checkpoint(config, workdir, which, abstract, tasks)
    if selected.step > config.num_steps:
        logging.warning(
            f"checkpoint {selected.step} is beyond config.num_steps={config.num_steps}: this run did not write it"
        )
    return model, variables, selected


def _from_checkpoint(
    config: ConfigDict, workdir: pathlib.Path, which: str, abstract: dict[str, Any], tasks: tuple[Task, ...]
) -> tuple[dict[str, Any], Selected]:
    from taskexpert_jax.runs.checkpoints import Checkpoints  # imports Orbax, which a released folder does not need

    best = best_task(tasks, config.checkpoint.best_task)
    with contextlib.closing(Checkpoints(workdir, best, read_only=True)) as checkpoints:
        step = processes.gather(checkpoints.select(which))[0]  # a run in training may save one between two listings
        variables = checkpoints.restore_variables(step, abstract)
        check_checkpoint(workdir, step, config)
        if which == "best" and checkpoints.best is None:
            which = "latest"
    return variables, Selected(step, which)
