"""Work of minutes that Ctrl-C and SIGTERM end at once, with one line and without a trace.

While the compiler works in the main thread, Python cannot act on a signal, and libtpu's own handler
prints the stacks of all of its threads. So the compiler works in a thread of its own.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import contextvars
import os
import signal
import sys
import threading
import time
from typing import TypeVar

from fd_jax.console import say

T = TypeVar("T")
REMINDER = 60.0  # seconds between two lines that say that the work goes on


class StoppedError(KeyboardInterrupt):
    """A signal that ends the command.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def handle_signals() -> None:
    """Lets SIGINT and SIGTERM raise `StoppedError` in the main thread.

    To be called again after a library that sets handlers of its own is loaded.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise)


def _raise(number: int, frame: object) -> None:
    del frame
    raise StoppedError(number)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Ends the process when a signal arrives inside, with the status that shells give a signal."""
    try:
        handle_signals()
        yield
    except StoppedError as stopped:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        say(f"stopped by {signal.Signals(stopped.number).name}")
        sys.stdout.flush()
        os._exit(128 + stopped.number)  # a regular exit would wait for the compiler


def in_thread(work: Callable[[], T], name: str) -> T:
    """Returns what `work` returns, or raises what it raises, and says every minute that it goes on.

    Args:
      work: calls that take minutes outside of Python.
      name: what is done, for the lines that are printed.
    """
    result: futures.Future[T] = futures.Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result.set_result(context.run(work))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    began = time.monotonic()
    while not futures.wait([result], timeout=REMINDER).done:
        say(f"  still {name}, {(time.monotonic() - began) / 60:.0f} min so far")
    return result.result()
