"""Orbax's checkpoint manager for a run: retention policy, item handlers, and filters for its log."""

from collections.abc import Iterator, Mapping
import contextlib
import logging as logging_module
import math
import pathlib
import sys
from typing import Any

from absl import logging
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from taskexpert_jax import json_file, storage
from taskexpert_jax.errors import StoreError, disk_refusal
from taskexpert_jax.runs import sealing

TREES = ("params", "train")  # items of a checkpoint that are trees of arrays
RECORDS = ("data", "config")  # items that are JSON
_REPORTED_ELSEWHERE = (
    "Requested `tracked_metric`",  # logged at every save without an evaluation
    "Failed to json parse Metadata file",  # a damaged checkpoint, which `Checkpoints` reports
    # A save that fails, whose error reaches `Checkpoints`.
    *("Metadata file does not exist", "Failed to write metadata=", "Save Finalize thread", "_SignalingThread.run()"),
    *("Handler Commit operations",),
)


def _worth_logging(record: logging_module.LogRecord) -> bool:
    """False for a log record, or its traceback, that repeats what `Checkpoints` reports in one line."""
    refused = record.exc_info is not None and disk_refusal(record.exc_info[1]) is not None
    return not refused and not any(text in record.getMessage() for text in _REPORTED_ELSEWHERE)


@contextlib.contextmanager
def quiet_late_writes() -> Iterator[None]:
    """Hides tracebacks of writes that finish after an earlier one failed; `Checkpoints` reports the first failure.

    Orbax closes its event loop at the first failed write. TensorStore's threads that finish other writes then find it
    closed, and their error reaches only `sys.unraisablehook`.
    """
    before = sys.unraisablehook

    def unraisable(args: Any) -> None:  # typeshed's type of it does not exist at run time
        if not (isinstance(args.exc_value, RuntimeError) and "Event loop is closed" in str(args.exc_value)):
            before(args)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = before


class Manager(ocp.CheckpointManager):
    """Orbax's manager, except that damaged metrics are None and do not prevent opening, and that it logs less."""

    def __init__(self, *args: Any, **kwargs: Any):
        for logger in (logging.get_absl_logger(), logging_module.getLogger("asyncio")):
            logger.addFilter(_worth_logging)
        super().__init__(*args, **kwargs)

    def metrics(self, step: int) -> dict[str, float] | None:
        """The metrics of the evaluation at `step`; None if there was none."""
        return self._get_metrics(step)

    def _get_metrics(self, step: int) -> dict[str, float] | None:  # Orbax's own methods call it too
        try:
            return json_file.read(
                storage.path(str(self.directory)) / str(step) / sealing.METRICS, json_file.Each(float)
            )
        except StoreError:  # no damage
            raise
        except (json_file.MalformedError, OSError):
            return None

    def best(self, key: str) -> int | None:
        """The step with the best value of the metric `key`, the newest of equal ones; None if no step has the metric.

        The manager must be one of `for_run` with the same key.
        """
        step = self.best_step()
        return step if step is not None and key in (self.metrics(step) or {}) else None


def _open_bucket(path: pathlib.Path) -> None:
    """Makes a folder of checkpoints in a bucket readable for Orbax; does nothing on a disk.

    Orbax asks whether the bucket has a hierarchical namespace, with a client that needs a Google Cloud project and a
    permission more. It gets a bucket without settings, so it takes the way that works in both kinds.
    """
    if storage.is_bucket(path):
        from orbax.checkpoint._src.path import gcs_utils  # no public name for this

        from taskexpert_jax.storage import client

        gcs_utils.get_bucket = client.bucket
        sealing.commit_copied(path)


def for_run(path: pathlib.Path, best_key: str, *, higher_is_better: bool, create: bool) -> Manager:
    """A manager that keeps the latest two checkpoints and the one with the best `best_key` among its metrics."""

    def metric(metrics: Mapping[str, float]) -> float:
        # Absent if the metric was NaN, or if the run's best task was a different one.
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
    _open_bucket(path)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=metric, best_mode="max" if higher_is_better else "min", create=create
    )
    return Manager(path, options=options, item_handlers=_handlers())


def for_listing(path: pathlib.Path) -> Manager:
    """A read-only manager, which needs no config."""
    _open_bucket(path)
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    return Manager(path, options=options, item_handlers=_handlers())


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    return {
        **{item: ocp.StandardCheckpointHandler() for item in TREES},
        **{item: ocp.JsonCheckpointHandler() for item in RECORDS},
    }
