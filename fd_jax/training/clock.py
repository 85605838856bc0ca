"""Throughput of a run, and the estimate of its remaining time."""

import collections
from collections.abc import Iterator
import contextlib
import datetime
import statistics
import time

LAPS = 5  # of which the remaining time is estimated: a single one jumps after an evaluation


class Clock:
    """Measures step time, throughput and time spent waiting for data; evaluation is left out.

    Args:
      batch_size: number of examples in the global batch.
      start: step at which the run starts.
      total: step at which the run ends.
    """

    def __init__(self, *, batch_size: int, start: int, total: int):
        self._batch_size, self._last_step, self._total = batch_size, start, total
        self._waited = self._excluded = 0.0
        self._lap_start = 0.0
        self._step_times = collections.deque[float](maxlen=LAPS)
        self._first_step, self._run_start, self._run_excluded = start, 0.0, 0.0

    def start(self) -> None:
        """Starts the first lap."""
        self._lap_start = self._run_start = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside the context as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside the context."""
        start = time.monotonic()
        yield
        self._excluded += time.monotonic() - start
        self._run_excluded += time.monotonic() - start

    def lap(self, step: int) -> dict[str, float]:
        """Ends a lap and starts the next one.

        Returns:
          Means over the steps of the lap: seconds per step, images per second, and the share of the
          time spent waiting for data.
        """
        now = time.monotonic()
        elapsed = max(now - self._lap_start - self._excluded, 1e-9)
        steps = step - self._last_step
        self._step_times.append(elapsed / steps)
        means = {
            "step_seconds": elapsed / steps,
            "images_per_second": steps * self._batch_size / elapsed,
            "input_wait": self._waited / elapsed,
        }
        self._lap_start, self._last_step = now, step
        self._waited = self._excluded = 0.0
        return means

    def expected(self, step: int) -> str:
        """Estimates the time of all steps of this run from those until `step`, as h:mm:ss."""
        elapsed = time.monotonic() - self._run_start - self._run_excluded
        done, total = step - self._first_step, self._total - self._first_step
        return str(datetime.timedelta(seconds=round(elapsed / done * total)))

    def remaining(self, step: int) -> str:
        """Estimates the time to the end, as h:mm:ss, at the median rate of the last laps."""
        seconds = (self._total - step) * statistics.median(self._step_times)
        return str(datetime.timedelta(seconds=round(seconds)))
