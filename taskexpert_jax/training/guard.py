"""What a run does about steps that went wrong: it names them, with what is needed to see them again, and may stop."""

from collections.abc import Callable, Mapping
import json
import pathlib

from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import processes
from taskexpert_jax.runs.writer import writing
from taskexpert_jax.training.tally import Tally

_REMEMBERED = 0.9  # share of the running mean that the next report's mean does not replace


class NotFinite(UserError):
    """A run has met more steps that are not finite than it may leave out."""


class Guard:
    """Looks at each tally (`tally.Tally`, on the host) as it is reported.

    A step whose loss or gradient is not finite is never applied. `guard.skip_steps` of them are left out; with the next
    one the state stays as it was before it, and `problem` says so. Each is described in WORKDIR/not_finite/STEP.json.
    A loss above `guard.spike_factor` times the running mean is printed and added to WORKDIR/spikes.jsonl.

    Args:
      config: the whole config.
      workdir: the run's directory.
      ids: step -> ids of the examples of its batch; called by all processes alike.
      active: False in all but one process of a run: then nothing is written.
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
        self._left_out = 0
        self._mean: float | None = None

    def check(self, tally: Tally, learning_rate: Callable[[int], float]) -> None:
        """Reports what is out of the ordinary.

        Args:
          tally: of the steps since the last call, fetched from the devices.
          learning_rate: step -> its learning rate.

        Raises:
          NotFinite: more steps than `guard.skip_steps` were not finite; the last one was not gone beyond.
        """
        self._spike(tally)
        steps = [int(step) for step in tally.left_out_steps if step]
        described = []
        for i, step in enumerate(steps):
            tasks = [name for name, broken in tally.left_out_tasks.items() if broken[i]]
            path = self._describe(step, tasks, learning_rate(step - 1))
            what = f"the loss of {', '.join(tasks)}" if tasks else "the gradient, though not the loss,"
            described.append(f"step {step}: {what} is not finite ({path})")
        new = int(tally.left_out) - self._left_out
        self._left_out = int(tally.left_out)
        limit = self._config.guard.skip_steps
        if self._left_out > limit:
            so_far = f"; {limit} such steps were left out before" if limit else ""
            raise NotFinite(
                f"{described[-1]}{so_far}. The run has stopped with the state before that step, and repeats it when "
                "started again; --config.guard.skip_steps=N leaves out N such steps, a lower "
                "--config.optimizer.learning_rate or --config.dtype=float32 in another --workdir may avoid them"
            )
        for line in described:
            print(f"warning: {line}; left out, as {self._left_out} of at most {limit}", flush=True)
        if new > len(described):
            print(f"warning: {new - len(described)} further such steps were left out", flush=True)

    def _describe(self, step: int, tasks: list[str], learning_rate: float) -> pathlib.Path:
        """Writes down all that the step depended on but the parameters."""
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
            print(f"warning: step {step}: loss {peak:.4g} is {peak / self._mean:.3g} times the mean before", flush=True)
            if self._active:
                path = self._workdir / "spikes.jsonl"
                with writing(path), path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
        self._mean = _REMEMBERED * self._mean + (1 - _REMEMBERED) * mean


def batch_ids(batch: Mapping[str, np.ndarray], rows: np.ndarray) -> list[str]:
    """Ids of the examples of a global batch, of which each process has given its own rows; [] where it has no ids.

    Args:
      batch: this process's part, with `id` (b,) str.
      rows: their places in the global batch (b,).
    """
    if "id" not in batch:
        return []
    own = dict(zip(rows.tolist(), batch["id"].tolist(), strict=True))
    everywhere = {row: name for part in processes.gather(own) for row, name in part.items()}
    return [everywhere[row] for row in sorted(everywhere)]
