"""An iterator that runs ahead in a thread."""

from collections.abc import Callable, Iterator
import queue
import threading
from typing import Any


class Background:
    """Runs an iterator in a thread, so that waiting for it can have a limit.

    `finish` is applied to each item there, before anybody waits for it.
    """

    def __init__(self, iterator: Iterator[Any], finish: Callable[[Any], Any]):
        self._finish = finish
        self._queue: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iterator,), daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> Any:
        """The next item, or what the iterator raised; queue.Empty if nothing came in time."""
        item = self._queue.get(timeout=timeout)
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self, timeout: float) -> bool:
        """Tells the thread to end; returns whether it did so in time."""
        self._closed.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        while not self._queue.empty():  # what lies in shared memory is freed with its batch
            self._queue.get()
        return True

    def _run(self, iterator: Any) -> None:
        try:
            for item in iterator:
                finished = self._finish(item)
                del item  # or it would take up its memory until the next one is there
                if not self._put(finished):
                    break
        except BaseException as error:  # handed to the thread that waits
            self._put(error)
        iterator.close()

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False
