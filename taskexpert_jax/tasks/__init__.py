"""Tasks: the records, and the kinds of value, losses and metrics that they name."""

from taskexpert_jax.tasks.task import NAMES, Published, Task, best_task, build, from_config

__all__ = ["NAMES", "Published", "Task", "best_task", "build", "from_config"]
