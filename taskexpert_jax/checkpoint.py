"""Orbax checkpoints of a run: asynchronous, the latest and the best kept, restored strictly.

A checkpoint has the items `params` (parameters, their moving average if any, and batch statistics: all that evaluation
needs), `train` (optimiser state, step, random key), `data` (position in the data) and `config`.
"""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import Task
from taskexpert_jax.train_state import TrainState, Tree

# Orbax warns at every save that was not evaluated, which is what a checkpoint between two evaluations is.
logging.get_absl_logger().addFilter(lambda record: "Requested `tracked_metric`" not in record.getMessage())


class Checkpoints:
    """The checkpoints of one working directory.

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
                preservation_policy.LatestN(1),
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
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def save(self, state: TrainState, config: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts saving `state`; returns when it has been copied off the devices.

        metrics: the evaluation at this very step, or None; only evaluated checkpoints can be the best, and of those the
          ones whose metric is a number (it is none where no label of the task was evaluated).
        """
        step = int(state.step)
        best = math.nan if metrics is None else metrics[self._best_key]
        items = _split(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(items["params"]),
                train=ocp.args.StandardSave(items["train"]),
                data=ocp.args.JsonSave({"next_batch": step}),
                config=ocp.args.JsonSave(dict(config)),
            ),
            metrics=None if math.isnan(best) else {self._best_key: best},
        )

    @property
    def latest(self) -> int | None:
        """The newest step saved, or None."""
        return self._manager.latest_step()

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

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`, placed as `abstract` says; raises UserError where anything does not fit."""
        expected = _split(abstract)
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

        Raises UserError where anything does not fit.
        """
        expected = _split(abstract)["params"]
        self._check(step, "params", expected)
        items = ocp.args.Composite(params=ocp.args.StandardRestore(expected))
        restored = self._manager.restore(step, args=items)["params"]
        return {"params": restored.get("ema", restored["params"]), "batch_stats": restored["batch_stats"]}

    def restore_parameters(self, step: int) -> Tree:
        """Parameters (averaged ones where the run has them) as host arrays in the shapes that they were saved in."""
        saved = self._manager.item_metadata(step)["params"]
        # Arrays of NumPy as targets: nothing is placed on devices, which may be others than those of the run.
        hosts = jax.tree.map(
            lambda leaf: np.empty(leaf.shape, leaf.dtype), saved, is_leaf=lambda x: hasattr(x, "shape")
        )
        items = ocp.args.Composite(params=ocp.args.StandardRestore(hosts))
        restored = self._manager.restore(step, args=items)["params"]
        return restored.get("ema", restored["params"])

    def _check(self, step: int, item: str, expected: Tree) -> None:
        """Refuses a checkpoint whose names, shapes or dtypes differ: nothing is ever restored in part."""
        saved = _leaves(self._manager.item_metadata(step)[item])
        wanted = _leaves(expected)
        lines = [f"- {name} {saved[name]}: only in the checkpoint" for name in sorted(saved.keys() - wanted.keys())]
        lines += [f"+ {name} {wanted[name]}: only in the model" for name in sorted(wanted.keys() - saved.keys())]
        lines += [
            f"! {name}: {saved[name]} in the checkpoint, {wanted[name]} in the model"
            for name in sorted(saved.keys() & wanted.keys())
            if saved[name] != wanted[name]
        ]
        if lines:
            shown = "\n  ".join(lines[:12] + ([f"... and {len(lines) - 12} more"] if len(lines) > 12 else []))
            raise UserError(
                f"checkpoint {self.path}/{step} does not fit this config's model ({len(lines)} of "
                f"{len(saved | wanted)} arrays of `{item}` differ); use the config of its run:\n  {shown}"
            )

    def close(self) -> None:
        """Waits for the last save and releases the manager."""
        self._manager.wait_until_finished()
        self._manager.close()


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps that a run has saved, oldest first; none where there is no such directory."""
    path = workdir.absolute() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def _split(state: TrainState) -> dict[str, dict[str, Any]]:
    averaged = {"ema": state.ema} if state.ema else {}
    return {
        "params": {"params": state.params, "batch_stats": state.batch_stats, **averaged},
        "train": {"opt_state": state.opt_state, "step": state.step, "rng": state.rng},
    }


def _leaves(tree: Tree) -> dict[str, str]:
    """Name -> "shape dtype" of every array of a tree or of its metadata."""

    def is_array(node: Any) -> bool:
        return hasattr(node, "shape") and hasattr(node, "dtype")

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array)
    return {
        "/".join(_key(entry) for entry in path): f"{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype).name}"
        for path, leaf in flat
        if is_array(leaf)
    }


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
