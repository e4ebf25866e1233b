"""Writes a run's scalars and images to metrics.jsonl, TensorBoard and Weights & Biases."""

from collections.abc import Callable, Mapping
import contextlib
import json
import os
import pathlib
import time
from typing import Protocol, TextIO

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import files, json_file
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import wandb_writer

_START = b'{"step": '  # of a line of scalars


def writing(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Raises UserError with path and reason if its body cannot write a file of a run."""
    return files.writing(
        path, "free space or grant write permission, and start again: the run resumes from its last checkpoint"
    )


class MetricWriter(Protocol):
    """Methods of `clu.metric_writers.MetricWriter` that a run calls; clu's own class needs TensorFlow."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step."""
        ...

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes (H, W, 3) uint8 images of a step."""
        ...

    def flush(self) -> None:
        """Writes what is buffered."""
        ...

    def close(self) -> None:
        """Flushes and closes the writer."""
        ...


class RunWriter:
    """Writes scalars and images to all of a run's writers.

    These are `metrics.jsonl`, TensorBoard if TensorFlow is installed, and Weights & Biases if `config.log.wandb` names
    a project.

    Args:
      config: the run's config.
      workdir: the run's directory.
      first: the step that the run resumes from; existing lines of later steps are removed.
      active: False in all but one process of a run; nothing is written then.
    """

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, first: int, *, active: bool = True):
        self._writers: dict[pathlib.Path, MetricWriter] = {}  # by the path to name if the disk refuses a write
        if not active:
            return
        lines = workdir / "metrics.jsonl"
        with writing(lines):
            self._writers[lines] = LinesWriter(lines, first)
        if (summary := _summary_writer(workdir)) is not None:
            self._writers[workdir / "events.*"] = summary
        if project := config.log.wandb:
            writer = wandb_writer.WandbWriter(project, workdir, config.to_dict(), resumed=first > 0)
            self._writers[workdir / "wandb"] = writer

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of a step."""
        self._each(lambda writer: writer.write_scalars(step, values))

    def images(self, step: int, examples: Mapping[str, np.ndarray]) -> None:
        """Writes (H, W, 3) uint8 images of a step, except to metrics.jsonl."""
        if examples:
            self._each(lambda writer: writer.write_images(step, examples))

    def _each(self, write: Callable[[MetricWriter], None]) -> None:
        for path, writer in self._writers.items():
            with writing(path):
                write(writer)
                writer.flush()

    def close(self) -> None:
        """Flushes and closes the writers."""
        for path, writer in self._writers.items():
            with contextlib.suppress(UserError), writing(path):  # a failed write has been reported
                writer.close()


class LinesWriter:
    """Appends one JSON object per call to a file: step, Unix time in seconds, and the scalars.

    Args:
      path: the file.
      first: existing lines of later steps are removed.
    """

    def __init__(self, path: pathlib.Path, first: int):
        self._path = path
        self._lines = _open_lines(path, first)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line; null for NaN and Inf."""
        if not (self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._lines.fileno()))):
            raise UserError(f"{self._path} has been deleted or replaced during the run, which ends here")
        line = json_file.finite({"step": step, "time": round(time.time(), 3), **scalars})
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Flushes the file."""
        self._lines.flush()

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


def _open_lines(path: pathlib.Path, first: int) -> TextIO:
    """Opens the file for appending, after removing lines of steps after `first` and an incomplete last line.

    Lines that are no scalars of a step are moved to damaged/metrics.jsonl.
    """
    if path.exists():
        kept, damaged = [], []
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and json_file.parse(line, {"step": int})["step"] <= first:
                    kept.append(line)
            except json_file.MalformedError as error:
                if number < len(lines) or not line.startswith(_START):  # else cut when the run was killed
                    damaged.append((number, error, line))
        if damaged:
            aside = path.parent / "damaged" / path.name
            aside.parent.mkdir(exist_ok=True)
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for _, _, line in damaged)
            number, error, _ = damaged[0]
            logging.warning(f"{path}: {len(damaged)} damaged lines moved to {aside}, such as line {number}: {error}")
        with files.atomic(path) as file:
            file.writelines(line + b"\n" for line in kept)
    return path.open("a")


def _summary_writer(workdir: pathlib.Path) -> MetricWriter | None:
    """clu's writer of TensorBoard events; None if TensorFlow or tensorboard is not installed."""
    try:
        from clu import metric_writers
    except ImportError:
        logging.warning(
            "TensorBoard events: not written, as TensorFlow or tensorboard is not installed (metrics.jsonl is)"
        )
        return None
    return metric_writers.SummaryWriter(str(workdir))
