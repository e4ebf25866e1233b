"""Throughput of a run and its time to the end."""

from collections.abc import Iterator, Mapping
import contextlib
import time


class Throughput:
    """Images per second since the last report, and the time to the end.

    Args:
      first: the step that the run starts after.
      last: the last step.
      batch_size: images per step.
    """

    def __init__(self, first: int, last: int, batch_size: int):
        self._last, self._batch_size = last, batch_size
        self.restart(first)

    def restart(self, step: int) -> None:
        """Restarts the clock after a pause for evaluation."""
        self._step, self._time, self._rate = step, time.monotonic(), float("nan")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time of its body."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._time += time.monotonic() - start

    def images_per_second(self, step: int) -> float:
        """The rate since the last call or restart; the first includes compilation."""
        now = time.monotonic()
        if step > self._step:
            self._rate = (step - self._step) * self._batch_size / max(now - self._time, 1e-9)
            self._step, self._time = step, now
        return self._rate

    def line(self, step: int, means: Mapping[str, float]) -> str:
        """One line of losses, throughput and ETA; call `images_per_second(step)` first."""
        losses = ", ".join(f"{k.removeprefix('loss/')} {v:.4g}" for k, v in means.items() if k.startswith("loss/"))
        left = (self._last - step) * self._batch_size / self._rate
        pace = f"{self._rate:.3g} images/s  ETA {_span(left)}"
        return f"step {step}/{self._last}  loss {means['loss']:.4g} ({losses})  {pace}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
