"""Writes a run's scalars and images to metrics.jsonl, TensorBoard and Weights & Biases."""

from collections.abc import Callable, Mapping
import contextlib
import json
import os
import pathlib
import tempfile
import time
from typing import TYPE_CHECKING, Protocol, TextIO

from absl import logging
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import files, json_file, storage
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import wandb_writer
from taskexpert_jax.runs.workdir import Hold, Locked

if TYPE_CHECKING:
    from taskexpert_jax.storage.mirror import Mirror

LINES = "metrics.jsonl"
_MOST_BYTES = 1 << 20  # of a file of TensorBoard events in a bucket
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
      hold: what this process holds of the workdir; if that is lost, nothing more is written.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        first: int,
        *,
        active: bool = True,
        hold: Hold | None = None,
    ):
        self._hold = hold or Locked()
        self._writers: dict[pathlib.Path, MetricWriter] = {}  # by the path to name if the disk refuses a write
        self._open = contextlib.ExitStack()
        self._mirror: Mirror | None = None
        if not active:
            return
        folder = self._local(workdir) if storage.is_bucket(workdir) else workdir
        lines = workdir / LINES
        with writing(lines):
            self._writers[lines] = LinesWriter(folder / LINES, first, of=workdir)
        if (summary := _summary_writer(folder, rotating=folder is not workdir)) is not None:
            self._writers[workdir / "events.*"] = summary
        if project := config.log.wandb:
            writer = wandb_writer.WandbWriter(project, workdir, config.to_dict(), resumed=first > 0)
            self._writers[workdir / "wandb"] = writer

    def _local(self, workdir: pathlib.Path) -> pathlib.Path:
        """A local folder in place of a workdir in a bucket, where nothing can be appended: sent in the background."""
        from taskexpert_jax.storage import generations
        from taskexpert_jax.storage.mirror import Mirror

        folder = pathlib.Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="taskexpert_logs_")))
        target, known = storage.bucket_path(workdir), {}
        for name in (LINES, f"damaged/{LINES}"):
            if version := generations.read(target / name):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(version.content)
                known[name] = version.generation
        mirror = Mirror(folder, target, known, self._hold.check)
        self._mirror = self._open.enter_context(contextlib.closing(mirror))
        return folder

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars of a step."""
        self._each(lambda writer: writer.write_scalars(step, values))

    def images(self, step: int, examples: Mapping[str, np.ndarray]) -> None:
        """Writes (H, W, 3) uint8 images of a step, except to metrics.jsonl."""
        if examples:
            self._each(lambda writer: writer.write_images(step, examples))

    def _each(self, write: Callable[[MetricWriter], None]) -> None:
        self._hold.check()
        for path, writer in self._writers.items():
            with writing(path):
                write(writer)
                writer.flush()
        if self._mirror is not None:
            self._mirror.changed()

    def wait(self) -> None:
        """Returns when everything written is on the disk or in the bucket; raises UserError if it cannot be."""
        if self._mirror is not None:
            self._mirror.wait()

    def close(self) -> None:
        """Flushes and closes the writers."""
        for path, writer in self._writers.items():
            with contextlib.suppress(UserError), writing(path):  # a failed write has been reported
                writer.close()
        with contextlib.suppress(UserError):
            self._open.close()


class LinesWriter:
    """Appends one JSON object per call to a file: step, Unix time in seconds, and the scalars.

    Args:
      path: the file.
      first: existing lines of later steps are removed.
      of: the workdir, for messages; default: the file's folder.
    """

    def __init__(self, path: pathlib.Path, first: int, of: pathlib.Path | None = None):
        self._path = path
        self._lines = _open_lines(path, first, of or path.parent)

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


def _open_lines(path: pathlib.Path, first: int, workdir: pathlib.Path) -> TextIO:
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
            where = workdir / "damaged" / path.name
            logging.warning(
                f"{workdir / path.name}: {len(damaged)} damaged lines moved to {where}, such as line {number}: {error}"
            )
        with files.atomic(path) as file:
            file.writelines(line + b"\n" for line in kept)
    return path.open("a")


class RotatingWriter:
    """TensorBoard events in files of limited size, because those in a bucket are sent anew whenever they grow.

    Args:
      open_writer: opens a writer with a file of its own.
      folder: where the files are.
    """

    def __init__(self, open_writer: Callable[[], MetricWriter], folder: pathlib.Path):
        self._open_writer, self._folder = open_writer, folder
        self._writer = open_writer()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step."""
        self._writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images of a step."""
        self._writer.write_images(step, images)

    def flush(self) -> None:
        """Flushes the file, and begins another one if it is large."""
        self._writer.flush()
        newest = max(self._folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
        if newest.stat().st_size > _MOST_BYTES:
            self._writer.close()
            self._writer = self._open_writer()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _summary_writer(folder: pathlib.Path, *, rotating: bool) -> MetricWriter | None:
    """clu's writer of TensorBoard events; None if TensorFlow or tensorboard is not installed."""
    try:
        from clu import metric_writers
    except ImportError:
        logging.warning(
            "TensorBoard events: not written, as TensorFlow or tensorboard is not installed (metrics.jsonl is)"
        )
        return None
    if rotating:
        return RotatingWriter(lambda: metric_writers.SummaryWriter(str(folder)), folder)
    return metric_writers.SummaryWriter(str(folder))
