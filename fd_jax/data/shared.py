"""Memory through which worker processes hand batches of pictures to the main process."""

from collections.abc import Sequence
import math
import mmap
import os
from typing import Any
import weakref

from absl import logging
import numpy as np

_Identity = tuple[int, int]  # of a file: device and inode


class SharedBatches:
    """A ring of places for batches, in memory that processes share.

    Batch k lies in place k mod `places`, which is free again when nothing in the main process
    looks at it any more. So the same pages serve all the time; new ones for every batch would cost
    many times as much as copying the pictures (docs/performance.md, Input). Nobody waits for a
    place: while it is used, and where memory cannot be shared, a batch travels by itself.

    The memory has no name. It takes no room in /dev/shm and is gone when the last process that
    looks at it is, however that one ended. It is had on Linux alone, by processes that the main
    one starts anew: a fork of it would free places that are still looked at.

    Args:
      places: batches that fit. A batch and the one `places` later must come from one process.
      shape: of a batch, [n, S, S, 3]; uint8.
    """

    def __init__(self, places: int, shape: Sequence[int]):
        self._places, self._shape = places, tuple(shape)
        self._memory: mmap.mmap | None = None
        self._file: int | None = None
        self._where: tuple[str, _Identity] | None = None  # where other processes find the file
        if not hasattr(os, "memfd_create"):
            return
        try:
            self._file = os.memfd_create("fd_jax-batches")
            os.truncate(self._file, self._size)
            self._map(self._file)
            self._where = (f"/proc/{os.getpid()}/fd/{self._file}", _identity(self._file))
        except OSError as error:
            _warn(error)

    def put(self, number: int, pictures: Sequence[np.ndarray]) -> int | np.ndarray:
        """Stacks batch `number`, in a worker; returns its place, or the batch if that is used.

        Raises:
          ValueError: the pictures have another shape.
          TypeError: they are not uint8.
        """
        place = number % self._places
        shared = self._memory is not None and not self._used[place]
        batch = self._batch(place) if shared else np.empty(self._shape, np.uint8)
        np.stack(pictures, out=batch, casting="no")
        if not shared:
            return batch
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
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self._places, "shape": self._shape, "where": self._where}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._places, self._shape = state["places"], state["shape"]
        self._memory = self._file = None
        self._where = state["where"]
        if self._where is None:
            return
        path, identity = self._where
        try:
            file = os.open(path, os.O_RDWR)
            try:
                if _identity(file) != identity:  # closed, and the number is another file's
                    raise FileNotFoundError(f"the memory is no longer at {path}")
                self._map(file)
            finally:
                os.close(file)
        except OSError as error:
            _warn(error)

    def _map(self, file: int) -> None:
        self._memory = mmap.mmap(file, self._size)
        self._used = np.ndarray(self._places, bool, self._memory)

    @property
    def _size(self) -> int:
        return _pages(self._places) + self._places * self._stride

    @property
    def _stride(self) -> int:
        return _pages(math.prod(self._shape))

    def _batch(self, place: int) -> np.ndarray:
        # A new array each time, whose base is no array: NumPy lets views keep it alive.
        start = _pages(self._places) + place * self._stride
        return np.ndarray(self._shape, np.uint8, self._memory, start)


def _identity(file: int) -> _Identity:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _warn(error: OSError) -> None:
    logging.warning("batches of data workers go through a pipe, which is slower: %s", error)


def _pages(size: int) -> int:
    """`size` bytes rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
