"""Orbax checkpoints of a run: saved in the background, verified, restored strictly; keeps the latest two and the best.

A checkpoint has the items `params` (parameters, their moving average if any, and batch statistics: all that evaluation
needs), `train` (optimiser state, step, random key), `data` (position in the data; version of the code) and `config`.
"""

from collections.abc import Mapping, Sequence
import contextlib
import errno
import itertools
import math
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from taskexpert_jax import installation, storage
from taskexpert_jax.errors import StoreError, UserError, disk_refusal, refused_by_disk
from taskexpert_jax.parallel import processes
from taskexpert_jax.runs import manager, saving, sealing, tree
from taskexpert_jax.runs.tree import Tree
from taskexpert_jax.runs.workdir import Hold, Locked
from taskexpert_jax.tasks import Task


class Restored(NamedTuple):
    """The checkpoint that a run resumes from; evaluated: it includes the metrics of its step."""

    items: dict[str, dict[str, Tree]]
    step: int
    evaluated: bool


class Checkpoints:
    """The checkpoints of one run's directory.

    Args:
      workdir: the run's directory; checkpoints are in its `checkpoints/`.
      best: the task whose main metric selects the best checkpoint.
      hold: what this process holds of the workdir; if that is lost, nothing more is written.
      read_only: for evaluation and prediction; the checkpoints must exist.
    """

    def __init__(self, workdir: pathlib.Path, best: Task, *, hold: Hold | None = None, read_only: bool = False):
        self.path = workdir.absolute() / "checkpoints"
        self._best_key = f"{best.name}/{best.main_metric}"
        self._read_only = read_only
        if read_only and not self.path.is_dir():
            raise UserError(f"no checkpoints in {workdir}: train first, or give the --workdir of a finished run")
        if not read_only:
            if earlier := sorted((self.path.parent / "replaced").glob("[0-9]*")):
                raise UserError(
                    f"{earlier[0]} is a checkpoint that an earlier version was about to replace: move it to "
                    f"{self.path} (replacing one there without {sealing.MANIFEST}), and start again"
                )
            if self._first_process:
                for what in sealing.remove_unfinished(self.path):
                    logging.info(f"{what} was being written when the run ended: removed")
            processes.gather(None)  # all processes wait for the removal
        self._manager = manager.for_run(
            self.path, self._best_key, higher_is_better=best.higher_is_better, create=not read_only
        )
        self._saver = saving.Saver(self.path, self._manager, hold or Locked())
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(manager.quiet_late_writes())

    @property
    def _first_process(self) -> bool:
        return jax.process_index() == 0

    def save(
        self,
        step: int,
        items: Mapping[str, Tree],
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts saving; returns when the arrays have been copied to the host.

        If the step has been saved before, by a run that was preempted before its evaluation, only the metrics are
        added.

        Args:
          step: number of steps done.
          items: `params` and `train`, trees of arrays.
          config: the run's config, as plain dicts.
          metrics: metrics of the evaluation at this step, or None. Only checkpoints whose metric is finite can be the
            best; it is NaN if no label of the task was evaluated, or if a prediction was NaN or Inf.

        Raises:
          UserError: as `Saver.save`.
        """
        best = math.nan if metrics is None else metrics[self._best_key]
        numbers = {self._best_key: best} if math.isfinite(best) else {}
        record = {"next_batch": step, "evaluated": metrics is not None, "version": installation.version_text()}
        args = ocp.args.Composite(
            **{item: ocp.args.StandardSave(items[item]) for item in manager.TREES},
            data=ocp.args.JsonSave(record),
            config=ocp.args.JsonSave(dict(config)),
        )
        self._saver.save(step, args, None if metrics is None else numbers)

    def wait(self) -> None:
        """Waits until the last checkpoint is complete and sealed; raises UserError if it cannot be written."""
        self._saver.wait()

    @property
    def best(self) -> int | None:
        """The step with the best metric of `checkpoint.best_task`; None if none has a finite one."""
        return self._manager.best(self._best_key)

    @property
    def latest(self) -> int | None:
        """The newest saved step, verified or not; None if there is none."""
        return self._manager.latest_step()

    def restore_newest(self, abstract: Mapping[str, Tree]) -> Restored | None:
        """Restores the newest intact checkpoint, with the shardings of `abstract`; None if nothing was ever saved.

        Newer checkpoints that are damaged are reported, one line each, and moved to WORKDIR/damaged. So is one that was
        not sealed when the run was killed, because its bytes cannot be verified.

        Raises:
          UserError: no checkpoint is intact, or the newest intact one does not fit (see `restore`).
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        restored, problems = self._newest_good(steps, abstract)
        if restored is None:
            if not steps:
                return None
            each = "; ".join(f"{step} {problem}" for step, problem in problems.items())
            raise UserError(
                f"no checkpoint in {self.path} is intact ({each}); restore the files, or use another --workdir"
            )
        followers = dict(itertools.pairwise(steps))
        for step, problem in problems.items():
            self._set_aside(step, problem, f", and the run falls back to step {followers[step]}")
        # Checkpoints with unreadable metrics are moved too: one may be the best, and the manager would delete it.
        older = [step for step in steps if step < restored.step] if self._first_process else []
        unreadable = processes.gather(self._damaged_metrics(older))[0]
        for step, problem in unreadable.items():
            self._set_aside(step, f"is damaged: {problem}", "")
        if problems or unreadable:
            processes.gather(None)  # all processes wait until they have been moved
            self._manager.reload()
        return restored

    def _newest_good(
        self, steps: Sequence[int], abstract: Mapping[str, Tree]
    ) -> tuple[Restored | None, dict[int, str]]:
        """The first intact one of `steps`, restored, and the problems of those before it."""
        own = [step for step in steps if sealing.sealed(self.path / str(step))] if self._first_process else []
        sealed = processes.gather(own)[0]
        problems = {}
        for step in steps:
            restored = self._restore_good(step, abstract, sealed)
            if isinstance(restored, Restored):
                return restored, problems
            problems[step] = restored
        return None, problems

    def _set_aside(self, step: int, problem: str, then: str) -> None:
        if self._first_process:
            with refused_by_disk(self._saver.refusal):
                where = sealing.set_aside(self.path / str(step), self.path.parent / "damaged")
            logging.warning(f"checkpoint {step} {problem}; it is now {where}{then}")

    def _damaged_metrics(self, steps: Sequence[int]) -> dict[int, str]:
        found = {}
        for step in steps:
            folder = self.path / str(step)
            if problem := sealing.problem(folder, "metrics"):
                found[step] = problem
            elif sealing.METRICS in sealing.unlisted(folder, "metrics"):
                found[step] = f"{sealing.METRICS} is not in {sealing.MANIFEST}"
        return found

    def _restore_good(self, step: int, abstract: Mapping[str, Tree], sealed: Sequence[int]) -> Restored | str:
        """Restores a checkpoint, or returns its problem; the result is the same in all processes."""
        folder = self.path / str(step)
        if step in sealed:
            found = sealing.problem(folder) if self._first_process else None
            if problem := processes.gather(found)[0]:
                return f"is damaged: {problem}"
            if self._first_process and (others := sealing.unlisted(folder)):
                logging.warning(
                    f"checkpoint {step} was not written with {', '.join(others)}: not in {sealing.MANIFEST}"
                )
            added = self._first_process and sealing.has(folder, sealing.METRICS)
            evaluated = processes.gather(added)[0] or self._evaluated(step)
            return Restored(self.restore(step, abstract), step, evaluated)
        if sealed:
            return "had not been sealed when the run ended"
        # A run's first checkpoint, or one of a version without seals: intact if all of it can be read.
        restored, problem = None, None
        try:
            self._read_records(step)
            restored = Restored(self.restore(step, abstract), step, self._evaluated(step))
        except UserError:
            raise
        except Exception as error:
            self._refuse_unanswered(error)
            problem = f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        first = next((text for text in processes.gather(problem) if text), None)
        if first is None and self._first_process:
            sealing.seal(folder)
        return restored if restored is not None and first is None else str(first)

    def _refuse_unanswered(self, error: Exception) -> None:
        """Raises StoreError if an error of Orbax is the store's, which says nothing about a checkpoint."""
        reason = disk_refusal(error) if storage.is_bucket(self.path) else None
        if reason and "NOT_FOUND" not in reason:  # a missing object is damage
            raise StoreError(errno.EIO, reason, str(self.path)) from error

    def _evaluated(self, step: int) -> bool:
        items = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        return items["data"].get("evaluated", True)  # older checkpoints do not have this field

    def _read_records(self, step: int) -> None:
        """Reads everything except the arrays (lists of arrays, config, metrics); raises an error if it cannot."""
        lists = self._manager.item_metadata(step)
        for item in manager.TREES:
            if not tree.arrays(lists[item]):
                raise ValueError(f"the list of arrays of `{item}` is missing")
        self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        if (self.path / str(step) / "metrics").exists() and self._manager.metrics(step) is None:
            raise ValueError("its metrics cannot be read")
        if problem := sealing.renamed(self.path / str(step)):
            raise ValueError(problem)

    def select(self, which: str) -> int:
        """Resolves `best`, `latest` or a number to a step; `best` is the latest if no checkpoint has a finite metric.

        Raises:
          UserError: no such checkpoint; the message lists the existing steps. Or `best` is unknown because the metrics
            of a checkpoint are damaged.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"no checkpoint in {self.path}: train first, or give the --workdir of a finished run")
        if which == "latest":
            return steps[-1]
        if which == "best":
            for step, problem in self._damaged_metrics(steps).items():
                rest = f"the best checkpoint is unknown; use --checkpoint=latest or one of {steps}"
                raise UserError(f"checkpoint {self.path}/{step} is damaged: {problem}; {rest}")
            if self.best is None:
                logging.warning(
                    f"no checkpoint has a finite {self._best_key} to be the best by: step {steps[-1]} is used"
                )
            return steps[-1] if self.best is None else self.best
        if which in map(str, steps):
            return int(which)
        raise UserError(f"--checkpoint={which}: not in {self.path}; use best, latest or one of {steps}")

    def _refuse_damaged(self, step: int) -> None:
        # Only the files that evaluation reads, a third of a checkpoint with Adam's moments.
        folder = self.path / str(step)
        parts = ("params", "config", "metrics", sealing.METADATA)
        if problem := sealing.problem(folder, *parts) or sealing.renamed(folder):
            raise self._damaged(step, problem)

    def _damaged(self, step: int, problem: str) -> UserError:
        others = [other for other in sorted(self._manager.all_steps()) if other != step]
        rest = f"; use --checkpoint with one of {others}" if others else ""
        return UserError(f"checkpoint {self.path}/{step} is damaged: {problem}{rest}")

    def _saved(self, step: int, item: str) -> Tree:
        """Names, shapes and dtypes of the arrays of an item."""
        try:
            return self._manager.item_metadata(step)[item]
        except Exception as error:  # Orbax raises anything on what it cannot read
            self._refuse_unanswered(error)
            found = sealing.problem(self.path / str(step))
            raise self._damaged(step, found or f"its `{item}` cannot be read") from error

    def restore(self, step: int, abstract: Mapping[str, Tree]) -> dict[str, dict[str, Tree]]:
        """Restores the items of `step` with the shardings of `abstract`; raises UserError if anything does not fit."""
        for item in manager.TREES:
            self._check(step, item, abstract[item])
        items = {item: ocp.args.StandardRestore(abstract[item]) for item in manager.TREES}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {item: restored[item] for item in manager.TREES}

    def restore_variables(self, step: int, abstract: Mapping[str, Tree]) -> dict[str, Tree]:
        """Restores parameters (averaged if the run has them) and batch statistics, without the optimiser state.

        Args:
          step: a saved step.
          abstract: `params` and `batch_stats` with shardings; arrays are cast to its float dtypes.

        Raises:
          UserError: the checkpoint is damaged or does not fit.
        """
        self._refuse_damaged(step)
        averaged = {"ema": abstract["params"]} if "ema" in self._saved(step, "params") else {}
        expected = {**abstract, **averaged}
        self._check(step, "params", expected, cast=True)
        items = ocp.args.Composite(params=ocp.args.StandardRestore(expected))
        restored = self._manager.restore(step, args=items)["params"]
        return {"params": restored.get("ema", restored["params"]), "batch_stats": restored["batch_stats"]}

    def restore_parameters(self, step: int) -> Tree:
        """Restores parameters (averaged if the run has them) as host arrays in their saved shapes."""
        self._refuse_damaged(step)
        saved = self._saved(step, "params")
        # NumPy targets keep the arrays on the host, because this process may have other devices than the run.
        hosts = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), saved, is_leaf=lambda x: hasattr(x, "shape")
        )
        items = ocp.args.Composite(params=ocp.args.StandardRestore(hosts))
        restored = self._manager.restore(step, args=items)["params"]
        return restored.get("ema", restored["params"])

    def _check(self, step: int, item: str, expected: Tree, *, cast: bool = False) -> None:
        """Raises UserError if names, shapes or dtypes of an item differ, so that nothing is restored partially.

        cast: treats all float dtypes as equal.
        """
        lines, count = tree.differences(self._saved(step, item), expected, cast=cast)
        if lines:
            raise UserError(
                f"checkpoint {self.path}/{step} does not fit this config's model ({len(lines)} of "
                f"{count} arrays of `{item}` differ); use the config of its run:{tree.listed(lines)}"
            )

    def close(self) -> None:
        """Waits for the last save and releases the manager; raises UserError if it cannot be written."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception) if self._saver.gone else contextlib.nullcontext():
                self._manager.close()
            self._saver.close(clear=not self._read_only)
            self._quiet.close()


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The saved steps of a run, oldest first; empty if the directory does not exist."""
    return saving.saved_steps(workdir.absolute() / "checkpoints")
