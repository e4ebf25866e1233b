"""Reports of a training run: scalars, progress, and pictures of evaluation examples."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import pathlib

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.evaluation.steps import Predicted
from taskexpert_jax.parallel import processes, sharding
from taskexpert_jax.runs.writer import RunWriter
from taskexpert_jax.tasks import Task, panels
from taskexpert_jax.training import optimizer
from taskexpert_jax.training.guard import Guard, batch_ids
from taskexpert_jax.training.state import TrainState
from taskexpert_jax.training.tally import Tally
from taskexpert_jax.training.throughput import Throughput


class Reports:
    """Logs and writes means, throughput and the guard's findings of a run's steps."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        writer: RunWriter,
        throughput: Throughput,
        train_batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
        mesh: Mesh,
    ):
        def ids(step: int) -> list[str]:
            batch = next(iter(train_batches(step - 1)))
            return batch_ids(batch, processes.batch_rows(mesh, config.batch_size).own)

        self._guard = Guard(config, workdir, ids, active=jax.process_index() == 0)
        self._writer, self._throughput = writer, throughput
        self._rate = optimizer.learning_rate(config)

    @functools.partial(jax.profiler.annotate_function, name="reporting")
    def write(self, step: int, tally: Tally) -> None:
        """Writes and logs the means of the steps since the last report; raises NotFinite as `Guard.check`."""
        host = jax.device_get(tally)
        count = float(host.sums["steps"])
        if count:
            means = {name: float(value) / count for name, value in host.sums.items() if name != "steps"}
            scalars = {f"train/{name}": value for name, value in means.items()}
            scalars["train/learning_rate"] = self._rate_at(step - 1)
            scalars["train/images_per_second"] = self._throughput.images_per_second(step)
            self._writer.scalars(step, scalars)
            logging.info(self._throughput.line(step, means))
        self._guard.check(host, self._rate_at)

    def _rate_at(self, step: int) -> float:
        return float(jnp.asarray(self._rate(step)))


def draw_examples(
    predict_step: Callable[..., Predicted],
    state: TrainState,
    tasks: tuple[Task, ...],
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    count: int,
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """Prediction above ground truth for the first `count` evaluation examples: title -> (H, W, 3) uint8.

    With several processes, the first one draws those of its own rows; the others take part and return nothing.
    """
    if not count:
        return {}
    batch = next(iter(eval_batches()))
    (on_devices,) = sharding.to_devices([batch], mesh)
    predicted = predict_step(state.variables(), on_devices).values
    if jax.process_index():
        return {}
    own = processes.batch_rows(mesh, len(on_devices["mask"])).own  # predictions are those of all processes
    values = {name: of[own] for name, of in jax.device_get(predicted).items()}
    pictures = {}
    for i in range(min(count, int(batch["mask"].sum()))):
        top, left, height, width = batch["window"][i]
        rows, columns = slice(top, top + height), slice(left, left + width)
        pictures[f"prediction/{i}"] = np.asarray(
            panels.comparison(
                batch["image"][i, rows, columns],
                tasks,
                {task.name: values[task.name][i, rows, columns] for task in tasks},
                {task.name: task.label_values(batch[task.name][i, rows, columns]) for task in tasks},
            )
        )
    return pictures
