"""SIGTERM, with which a scheduler says that a run has to make room."""

from collections.abc import Callable, Iterator
import contextlib
import signal


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM came since; the old handler comes back."""
    asked = False

    def handle(signum, frame):
        nonlocal asked
        asked = True

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not in the main thread: the process keeps its own handling
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, previous)
