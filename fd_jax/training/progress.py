"""Metrics of the steps since the last line of the log."""

from typing import Any

import jax

from fd_jax import metrics
from fd_jax.errors import UserError
from fd_jax.typing import Metrics


class NonFiniteError(UserError):
    """Loss or gradients were not finite for too many steps in a row."""


class Progress:
    """Sums up metrics and counts successive steps that were not finite.

    Args:
      record: result of `record` to continue from; {} at the start of a run.

    Attributes:
      nonfinite_in_a_row: number of latest successive steps whose loss or gradients were not finite.
    """

    def __init__(self, record: dict[str, Any]):
        self._window = metrics.Mean(record.get("window"))
        self.nonfinite_in_a_row: int = record.get("nonfinite_in_a_row", 0)

    def add(self, step_metrics: Metrics) -> bool:
        """Adds the metrics of one step; returns whether any host has to stop.

        Waits for the device. The other metrics of a step that was not finite are ignored.
        """
        values = jax.device_get(step_metrics)
        nonfinite = values["nonfinite"][0] > 0
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if nonfinite else 0
        if nonfinite:
            values = {"nonfinite": values["nonfinite"], "stop": values["stop"]}
        self._window.add(values)
        return bool(values["stop"][0] > 0)

    def means(self) -> dict[str, float]:
        """Returns the means since the last call, and starts a new window."""
        means = self._window.result()
        self._window = metrics.Mean()
        means.pop("stop", None)
        return means

    def record(self) -> dict[str, Any]:
        """Returns the JSON-serializable state for a checkpoint.

        With it, the next line of a resumed run is the same as that of an unbroken run.
        """
        return {"window": self._window.totals(), "nonfinite_in_a_row": self.nonfinite_in_a_row}
