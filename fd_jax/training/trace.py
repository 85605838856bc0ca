"""Profiling of some steps of a run with the JAX profiler."""

from typing import Any

from etils import epath
import jax

STEPS_BEFORE = 5  # steps before the trace starts, so that it does not show the start-up


class Trace:
    """Profiles some successive steps of a run.

    Args:
      folder: folder that receives the profile.
      steps: number of steps to trace; 0 for none.
      start: step at which the run starts.
      total: step at which the run ends.
    """

    def __init__(self, folder: epath.Path, *, steps: int, start: int, total: int):
        self._folder, self._running = folder, False
        self._steps = range(0)
        if steps:
            first = max(start, min(start + STEPS_BEFORE, total - steps))
            self._steps = range(first, min(first + steps, total))

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before its first step, once the device has finished earlier steps."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            # The Python tracer walks the threads of the interpreter without holding their lock. If
            # the writer of Orbax starts a thread at that moment, the process crashes.
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._folder), profiler_options=options)
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """Stops the trace after its last step, once the device has finished it."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Stops the trace if it is still running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
