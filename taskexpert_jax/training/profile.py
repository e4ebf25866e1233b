"""Profiles of a training run: traces of a few steps, in the layout that xprof and TensorBoard read."""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
import shutil
import tempfile

from absl import logging
import jax
from ml_collections import ConfigDict

from taskexpert_jax import files, storage
from taskexpert_jax.errors import disk_refusal
from taskexpert_jax.training.throughput import Throughput
from taskexpert_jax.training.watchdog import Watchdog

FOLDER = pathlib.PurePath("plugins", "profile")  # where xprof and `tensorboard --logdir=WORKDIR` look

# By default the compilation cache may return a program whose operations have the names of another version of the code.
_NAMED_KEYS = "jax_compilation_cache_include_metadata_in_key"


class Profiler:
    """Writes traces of the steps that `config.profile` selects to WORKDIR/plugins/profile, from each process.

    A trace that cannot be taken or written is a warning and the last one: it never ends the run.

    Args:
      settings: `config.profile`.
      workdir: the run's directory.
      watchdog, throughput: the run's; writing a trace is neither a stall nor part of the throughput.
    """

    def __init__(self, settings: ConfigDict, workdir: pathlib.Path, watchdog: Watchdog, throughput: Throughput):
        self._first, self._count, self._every = settings.first_step, settings.steps, settings.every
        self._folder = workdir / FOLDER
        self._watchdog, self._throughput = watchdog, throughput
        self._trace: contextlib.ExitStack | None = None  # of the current trace: removes its temporary folder
        self._written = pathlib.Path()  # that folder
        self._from = self._to = 0  # its steps
        self._named_keys = getattr(jax.config, _NAMED_KEYS)
        if self._first:
            jax.config.update(_NAMED_KEYS, True)

    def steps(self, steps: Sequence[int]) -> Iterator[int]:
        """The steps for the loop, as they are unless a profile is wanted: an unprofiled run pays nothing.

        A trace begins and ends when the devices have computed what was dispatched, as the watchdog was told.
        """
        return self._traced(steps) if self._first else iter(steps)

    def close(self) -> None:
        """Ends a trace that is being taken: the run has ended within its steps."""
        jax.config.update(_NAMED_KEYS, self._named_keys)
        if self._trace is not None:
            self._end()

    def _traced(self, steps: Sequence[int]) -> Iterator[int]:
        for step in steps:
            if self._selects(step) and self._trace is None:
                jax.block_until_ready(self._watchdog.latest)
                self._begin(step)
            if self._trace is None:
                yield step
                continue
            self._to = step
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step
            if not self._selects(step + 1):
                jax.block_until_ready(self._watchdog.latest)
                self._end()

    def _selects(self, step: int) -> bool:
        after = step - self._first
        return self._first > 0 and after >= 0 and (after % self._every if self._every else after) < self._count

    def _begin(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the phases of `Watchdog.doing` say what the host does, in fewer events
        with self._undisturbed(f"no profile from step {step} on"), contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="taskexpert_"))
            jax.profiler.start_trace(folder, profiler_options=options)
            self._trace, self._written, self._from = stack.pop_all(), pathlib.Path(folder), step

    def _end(self) -> None:
        trace, self._trace = self._trace, None
        assert trace is not None
        steps = f"{self._from} to {self._to}"
        with self._undisturbed(f"no profile of steps {steps}"), trace:
            jax.profiler.stop_trace()
            target = self._folder / f"steps_{self._from:08d}-{self._to:08d}"
            place(self._written, target)
            logging.info(f"profile of steps {steps}: {target}")

    @contextlib.contextmanager
    def _undisturbed(self, lost: str) -> Iterator[None]:
        """Takes the body's time from the throughput; an error in it is a warning and ends the profiling."""
        with self._watchdog.doing("writing a profile"), self._throughput.paused():
            try:
                yield
            except (OSError, RuntimeError) as error:  # of the profiler: RuntimeError, also where the disk is full
                self._first = 0
                reason = disk_refusal(error) or getattr(error, "strerror", None) or str(error).partition("\n")[0]
                logging.warning(f"{lost}: {reason}; the run goes on without profiles")


def place(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Moves the files of a finished trace from a local folder to the run's, whole or not at all.

    They have the host's name. Of several processes, which may share a host, each puts its index before that.
    """
    written = sorted(path for path in folder.glob(f"{FOLDER}/*/*") if path.is_file())
    if not written:
        raise OSError("the profiler wrote no file")
    index = f"{jax.process_index()}-" if jax.process_count() > 1 else ""
    written = [path.rename(path.with_name(f"{index}{path.name}")) for path in written]
    if storage.is_bucket(target):
        storage.copy_tree(written[0].parent, target)
        return
    for parent in (target.parent.parent, target.parent, target):  # the run's own folder is not made again
        parent.mkdir(exist_ok=True)
    for path in written:
        with path.open("rb") as file, files.atomic(target / path.name) as copy:
            shutil.copyfileobj(file, copy)
