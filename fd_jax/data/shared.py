"""Memory through which worker processes hand batches of pictures to the main process."""

from collections.abc import Sequence
import math
import mmap
import os
from typing import Any
import weakref

from absl import logging
import numpy as np


class SharedBatches:
    """A ring of places for batches, in memory that processes share.

    Batch k lies in place k mod `places`, which is free again when nothing in the main process
    looks at it any more. So the same pages serve all the time; new ones for every batch would cost
    several times as much as copying the pictures (docs/performance.md, Input). Nobody waits for a
    place: while it is used, and where the memory cannot be had, a batch travels by itself.

    The memory has no name. It takes no room in /dev/shm and is gone when the last process that
    looks at it is, however that one ended. It is had on Linux alone.

    Args:
      places: batches that fit. A batch and the one `places` later must come from one process.
      shape: of a batch, [n, S, S, 3]; uint8.
    """

    def __init__(self, places: int, shape: Sequence[int]):
        self._places, self._shape = places, tuple(shape)
        self._stride = _pages(math.prod(shape))
        self._file: int | None = None
        self._memory: mmap.mmap | None = None
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("fd_jax-batches")
            os.truncate(self._file, self._size)
            self._map(self._file)

    def put(self, number: int, pictures: Sequence[np.ndarray]) -> int | np.ndarray:
        """Stacks batch `number`, in a worker; returns its place, or the batch if that is used.

        Raises:
          ValueError: the pictures are not what a batch is made of.
        """
        place = number % self._places
        if self._memory is None or self._used[place]:
            return np.stack(pictures)
        np.stack(pictures, out=self._batch(place))
        self._used[place] = True
        return place

    def take(self, batch: int | np.ndarray) -> np.ndarray:
        """What `put` returned, as [n, S, S, 3], in the main process.

        The place stays used as long as this array lives, or any that looks at its memory.
        """
        if isinstance(batch, np.ndarray):
            return batch
        array = self._batch(batch)
        weakref.finalize(array, self._used.__setitem__, batch, False).atexit = False
        return array

    def close(self) -> None:
        """Lets no further process in; what was taken stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        status = None if self._file is None else os.fstat(self._file)
        return {
            "places": self._places,
            "shape": self._shape,
            "path": f"/proc/{os.getpid()}/fd/{self._file}",
            "identity": status and (status.st_dev, status.st_ino),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._places, self._shape = state["places"], state["shape"]
        self._stride = _pages(math.prod(self._shape))
        self._file = self._memory = None
        try:
            file = os.open(state["path"], os.O_RDWR)
        except FileNotFoundError:
            return  # closed by now
        except OSError as error:
            logging.warning("batches go through a pipe, which is slower: %s", error)
            return
        try:
            status = os.fstat(file)
            if (status.st_dev, status.st_ino) == state["identity"]:  # and not another's number
                self._map(file)
        finally:
            os.close(file)

    def _map(self, file: int) -> None:
        self._memory = mmap.mmap(file, self._size)
        self._used = np.ndarray(self._places, bool, self._memory)

    @property
    def _size(self) -> int:
        return _pages(self._places) + self._places * self._stride

    def _batch(self, place: int) -> np.ndarray:
        # A new array each time, whose base is no array: NumPy lets views keep it alive.
        start = _pages(self._places) + place * self._stride
        return np.ndarray(self._shape, np.uint8, self._memory, start)


def _pages(size: int) -> int:
    """`size` bytes rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
