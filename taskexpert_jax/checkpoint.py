"""Orbax checkpoints of a run: asynchronous, the latest two and the best kept, checked, restored strictly.

A checkpoint has the items `params` (parameters, their moving average if any, and batch statistics: all that evaluation
needs), `train` (optimiser state, step, random key), `data` (position in the data) and `config`.

  python -m taskexpert_jax.checkpoint WORKDIR      # what is there
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import logging as logging_module
import math
import pathlib
import sys
import threading
import time
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from taskexpert_jax import checkpoint_files, checkpoint_tree, processes
from taskexpert_jax.errors import UserError, disk_refusal
from taskexpert_jax.tasks import Task
from taskexpert_jax.train_state import TrainState, Tree

_SECONDS_BETWEEN_LOOKS = 0.1  # at whether a save is complete
_SECONDS_TO_CLEAR = 1.0


def _worth_logging(record: logging_module.LogRecord) -> bool:
    """Not so: Orbax's warning at every save without an evaluation, and traces of what `Checkpoints` says in a line."""
    refused = record.exc_info is not None and disk_refusal(record.exc_info[1]) is not None
    return not refused and "Requested `tracked_metric`" not in record.getMessage()


logging.get_absl_logger().addFilter(_worth_logging)


class Restored(NamedTuple):
    """What a run goes on from. evaluated: whether the checkpoint has the metrics of an evaluation at its step."""

    state: TrainState
    step: int
    evaluated: bool


class Checkpoints:
    """The checkpoints of one working directory.

    Each is sealed when it is complete (`checkpoint_files`), by a thread, so that training goes on meanwhile.

    Args:
      workdir: the run's directory; checkpoints lie in its `checkpoints/`.
      best: the task by whose main metric the best checkpoint is kept.
      read_only: for evaluation and prediction: the checkpoints must be there already.
    """

    def __init__(self, workdir: pathlib.Path, best: Task, *, read_only: bool = False):
        self.path = workdir.absolute() / "checkpoints"
        self._best_key = f"{best.name}/{best.main_metric}"
        if read_only and not self.path.is_dir():
            raise UserError(f"no checkpoints in {workdir}: train first, or give the --workdir of a finished run")

        def metric(metrics: Mapping[str, float]) -> float:
            return metrics[self._best_key]

        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(2),
                # `max_to_keep` with `best_fn` would delete the newest checkpoint as soon as the metric worsens.
                preservation_policy.BestN(
                    get_metric_fn=metric,
                    reverse=not best.higher_is_better,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=metric,
            best_mode="max" if best.higher_is_better else "min",
            create=not read_only,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "train": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        if not read_only and self._first_process:
            for step in checkpoint_files.remove_unfinished(self.path):
                print(f"step {step} was being written when the run ended: left out", flush=True)
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)
        self._sealing: threading.Thread | None = None
        self._refused = False  # by the disk
        self._hooks = threading.excepthook, sys.unraisablehook
        threading.excepthook, sys.unraisablehook = self._thread_failed, self._unraisable

    @property
    def _first_process(self) -> bool:
        return jax.process_index() == 0

    def save(self, state: TrainState, config: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts saving `state`; returns when it has been copied off the devices.

        A checkpoint of the same step is replaced: that of a run that was told to stop before it could evaluate.

        metrics: the evaluation at this very step, or None; only evaluated checkpoints can be the best, and of those the
          ones whose metric is a number (it is none where no label of the task was evaluated).

        Raises:
          UserError: this checkpoint or the one before it cannot be written.
        """
        step = int(state.step)
        best = math.nan if metrics is None else metrics[self._best_key]
        items = checkpoint_tree.split(state)
        with self._writing():
            self._finish()
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(items["params"]),
                    train=ocp.args.StandardSave(items["train"]),
                    data=ocp.args.JsonSave({"next_batch": step, "evaluated": metrics is not None}),
                    config=ocp.args.JsonSave(dict(config)),
                ),
                metrics=None if math.isnan(best) else {self._best_key: best},
            )
        if self._first_process:
            self._sealing = threading.Thread(target=self._seal, args=(step,), name="checkpoint seal", daemon=True)
            self._sealing.start()

    def wait(self) -> None:
        """Returns when the last checkpoint is complete and sealed; raises UserError where it cannot be written."""
        with self._writing():
            self._finish()

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if self._sealing is not None:
            self._sealing.join()
            self._sealing = None

    def _seal(self, step: int) -> None:
        """Seals a checkpoint as soon as it is complete; one that never is, or goes at once, is left as it is."""
        while self._manager.is_saving_in_progress():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        folder = self.path / str(step)
        if folder.is_dir():
            with contextlib.suppress(OSError):  # a full disk; or no longer one of the latest
                checkpoint_files.seal(folder)

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """Prints no trace of what `_writing` says in one line."""
        if disk_refusal(failed.exc_value) is None:
            self._hooks[0](failed)

    def _unraisable(self, failed: Any) -> None:
        """The same for writes that end after the one whose failure has ended Orbax's event loop."""
        if not isinstance(failed.exc_value, RuntimeError) or "Event loop is closed" not in str(failed.exc_value):
            self._hooks[1](failed)

    def _clear(self) -> None:
        """Removes what has been written of a checkpoint that the disk refused, also by threads that still write."""
        deadline = time.monotonic() + _SECONDS_TO_CLEAR
        while self._first_process and time.monotonic() < deadline:
            checkpoint_files.remove_unfinished(self.path)
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of a disk that takes nothing more into one line."""
        try:
            yield
        except Exception as error:
            reason = disk_refusal(error)
            if reason is None:
                raise
            self._refused = True
            steps = saved_steps(self.path.parent)
            last = f"step {steps[-1]}" if steps else "the start"
            raise UserError(
                f"a checkpoint cannot be written to {self.path}: {reason}; make room or give the right to write, and "
                f"start again: the run goes on from {last}"
            ) from error

    @property
    def latest(self) -> int | None:
        """The newest step saved, good or not, or None."""
        return self._manager.latest_step()

    def restore_newest(self, abstract: TrainState) -> Restored | None:
        """The newest good checkpoint, placed as `abstract` says; None where nothing was ever saved.

        Newer ones that are damaged are named, a line each, and moved to WORKDIR/damaged; so is one that had not been
        sealed when the run was killed, for nobody can know whether its bytes are those that were written.

        Raises:
          UserError: there are checkpoints, but none is good; or the newest good one does not fit: see `restore`.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        problems: dict[int, str] = {}
        restored = None
        own = [step for step in steps if checkpoint_files.sealed(self.path / str(step))] if self._first_process else []
        sealed = processes.gather(own)[0]
        for step in steps:
            restored = self._restore_good(step, abstract, sealed)
            if isinstance(restored, Restored):
                break
            problems[step] = restored
        if not isinstance(restored, Restored):
            if not steps:
                return None
            each = "; ".join(f"{step} {problem}" for step, problem in problems.items())
            raise UserError(
                f"none of the checkpoints in {self.path} is good ({each}); put the files back, or use another --workdir"
            )
        for i, (step, problem) in enumerate(problems.items()):
            where = self.path / str(step)
            if self._first_process:
                where = checkpoint_files.set_aside(where, self.path.parent / "damaged")
            next_best = f"it is now {where}, and the run falls back to step {steps[i + 1]}"
            print(f"warning: checkpoint {step} {problem}; {next_best}", flush=True)
        if problems:
            processes.gather(None)  # all wait until they have been moved
            self._manager.reload()
        return restored

    def _restore_good(self, step: int, abstract: TrainState, sealed: Sequence[int]) -> Restored | str:
        """The checkpoint, or what is wrong with it; the same in every process."""
        folder = self.path / str(step)
        if step in sealed:
            found = checkpoint_files.problem(folder) if self._first_process else None
            if problem := processes.gather(found)[0]:
                return f"is damaged: {problem}"
            return Restored(self.restore(step, abstract), step, self._evaluated(step))
        if sealed:
            return "had not been sealed when the run ended"
        # The first of a run, or one from before checkpoints were sealed: it is good if all of it can be read.
        restored, problem = None, None
        try:
            restored = Restored(self.restore(step, abstract), step, self._evaluated(step))
        except UserError:
            raise
        except Exception as error:
            problem = f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        first = next((text for text in processes.gather(problem) if text), None)
        if first is None and self._first_process:
            checkpoint_files.seal(folder)
        return restored if restored is not None and first is None else str(first)

    def _evaluated(self, step: int) -> bool:
        items = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        return items["data"].get("evaluated", True)  # older ones do not say

    def select(self, which: str) -> int:
        """The step that `best`, `latest` or a number means.

        `best` is the latest where no checkpoint was evaluated.

        Raises:
          UserError: there is none, or not that one; the message lists the steps that are there.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"no checkpoint in {self.path}: train first, or give the --workdir of a finished run")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise UserError(f"--checkpoint={which}: not in {self.path}; use best, latest or one of {steps}")

    def _refuse_damaged(self, step: int) -> None:
        if problem := checkpoint_files.problem(self.path / str(step)):
            others = [other for other in sorted(self._manager.all_steps()) if other != step]
            rest = f"; --checkpoint may be one of {others}" if others else ""
            raise UserError(f"checkpoint {self.path}/{step} is damaged: {problem}{rest}")

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`, placed as `abstract` says; raises UserError where anything does not fit."""
        expected = checkpoint_tree.split(abstract)
        for item in ("params", "train"):
            self._check(step, item, expected[item])
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(expected["params"]),
                train=ocp.args.StandardRestore(expected["train"]),
            ),
        )
        return TrainState(**{"ema": {}, **restored["params"]}, **restored["train"])

    def restore_variables(self, step: int, abstract: TrainState) -> dict[str, Tree]:
        """Parameters (averaged ones where the run has them) and batch statistics alone, for evaluation.

        The optimiser's state is not read. Arrays come in the float dtype of `abstract`, whichever they were saved in.

        Raises UserError where anything does not fit or is damaged.
        """
        self._refuse_damaged(step)
        expected = checkpoint_tree.split(abstract)["params"]
        self._check(step, "params", expected, cast=True)
        items = ocp.args.Composite(params=ocp.args.StandardRestore(expected))
        restored = self._manager.restore(step, args=items)["params"]
        return {"params": restored.get("ema", restored["params"]), "batch_stats": restored["batch_stats"]}

    def restore_parameters(self, step: int) -> Tree:
        """Parameters (averaged ones where the run has them) as host arrays in the shapes that they were saved in."""
        self._refuse_damaged(step)
        saved = self._manager.item_metadata(step)["params"]
        # Arrays of NumPy as targets: nothing is placed on devices, which may be others than those of the run.
        hosts = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), saved, is_leaf=lambda x: hasattr(x, "shape")
        )
        items = ocp.args.Composite(params=ocp.args.StandardRestore(hosts))
        restored = self._manager.restore(step, args=items)["params"]
        return restored.get("ema", restored["params"])

    def _check(self, step: int, item: str, expected: Tree, *, cast: bool = False) -> None:
        """Refuses a checkpoint whose names, shapes or dtypes differ: nothing is ever restored in part.

        cast: whether one float dtype may stand for another.
        """
        saved = self._manager.item_metadata(step)[item]
        lines, count = checkpoint_tree.differences(saved, expected, cast=cast)
        if lines:
            shown = "\n  ".join(lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else []))
            raise UserError(
                f"checkpoint {self.path}/{step} does not fit this config's model ({len(lines)} of "
                f"{count} arrays of `{item}` differ); use the config of its run:\n  {shown}"
            )

    def close(self) -> None:
        """Waits for the last save and releases the manager; raises UserError where it cannot be written."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._refused:
                self._clear()
            threading.excepthook, sys.unraisablehook = self._hooks


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps that a run has saved, oldest first; none where there is no such directory."""
    path = workdir.absolute() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


if __name__ == "__main__":
    from taskexpert_jax import checkpoint_listing

    sys.exit(checkpoint_listing.main())
