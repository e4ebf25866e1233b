"""Orbax checkpoints of a run: asynchronous, the latest two and the best kept, checked, restored strictly.

A checkpoint has the items `params` (parameters, their moving average if any, and batch statistics: all that evaluation
needs), `train` (optimiser state, step, random key), `data` (position in the data) and `config`.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import itertools
import math
import pathlib
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from taskexpert_jax.runs import sealing, manager as checkpoint_manager, tree as checkpoint_tree
from taskexpert_jax.parallel import processes
from taskexpert_jax.errors import UserError, disk_refusal
from taskexpert_jax.tasks import Task
from taskexpert_jax.training.state import TrainState, Tree

_SECONDS_BETWEEN_LOOKS = 0.1  # at whether a save is complete
_SECONDS_TO_CLEAR = 1.0


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
        self._replaced = _replaced(workdir)
        self._best_key = f"{best.name}/{best.main_metric}"
        if read_only and not self.path.is_dir():
            raise UserError(f"no checkpoints in {workdir}: train first, or give the --workdir of a finished run")

        if not read_only:
            if self._first_process:
                for step in sealing.remove_unfinished(self.path):
                    print(f"step {step} was being written when the run ended: left out", flush=True)
                sealing.put_back(self.path, self._replaced)
            processes.gather(None)  # none looks before that is done
        self._manager = checkpoint_manager.for_run(
            self.path, self._best_key, higher_is_better=best.higher_is_better, create=not read_only
        )
        self._sealing: threading.Thread | None = None
        self._unsealed: OSError | None = None  # why the last checkpoint could not be sealed
        self._refused = False  # by the disk
        self._hooks = contextlib.ExitStack()
        self._hooks.enter_context(checkpoint_manager.quiet_refusals())

    @property
    def _first_process(self) -> bool:
        return jax.process_index() == 0

    def save(self, state: TrainState, config: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts saving `state`; returns when it has been copied off the devices.

        A checkpoint of the same step is replaced where there are metrics now: that of a run that was told to stop
        before it could evaluate. It is kept until the new one is sealed. Without metrics there is nothing to add to it.

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
                if metrics is None:
                    return
                self._put_by(step)
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

    def _put_by(self, step: int) -> None:
        if self._first_process:
            sealing.put_by(self.path / str(step), self._replaced)
        processes.gather(None)  # all wait until it has been moved
        self._manager.reload()

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
        if self._unsealed is not None:
            error, self._unsealed = self._unsealed, None
            raise error

    def _seal(self, step: int) -> None:
        """Seals a checkpoint as soon as it is complete; one that never is, is left as it is."""
        while self._manager.is_saving_in_progress():
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        folder = self.path / str(step)
        if folder.is_dir():
            try:
                sealing.seal(folder)
            except OSError as error:
                self._unsealed = error
            else:
                sealing.drop(self._replaced / str(step))

    def _clear(self) -> None:
        """Removes what has been written of a checkpoint that the disk refused, also by threads that still write."""
        deadline = time.monotonic() + _SECONDS_TO_CLEAR
        while self._first_process and time.monotonic() < deadline:
            sealing.remove_unfinished(self.path)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if self._first_process:
            sealing.put_back(self.path, self._replaced)

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
            last = next((f"step {step}" for step in self._to_go_on_from()), "the start")
            raise UserError(
                f"a checkpoint cannot be written to {self.path}: {reason}; make room or give the right to write, and "
                f"start again: the run goes on from {last}"
            ) from error

    def _to_go_on_from(self) -> list[int]:
        """Newest first: the sealed checkpoints and those put by; where there is none of them, all that are complete."""
        steps = saved_steps(self.path.parent)[::-1]
        put_by = [self._replaced / str(step) for step in steps]
        sealed = [step for step in steps if sealing.sealed(self.path / str(step))]
        return sorted({*sealed, *(int(path.name) for path in put_by if path.is_dir())}, reverse=True) or steps

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
        restored, problems = self._newest_good(steps, abstract)
        if restored is None:
            if not steps:
                return None
            each = "; ".join(f"{step} {problem}" for step, problem in problems.items())
            raise UserError(
                f"none of the checkpoints in {self.path} is good ({each}); put the files back, or use another --workdir"
            )
        followers = dict(itertools.pairwise(steps))
        for step, problem in problems.items():
            self._set_aside(step, problem, f", and the run falls back to step {followers[step]}")
        # Where metrics cannot be read, the best checkpoint would be deleted as one of many.
        older = [step for step in steps if step < restored.step] if self._first_process else []
        unreadable = processes.gather(self._damaged_metrics(older))[0]
        for step, problem in unreadable.items():
            self._set_aside(step, f"is damaged: {problem}", "")
        if problems or unreadable:
            processes.gather(None)  # all wait until they have been moved
            self._manager.reload()
        return restored

    def _newest_good(self, steps: Sequence[int], abstract: TrainState) -> tuple[Restored | None, dict[int, str]]:
        """The first of `steps` that is good, and what is wrong with those before it."""
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
            with self._writing():
                where = sealing.set_aside(self.path / str(step), self.path.parent / "damaged")
            print(f"warning: checkpoint {step} {problem}; it is now {where}{then}", flush=True)

    def _damaged_metrics(self, steps: Sequence[int]) -> dict[int, str]:
        found = {step: sealing.problem(self.path / str(step), "metrics") for step in steps}
        return {step: problem for step, problem in found.items() if problem}

    def _restore_good(self, step: int, abstract: TrainState, sealed: Sequence[int]) -> Restored | str:
        """The checkpoint, or what is wrong with it; the same in every process."""
        folder = self.path / str(step)
        if step in sealed:
            found = sealing.problem(folder) if self._first_process else None
            if problem := processes.gather(found)[0]:
                return f"is damaged: {problem}"
            return Restored(self.restore(step, abstract), step, self._evaluated(step))
        if sealed:
            return "had not been sealed when the run ended"
        # The first of a run, or one from before checkpoints were sealed: it is good if all of it can be read.
        restored, problem = None, None
        try:
            self._read_beside(step)
            restored = Restored(self.restore(step, abstract), step, self._evaluated(step))
        except UserError:
            raise
        except Exception as error:
            problem = f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        first = next((text for text in processes.gather(problem) if text), None)
        if first is None and self._first_process:
            sealing.seal(folder)
        return restored if restored is not None and first is None else str(first)

    def _read_beside(self, step: int) -> None:
        """Raises an error where what is not of the state cannot be read: lists of arrays, the config, metrics."""
        lists = self._manager.item_metadata(step)
        for item in checkpoint_manager.TREES:
            if not checkpoint_tree.arrays(lists[item]):
                raise ValueError(f"nothing lists the arrays of `{item}`")
        self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        if (self.path / str(step) / "metrics").exists() and self._manager.metrics(step) is None:
            raise ValueError("its metrics are not readable")

    def _evaluated(self, step: int) -> bool:
        items = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))
        return items["data"].get("evaluated", True)  # older ones do not say

    def select(self, which: str) -> int:
        """The step that `best`, `latest` or a number means.

        `best` is the latest where no checkpoint was evaluated.

        Raises:
          UserError: there is none, or not that one; the message lists the steps that are there. Or which is the best
            cannot be known, for the metrics of one are damaged.
        """
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise UserError(f"no checkpoint in {self.path}: train first, or give the --workdir of a finished run")
        if which == "latest":
            return steps[-1]
        if which == "best":
            for step, problem in self._damaged_metrics(steps).items():
                rest = f"which is the best is not known; --checkpoint may be latest or one of {steps}"
                raise UserError(f"checkpoint {self.path}/{step} is damaged: {problem}; {rest}")
            best = self._manager.best_step()
            return best if best is not None and self._best_key in (self._manager.metrics(best) or {}) else steps[-1]
        if which.isdigit() and int(which) in steps:
            return int(which)
        raise UserError(f"--checkpoint={which}: not in {self.path}; use best, latest or one of {steps}")

    def _refuse_damaged(self, step: int) -> None:
        # What evaluation reads: a third of a checkpoint with Adam's moments.
        if problem := sealing.problem(self.path / str(step), "params", "metrics", "_CHECKPOINT_METADATA"):
            raise self._damaged(step, problem)

    def _damaged(self, step: int, problem: str) -> UserError:
        others = [other for other in sorted(self._manager.all_steps()) if other != step]
        rest = f"; --checkpoint may be one of {others}" if others else ""
        return UserError(f"checkpoint {self.path}/{step} is damaged: {problem}{rest}")

    def _saved(self, step: int, item: str) -> Tree:
        """Names, shapes and dtypes of the arrays of an item."""
        try:
            return self._manager.item_metadata(step)[item]
        except (KeyError, ValueError) as error:
            found = sealing.problem(self.path / str(step))
            raise self._damaged(step, found or f"its `{item}` cannot be read") from error

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
        saved = self._saved(step, "params")
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
        saved = self._saved(step, item)
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
            self._hooks.close()


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps that a run has saved, oldest first; none where there is no such directory.

    Among them those put by while another of their step was written, as when the run was killed in that moment.
    """
    path = workdir.absolute() / "checkpoints"
    steps = set(ocp.utils.checkpoint_steps(path)) if path.is_dir() else set()
    return sorted(steps | {int(kept.name) for kept in _replaced(workdir).glob("[0-9]*")})


def _replaced(workdir: pathlib.Path) -> pathlib.Path:
    return workdir.absolute() / "replaced"
