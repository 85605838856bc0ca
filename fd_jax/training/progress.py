"""What the steps since the last line of the log have measured."""

from typing import Any

import jax

from fd_jax import metrics
from fd_jax.errors import UserError
from fd_jax.typing import Metrics


class NonFiniteError(UserError):
    """Loss or gradients were not finite for too many steps in a row."""


class Progress:
    """Sums of the metrics, and how many steps in a row were not finite.

    Args:
      record: of `record`, to go on from; {} at the start of a run.

    Attributes:
      nonfinite_in_a_row: steps up to the last one whose loss or gradients were not finite.
    """

    def __init__(self, record: dict[str, Any]):
        self._window = metrics.Mean(record.get("window"))
        self.nonfinite_in_a_row: int = record.get("nonfinite_in_a_row", 0)

    def add(self, step_metrics: Metrics) -> bool:
        """Takes in the metrics of one step; returns whether some host was told to stop.

        Waits for the device. Of a step that was not finite only that it was is counted.
        """
        found = jax.device_get(step_metrics)
        bad = found["nonfinite"][0] > 0
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if bad else 0
        if bad:
            found = {"nonfinite": found["nonfinite"], "stop": found["stop"]}
        self._window.add(found)
        return bool(found["stop"][0] > 0)

    def means(self) -> dict[str, float]:
        """Means since the last call, which begins a new window."""
        means = self._window.result()
        self._window = metrics.Mean()
        means.pop("stop", None)
        return means

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the next line is that of an unbroken run; JSON-able."""
        return {"window": self._window.totals(), "nonfinite_in_a_row": self.nonfinite_in_a_row}
