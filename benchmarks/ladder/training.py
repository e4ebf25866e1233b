"""One rung: its programs, compiled once for all seeds, and a run of them over a seed's batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from benchmarks.ladder.feeding import Feeder, one_ahead
from taskexpert_jax.config import check
from taskexpert_jax.evaluation import full_pass, inference, results
from taskexpert_jax.models import budget
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.pretrained import load as pretrained
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import batch_sizes, make_train_step

REPORTS = 40  # points of the curve of losses in a run
SURE = 0.2  # of a run's steps, after which its duration is known well enough to stop one that would not end in time


def inputs(config: ConfigDict) -> tuple[str, ...]:
    """Names of the arrays in a batch that the programs of a config take."""
    return ("image", "window", "mask", *config.tasks)


class Rung:
    """A rung's model and programs on the first device.

    Args:
      config: of `Settings.config`.
      example: a batch of the evaluation set, for the shapes.

    Raises:
      UserError: a wrong config, or weights that do not fit.
    """

    def __init__(self, config: ConfigDict, example: Mapping[str, np.ndarray]):
        check(config)
        self.config, self.tasks = config, from_config(config)
        self.mesh = sharding.make_mesh(config.mesh, batch_sizes(config), jax.devices()[:1])
        self.model = taskexpert.from_config(config, self.tasks)
        self.size = budget.count(self.model)
        self.weights = pretrained.read(config, self.model)
        tx, averaged = optimizer.build(config, self.model.backbone), config.optimizer.ema_decay > 0
        started = time.monotonic()
        with sharding.use(self.mesh):
            _, abstract, shardings = train_state.abstract_and_shardings(self.model, tx, self.mesh, 0, averaged=averaged)

            def fresh(seed: Any) -> train_state.TrainState:  # one program for all seeds
                of_seed = train_state.abstract_and_shardings(self.model, tx, self.mesh, seed, averaged=averaged)
                return of_seed[0]()

            self.initialise = jax.jit(fresh, out_shardings=shardings).lower(jnp.uint32(0)).compile()
            own = {name: example[name] for name in inputs(config)}
            (batch,) = sharding.to_devices([own], self.mesh)
            step: Any = make_train_step(self.model, tx, config, self.mesh, shardings)
            self.train_step = step.lower(abstract, self._tally(), batch).compile()
            forward = full_pass.model_forward(self.tasks, self.model, inference.make_inference(self.model, config))
            evaluation: Any = full_pass.make_step(self.tasks, forward, config.eval.boundary.quantise, self.mesh)
            totals = jax.device_put(self._totals(), sharding.replicated(self.mesh))
            self.eval_step = evaluation.lower(abstract.variables(), totals, batch).compile()
        self.compile_seconds = time.monotonic() - started

    def _tally(self) -> tally.Tally:
        return jax.device_put(tally.empty(self.tasks), sharding.replicated(self.mesh))

    def _totals(self) -> full_pass.Totals:
        return full_pass.empty_totals(self.tasks, self.model, single=True)

    def state(self, seed: int) -> train_state.TrainState:
        """The state before the first step."""
        state = self.initialise(jnp.uint32(seed))
        if self.weights is not None:
            state = state.replace(params=self.weights.placed(state.params), ema=self.weights.placed(state.ema))
        return state

    def evaluate(self, state: Any, batches: Iterable[Mapping[str, np.ndarray]], *, odsf: bool) -> dict[str, Any]:
        """Metrics and gates of this state, in the form of a metrics.json.

        odsf: the whole evaluation, with the boundary benchmark; else the sums on the device alone, without the work on
          the host for each example.
        """
        own = ({name: batch[name] for name in (*inputs(self.config), "id")} for batch in batches)
        totals, variables = self._totals(), state.variables()
        if odsf:
            benchmark = self.config.eval.boundary
            found = full_pass.run_step(benchmark, self.tasks, self.eval_step, variables, totals, own, self.mesh)
        else:
            totals = jax.device_put(totals, sharding.replicated(self.mesh))
            for batch in sharding.to_devices(own, self.mesh):
                totals, _ = self.eval_step(variables, totals, batch)
            totals = jax.device_get(totals)
            found = full_pass.Pass(0, totals, {}, {}, {}, results.nonfinite(self.tasks, totals.metrics))
        content = results.to_json(found.evaluation(self.tasks, {}, self.model.expert_slots))
        return {name: content[name] for name in ("published", "metrics", "per_class", "gates")}

    def train(
        self,
        seed: int,
        feeder: Feeder,
        eval_batches: Sequence[Mapping[str, np.ndarray]],
        evaluations: int,
        ends: float,
        wrote: Callable[[dict[str, Any]], None],
    ) -> dict[str, Any]:
        """Trains and evaluates a seed; `wrote` gets the record so far after each evaluation.

        evaluations: points of the curve of metrics, the end among them.
        ends: `time.monotonic()` by which the run has to end.

        Returns:
          The record; its `status` is finished, stopped (for want of time) or diverged.
        """
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        run = _Run(self, config, evaluations, ends)
        with sharding.use(self.mesh):
            state, sums = self.state(seed), self._tally()
            batches = one_ahead(feeder.batches(config))
            run.begin()
            try:
                for step, batch in enumerate(sharding.to_devices(batches, self.mesh), start=1):
                    state, sums = self.train_step(state, sums, batch)
                    if step in run.reports:
                        run.report(step, jax.device_get(sums))
                        sums = jax.device_put(sums.restarted(), sharding.replicated(self.mesh))
                    if step in run.evaluations and run.goes_on:
                        run.evaluated(step, state, eval_batches)
                        wrote(run.record)
                    if not run.goes_on:
                        break
            finally:
                batches.close()
        return run.record


class _Run:
    """The record of a run while it is trained."""

    def __init__(self, rung: Rung, config: ConfigDict, evaluations: int, ends: float):
        self._rung, self._config, self._ends = rung, config, ends
        self._steps = config.num_steps
        points = lambda count: {math.ceil(self._steps * (n + 1) / count) for n in range(count)}  # noqa: E731
        self.evaluations = points(min(evaluations, self._steps))
        self.reports = points(min(REPORTS, self._steps)) | self.evaluations
        self._training = self._evaluating = 0.0
        self.record: dict[str, Any] = {"status": "running", "curve": [], "evaluations": []}

    @property
    def goes_on(self) -> bool:
        return self.record["status"] == "running"

    def begin(self) -> None:
        """Starts the clock."""
        self._before = time.monotonic()

    def _took(self) -> float:
        now = time.monotonic()
        taken, self._before = now - self._before, now
        return taken

    def report(self, step: int, sums: tally.Tally) -> None:
        """Adds the mean losses since the last report; stops a run that diverges or would not end in time."""
        self._training += self._took()
        count = float(sums.sums["steps"])
        means = {name: float(value) / count for name, value in sums.sums.items() if name != "steps" and count}
        self.record["curve"].append({"step": step, **means})
        rate = self._training / step
        self.record |= {"steps": step, "train_seconds": self._training, "images_per_s": self._config.batch_size / rate}
        if sums.skipped > self._config.guard.skip_steps:
            self.record |= {"status": "diverged", "reason": f"NaN or Inf at step {int(sums.skipped_steps[0])}"}
            return
        coming = [at for at in self.evaluations if at > step or (at == step and not self._done(at))]
        done = len(self.record["evaluations"])
        needed = rate * (self._steps - step) + len(coming) * (self._evaluating / done if done else 0.0)
        left = self._ends - time.monotonic()
        if left < 0 or (step >= SURE * self._steps and needed > left):
            reason = f"needs {needed:.0f} s more at this rate, and {max(left, 0):.0f} s are left"
            self.record |= {"status": "stopped", "reason": reason}

    def _done(self, step: int) -> bool:
        return any(each["step"] == step for each in self.record["evaluations"])

    def evaluated(self, step: int, state: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Adds an evaluation; the last one finishes the run."""
        last = step == self._steps
        content = self._rung.evaluate(state, batches, odsf=last and self._config.eval.boundary.odsf)
        self._evaluating += self._took()
        self.record["evaluations"].append({"step": step, "metrics": content["metrics"], "gates": content["gates"]})
        self.record["evaluation_seconds"] = self._evaluating
        if last:
            self.record |= {"status": "finished", **content}
