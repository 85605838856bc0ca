"""JAX's profile of some whole steps."""

from typing import Any

from etils import epath
import jax

STEPS_BEFORE = 5  # steps that a trace waits, so that it shows none of the start-up


class Trace:
    """Profiles some steps of a run, evaluation and saving left out.

    Args:
      folder: receives the profile.
      steps: how many are traced; 0 for none.
      start: step that the run starts at.
      total: step that it ends at.
    """

    def __init__(self, folder: epath.Path, *, steps: int, start: int, total: int):
        self._folder, self._running = folder, False
        self._steps = range(0)
        if steps:
            first = max(start, min(start + STEPS_BEFORE, total - steps))
            self._steps = range(first, min(first + steps, total))

    def before(self, step: int, state: Any) -> None:
        """Starts before the first traced step, when the device is done with those before."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            # Its tracer of Python walks the interpreter's threads without their lock: one that
            # Orbax's writer starts at that moment crashes the process.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """Stops after the last traced step, when the device is done with it."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
