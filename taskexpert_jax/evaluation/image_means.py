"""Means of metrics over images, for the numbers of papers that average images or batches instead of pixels."""

from collections.abc import Sequence
import math

from taskexpert_jax.parallel import processes
from taskexpert_jax.tasks import Task
from taskexpert_jax.tasks.metrics import PooledMetric

SUFFIX = "_images"  # of the metric's name


class ImageMeans:
    """Values of `Task.image_means` of each image of this process with a valid label."""

    def __init__(self, tasks: Sequence[Task]):
        self._values: dict[str, dict[str, list[float]]] = {
            task.name: {metric: [] for metric in task.image_means} for task in tasks
        }

    def add(self, task: str, state: PooledMetric) -> None:
        """Adds the metric state of one image; a value that is NaN, without valid pixels, counts nowhere."""
        of_task = self._values[task]
        found = state.compute() if of_task else {}
        for metric, values in of_task.items():
            if not math.isnan(found[metric]):
                values.append(found[metric])

    def results(self) -> dict[str, float]:
        """`task/metric_images` -> mean over the images of all processes; NaN without any."""
        means = {}
        for task, metrics in self._values.items():
            for metric, own in metrics.items():
                values = [value for of_process in processes.gather(own) for value in of_process]
                means[f"{task}/{metric}{SUFFIX}"] = math.fsum(values) / len(values) if values else math.nan
        return means
