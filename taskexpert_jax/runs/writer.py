"""Writes a run's scalars and images: metrics.jsonl, and TensorBoard events if TensorFlow is installed."""

from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import time
from typing import Any, TextIO

from absl import logging
import numpy as np

from taskexpert_jax import files, json_file
from taskexpert_jax.errors import UserError

_START = b'{"step": '  # of a line of scalars


def writing(path: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Raises UserError with path and reason if its body cannot write a file of a run."""
    return files.writing(
        path, "free space or grant write permission, and start again: the run resumes from its last checkpoint"
    )


class RunWriter:
    """Writes scalars to `metrics.jsonl` (one JSON object per line, appended) and to TensorBoard (through clu).

    Args:
      workdir: the run's directory.
      first: the step that the run resumes from; existing lines of later steps are removed.
      active: False in all but one process of a run; nothing is written then.
    """

    def __init__(self, workdir: pathlib.Path, first: int, *, active: bool = True):
        self._path = workdir / "metrics.jsonl"
        with writing(self._path):
            self._lines = _open_lines(self._path, first) if active else None
        self._summary = _summary_writer(workdir) if active else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line: step, Unix time in seconds, and the values; null for NaN and Inf."""
        if self._lines is None:
            return
        with writing(self._path):
            if not (self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._lines.fileno()))):
                raise UserError(f"{self._path} has been deleted or replaced during the run, which ends here")
            line = json_file.finite({"step": step, "time": round(time.time(), 3), **values})
            self._lines.write(json.dumps(line, allow_nan=False) + "\n")
            self._lines.flush()
        if self._summary is not None:
            with writing(self._path.with_name("events.*")):
                self._summary.write_scalars(step, dict(values))
                self._summary.flush()

    def images(self, step: int, examples: Mapping[str, np.ndarray]) -> None:
        """Adds (H, W, 3) uint8 images to TensorBoard."""
        if self._summary is not None and examples:
            with writing(self._path.with_name("events.*")):
                self._summary.write_images(step, {name: image[None] for name, image in examples.items()})
                self._summary.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        with contextlib.suppress(UserError), writing(self._path):  # a failed write has been reported
            if self._lines is not None:
                self._lines.close()
        with contextlib.suppress(UserError), writing(self._path):
            if self._summary is not None:
                self._summary.close()


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


def _summary_writer(workdir: pathlib.Path) -> Any:
    """clu's writer (its type would need TensorFlow's import); None if TensorFlow or tensorboard is not installed."""
    try:
        from clu import metric_writers
    except ImportError:
        logging.warning(
            "TensorBoard events: not written, as TensorFlow or tensorboard is not installed (metrics.jsonl is)"
        )
        return None
    return metric_writers.SummaryWriter(str(workdir))
