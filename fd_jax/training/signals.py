"""Handling of SIGTERM, with which a scheduler preempts a run."""

from collections.abc import Callable, Iterator
import contextlib
import signal


@contextlib.contextmanager
def on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether SIGTERM arrived; restores the old handler on exit."""
    received = False

    def handle(signum, frame):
        nonlocal received
        received = True

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # only the main thread can set handlers; elsewhere the old one stays
        yield lambda: False
        return
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGTERM, previous)
