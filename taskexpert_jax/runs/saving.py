"""Saves the checkpoints of a run in the background, seals each, and reports what the disk or the store refuses."""

from collections.abc import Iterator, Mapping
import contextlib
import json
import pathlib
import threading
import time

import jax
import orbax.checkpoint as ocp

from taskexpert_jax import storage
from taskexpert_jax.errors import StoreError, UserError, refused_by_disk
from taskexpert_jax.parallel import processes
from taskexpert_jax.runs import sealing
from taskexpert_jax.runs.manager import Manager
from taskexpert_jax.runs.presence import Presence
from taskexpert_jax.runs.workdir import Hold

_POLL_SECONDS = 0.1  # interval between checks whether a save is complete
_WAIT_SECONDS = 10.0  # longest wait for the other writes of a checkpoint that the disk refused
_CLEAR_SECONDS = 1.0
_ASK_SECONDS = 5.0  # for the lease of a bucket where a checkpoint is refused


class Saver:
    """Writes checkpoints with Orbax. A thread seals each (`sealing`) once it is complete, while training continues.

    Args:
      path: the folder of checkpoints.
      opened: its manager.
      hold: what this process holds of the workdir; if that is lost, nothing more is written.
    """

    def __init__(self, path: pathlib.Path, opened: Manager, hold: Hold):
        self._path, self._manager, self._hold = path, opened, hold
        self._presence = Presence(path)
        self._incomplete: int | None = None  # step of a checkpoint that is being written
        self._writers: set[threading.Thread] = set()  # of the last checkpoint
        self._sealing: threading.Thread | None = None
        self._unsealed: OSError | UserError | None = None  # error of sealing the last checkpoint
        self._refused = False  # a write has failed (disk full, no permission)

    @property
    def _first_process(self) -> bool:
        return jax.process_index() == 0

    def save(self, step: int, items: ocp.args.Composite, metrics: Mapping[str, float] | None) -> None:
        """Starts saving a step; of one that has been saved before, only the metrics are added.

        Args:
          step: number of steps done.
          items: what is saved.
          metrics: the finite metrics of an evaluation at this step; None if there was none.

        Raises:
          UserError: this checkpoint or the previous one cannot be written, the folder of checkpoints is gone, or
            another run has taken the workdir over.
        """
        with self.writing():
            self._finish()
            self._hold.renew()
            if step in self._manager.all_steps():
                if metrics is not None:
                    self._add_metrics(step, metrics)
                return
            self._incomplete = step
            before = set(threading.enumerate())
            try:
                self._manager.save(step, args=items, metrics=dict(metrics) if metrics else None)
            finally:
                self._writers = set(threading.enumerate()) - before
        if self._first_process:
            self._sealing = threading.Thread(target=self._seal, args=(step,), name="checkpoint seal", daemon=True)
            self._sealing.start()

    def _add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._first_process:
            sealing.add(self._path / str(step), sealing.METRICS, json.dumps(metrics))
        processes.gather(None)  # all processes wait until they are written
        self._manager.reload()  # otherwise they would not count when the best is selected

    def wait(self) -> None:
        """Waits until the last checkpoint is complete and sealed; raises UserError if it cannot be written."""
        with self.writing():
            self._finish()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raises UserError if its body fails because the disk refuses it, the folder is gone, or the hold is lost."""
        with self._presence.needed(), refused_by_disk(self.refusal):  # Orbax would make a deleted folder again
            try:
                yield
            except Exception:
                with contextlib.suppress(StoreError):  # a workdir that was deleted or taken over is the better reason
                    self._hold.renew(_ASK_SECONDS)
                raise

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
        """Seals a checkpoint once it is complete; does nothing if its save failed."""
        while self._manager.is_saving_in_progress():
            time.sleep(_POLL_SECONDS)
        folder = self._path / str(step)
        try:
            written = sealing.complete(folder)
        except OSError as error:
            self._unsealed = error
            return
        if written and not self.gone:
            self._incomplete = None
            try:
                self._hold.check()
                sealing.seal(folder)
            except (OSError, UserError) as error:
                self._unsealed = error

    def _clear(self) -> None:
        """Removes the parts of a checkpoint that was not completed, once the threads that write them have ended."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while any(thread.is_alive() for thread in self._writers) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        deadline = time.monotonic() + _CLEAR_SECONDS  # TensorStore's own threads may still write
        while self._first_process and time.monotonic() < deadline:
            sealing.remove_unfinished(self._path)
            # A complete or sealed checkpoint of this name is a copy, or another run's, that somebody put there.
            if self._incomplete is not None and not sealing.sealed(self._path / str(self._incomplete)):
                self._presence.remove_remade(str(self._incomplete))
            time.sleep(_POLL_SECONDS)

    def refusal(self, reason: str) -> str:
        """The line of an error for the disk's reason; no further checkpoint is written."""
        self._refused = True
        if storage.is_bucket(self._path):  # nothing is asked of it, because it may not answer for minutes
            return (
                f"a checkpoint cannot be written to {self._path}: {reason}; start again: the run resumes from its last "
                "checkpoint"
            )
        steps = saved_steps(self._path)
        sealed = [step for step in steps if sealing.sealed(self._path / str(step))]
        last = next((f"step {step}" for step in reversed(sealed or steps)), "the start")
        return (
            f"a checkpoint cannot be written to {self._path}: {reason}; free space or grant write permission, and "
            f"start again: the run resumes from {last}"
        )

    def close(self, *, clear: bool) -> None:
        """Ends the watch of the folder.

        clear: removes what is left of a checkpoint that the disk refused. A bucket may not answer, or have another run
          by now: there the next start removes what is not complete.
        """
        if clear and not storage.is_bucket(self._path) and (self._refused or self.gone):
            self._clear()
        self._presence.close()

    @property
    def gone(self) -> bool:
        """True if the folder has been deleted or replaced during the run."""
        return self._presence.gone


def saved_steps(path: pathlib.Path) -> list[int]:
    """The saved steps in a folder of checkpoints, oldest first; empty if it does not exist."""
    if storage.is_bucket(path):
        return sealing.steps_in_bucket(path)
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []
