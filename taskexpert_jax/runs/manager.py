"""Orbax's manager of a folder of checkpoints: what it keeps, how it reads, and what of its log is worth saying."""

from collections.abc import Iterator, Mapping
import contextlib
import logging as logging_module
import math
import pathlib
import re
import sys
import threading
from typing import Any
import warnings

from absl import logging
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from taskexpert_jax.errors import disk_refusal

TREES = ("params", "train")  # items of a checkpoint that are trees of arrays
RECORDS = ("data", "config")  # and those that are JSON
_SAID_OTHERWISE = (
    "Requested `tracked_metric`",  # at every save without an evaluation
    "Failed to json parse Metadata file",  # of a damaged checkpoint, of which `Checkpoints` says so
)


def _worth_logging(record: logging_module.LogRecord) -> bool:
    """Not so: what `Checkpoints` says in a line of its own, and traces of it."""
    refused = record.exc_info is not None and disk_refusal(record.exc_info[1]) is not None
    return not refused and not any(text in record.getMessage() for text in _SAID_OTHERWISE)


logging.get_absl_logger().addFilter(_worth_logging)
# Of writes that had not begun when the one before them was refused, which ends Orbax's event loop.
_NOT_BEGUN = re.compile("coroutine '.*' was never awaited")
warnings.filterwarnings("ignore", message=_NOT_BEGUN.pattern, category=RuntimeWarning)


@contextlib.contextmanager
def quiet_refusals() -> Iterator[None]:
    """Within its body Orbax's threads print no trace of what the disk refused: the one that waits for them is told."""
    before = threading.excepthook, sys.unraisablehook

    def failed(args: threading.ExceptHookArgs) -> None:
        if disk_refusal(args.exc_value) is None:
            before[0](args)

    def unraisable(args: Any) -> None:
        # Writes that end after the one that was refused, and those that have not begun, where warnings are errors.
        ended = isinstance(args.exc_value, RuntimeError) and "Event loop is closed" in str(args.exc_value)
        not_begun = isinstance(args.exc_value, RuntimeWarning) and _NOT_BEGUN.match(str(args.exc_value))
        if not ended and not not_begun:
            before[1](args)

    threading.excepthook, sys.unraisablehook = failed, unraisable
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which can also be opened where a checkpoint's metrics are damaged; those are then None."""

    def metrics(self, step: int) -> dict[str, float] | None:
        """What was saved of an evaluation at `step`."""
        try:
            found = super().metrics(step)
        except (ValueError, OSError):
            return None
        return found if isinstance(found, dict) else None


def for_run(path: pathlib.Path, best_key: str, *, higher_is_better: bool, create: bool) -> Manager:
    """Keeps the latest two checkpoints, and the one with the best `best_key` of its metrics."""

    def metric(metrics: Mapping[str, float]) -> float:
        # Those of before the run's best task was changed may lack it.
        return metrics.get(best_key, -math.inf if higher_is_better else math.inf)

    policy = preservation_policy.AnyPreservationPolicy(
        [
            preservation_policy.LatestN(2),
            # `max_to_keep` with `best_fn` would delete the newest checkpoint as soon as the metric worsens.
            preservation_policy.BestN(
                get_metric_fn=metric, reverse=not higher_is_better, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=metric, best_mode="max" if higher_is_better else "min", create=create
    )
    return Manager(path, options=options, item_handlers=_handlers())


def for_listing(path: pathlib.Path) -> Manager:
    """Changes nothing and needs no config."""
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    return Manager(path, options=options, item_handlers=_handlers())


def _handlers() -> dict[str, Any]:
    return {
        **{item: ocp.StandardCheckpointHandler() for item in TREES},
        **{item: ocp.JsonCheckpointHandler() for item in RECORDS},
    }
