"""Task records, and the kinds of value, losses, metrics and drawings they use."""

from taskexpert_jax.tasks.task import NAMES, Headline, Published, Task, best_task, build, from_config, headline

__all__ = ["NAMES", "Headline", "Published", "Task", "best_task", "build", "from_config", "headline"]
