"""NaN/Inf and spike guard: records offending steps with what is needed to reproduce them, and may stop the run."""

from collections.abc import Callable, Mapping
import json
import pathlib

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import files
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import processes
from taskexpert_jax.runs.writer import writing
from taskexpert_jax.training.tally import Tally

_DECAY = 0.9  # decay of the running mean of the loss, per report


class NotFinite(UserError):
    """Raised when a run has met more NaN/Inf steps than it may skip."""


class Guard:
    """Checks each tally (`tally.Tally`, on the host) as it is reported.

    A step whose loss or gradient is NaN or Inf is never applied. Up to `guard.skip_steps` of them are skipped; the next
    one stops the run with the state before it. Each is described in WORKDIR/not_finite/STEP.json. A loss above
    `guard.spike_factor` times the running mean is logged and appended to WORKDIR/spikes.jsonl.

    Args:
      config: the run's config.
      workdir: the run's directory.
      ids: step -> ids of the examples of its batch; called by all processes alike.
      active: whether this process writes files.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        ids: Callable[[int], list[str]],
        *,
        active: bool = True,
    ):
        self._config, self._workdir, self._ids, self._active = config, workdir, ids, active
        self._skipped = 0
        self._mean: float | None = None

    def check(self, tally: Tally, learning_rate: Callable[[int], float]) -> None:
        """Reports NaN/Inf steps and spikes.

        Args:
          tally: of the steps since the last call, on the host.
          learning_rate: step -> its learning rate.

        Raises:
          NotFinite: more NaN/Inf steps than `guard.skip_steps`; the state is the one before the last of them.
        """
        self._spike(tally)
        steps = [int(step) for step in tally.skipped_steps if step]
        described = []
        for i, step in enumerate(steps):
            tasks = [name for name, broken in tally.skipped_tasks.items() if broken[i]]
            path = self._describe(step, tasks, learning_rate(step - 1))
            what = f"the loss of {', '.join(tasks)}" if tasks else "the gradient, though not the loss,"
            described.append(f"step {step}: {what} is NaN or Inf ({path})")
        new = int(tally.skipped) - self._skipped
        self._skipped = int(tally.skipped)
        limit = self._config.guard.skip_steps
        if self._skipped > limit:
            so_far = f"; {limit} NaN/Inf steps were skipped before" if limit else ""
            raise NotFinite(
                f"{described[-1]}{so_far}. The run has stopped with the state before that step and repeats it when "
                "started again; --config.guard.skip_steps=N skips N such steps, a lower "
                "--config.optimizer.learning_rate or --config.dtype=float32 in another --workdir may avoid them"
            )
        for line in described:
            logging.warning(f"{line}; skipped, {self._skipped} of at most {limit}")
        if new > len(described):
            logging.warning(f"{new - len(described)} further NaN/Inf steps were skipped")

    def _describe(self, step: int, tasks: list[str], learning_rate: float) -> pathlib.Path:
        """Writes everything that the step depended on except the parameters."""
        path = self._workdir / "not_finite" / f"{step}.json"
        found = {
            "step": step,
            "tasks": tasks,
            "ids": self._ids(step),
            "seed": self._config.seed,
            "learning_rate": learning_rate,
            "dtype": self._config.dtype,
        }
        if self._active:
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(found, indent=2) + "\n")
        return path

    def _spike(self, tally: Tally) -> None:
        steps, peak = float(tally.sums["steps"]), float(tally.peak)
        if not steps:
            return
        mean = float(tally.sums["loss"]) / steps
        factor = self._config.guard.spike_factor
        if self._mean is None:
            self._mean = mean
            return
        if factor and peak > factor * self._mean:
            step = int(tally.peak_step)
            line = {"step": step, "loss": peak, "mean": self._mean, "ids": self._ids(step)}
            logging.warning(f"step {step}: loss {peak:.4g} is {peak / self._mean:.3g} times the mean before")
            if self._active:
                path = self._workdir / "spikes.jsonl"
                with writing(path):
                    files.append(path, json.dumps(line) + "\n")
        self._mean = _DECAY * self._mean + (1 - _DECAY) * mean


def batch_ids(batch: Mapping[str, np.ndarray], rows: np.ndarray) -> list[str]:
    """Ids of the examples of a global batch, gathered from all processes; [] for batches without ids.

    Args:
      batch: this process's rows, with `id` (b,) str.
      rows: their indices in the global batch (b,).
    """
    if "id" not in batch:
        return []
    own = dict(zip(rows.tolist(), batch["id"].tolist(), strict=True))
    everywhere = {row: name for part in processes.gather(own) for row, name in part.items()}
    return [everywhere[row] for row in sorted(everywhere)]
