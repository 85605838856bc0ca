"""How fast a run is, and how long it will take."""

from collections.abc import Iterator
import contextlib
import datetime
import time


class Clock:
    """Step time, throughput and time spent waiting for data, without evaluation.

    Args:
      batch_size: of the global batch.
      start: step that the run starts at.
      total: step that it ends at.
    """

    def __init__(self, *, batch_size: int, start: int, total: int):
        self._batch_size, self._last_step, self._total = batch_size, start, total
        self._waited = self._excluded = 0.0
        self._began = self._step_time = 0.0

    def start(self) -> None:
        """Begins the first lap."""
        self._began = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside."""
        began = time.monotonic()
        yield
        self._excluded += time.monotonic() - began

    def lap(self, step: int) -> dict[str, float]:
        """Means of the steps since the last lap: seconds, images/s and share of waiting."""
        now = time.monotonic()
        spent = max(now - self._began - self._excluded, 1e-9)
        steps = step - self._last_step
        self._step_time = spent / steps
        means = {
            "step_seconds": self._step_time,
            "images_per_second": steps * self._batch_size / spent,
            "input_wait": self._waited / spent,
        }
        self._began, self._last_step = now, step
        self._waited = self._excluded = 0.0
        return means

    def remaining(self, step: int) -> str:
        """How long the rest will take at the last lap's rate, as h:mm:ss."""
        seconds = (self._total - step) * self._step_time
        return str(datetime.timedelta(seconds=round(seconds)))
