"""Task balancing: what `config.balancing` names. docs/balancing.md describes the methods and adds one."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.tasks import Task
from taskexpert_jax.training.balancing import dwa, famo, pcgrad, uncertainty
from taskexpert_jax.training.balancing.method import Balancing

METHODS: Mapping[str, Callable[[ConfigDict, tuple[Task, ...]], Balancing]] = {
    "fixed": lambda config, tasks: Balancing(),
    "uncertainty": uncertainty.from_config,
    "dwa": dwa.from_config,
    "pcgrad": pcgrad.from_config,
    "famo": famo.from_config,
}


def from_config(config: ConfigDict, tasks: tuple[Task, ...]) -> Balancing:
    """The method that `config.balancing` names.

    Raises:
      UserError: there is none of this name.
    """
    if config.balancing not in METHODS:
        raise UserError(
            f"config.balancing={shown(config.balancing)}: choose one of {', '.join(METHODS)}; docs/balancing.md adds "
            "others"
        )
    return METHODS[config.balancing](config, tasks)
