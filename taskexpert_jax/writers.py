"""Where a run's numbers and pictures go: metrics.jsonl, and TensorBoard events where TensorFlow is installed."""

from collections.abc import Mapping
import json
import pathlib
import time

import numpy as np


class RunWriter:
    """Writes scalars to `metrics.jsonl` (one JSON object a line, appended) and, through clu, to TensorBoard.

    Args:
      workdir: the run's directory.
      active: False in all but one process of a run: then nothing is written.
    """

    def __init__(self, workdir: pathlib.Path, *, active: bool = True):
        self._lines = (workdir / "metrics.jsonl").open("a") if active else None
        self._summary = _summary_writer(workdir) if active else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line: step, time in seconds since the epoch, and the values."""
        if self._lines is None:
            return
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._lines.flush()
        if self._summary is not None:
            self._summary.write_scalars(step, dict(values))
            self._summary.flush()

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds (H, W, 3) uint8 pictures to TensorBoard."""
        if self._summary is not None and pictures:
            self._summary.write_images(step, {name: picture[None] for name, picture in pictures.items()})
            self._summary.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._lines is not None:
            self._lines.close()
        if self._summary is not None:
            self._summary.close()


def _summary_writer(workdir: pathlib.Path):  # noqa: ANN202: clu's type cannot be named without importing TensorFlow
    try:
        from clu import metric_writers
    except ImportError:
        print("TensorBoard events: not written, for TensorFlow or tensorboard is not installed (metrics.jsonl is)")
        return None
    return metric_writers.SummaryWriter(str(workdir))
