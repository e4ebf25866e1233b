"""Task records, and the kinds of value, losses, metrics and drawings they use."""

from taskexpert_jax.tasks.task import NAMES, Published, Task, best_task, build, from_config

__all__ = ["NAMES", "Published", "Task", "best_task", "build", "from_config"]
