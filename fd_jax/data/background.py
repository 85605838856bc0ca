"""An iterator that is read ahead in a thread."""

from collections.abc import Callable, Iterator
import queue
import threading
from typing import Any


class Background:
    """Runs an iterator in a thread, so that waiting for an item can time out.

    Args:
      iterator: source of the items.
      finish: function applied to each item in that thread, before the item is asked for.
    """

    def __init__(self, iterator: Iterator[Any], finish: Callable[[Any], Any]):
        self._finish = finish
        self._queue: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iterator,), daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> Any:
        """Returns the next item.

        Raises:
          queue.Empty: no item arrived within `timeout` seconds.
          BaseException: whatever the iterator raised.
        """
        item = self._queue.get(timeout=timeout)
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self, timeout: float) -> bool:
        """Asks the thread to stop; returns whether it did within `timeout` seconds."""
        self._closed.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        while not self._queue.empty():  # dropping a batch frees its slot of shared memory
            self._queue.get()
        return True

    def _run(self, iterator: Any) -> None:
        try:
            for item in iterator:
                finished = self._finish(item)
                del item  # otherwise its memory would stay in use until the next item arrives
                if not self._put(finished):
                    break
        except BaseException as error:  # raised again in the thread that waits
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
