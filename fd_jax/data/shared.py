"""Memory through which worker processes hand batches to the main process."""

from collections.abc import Sequence
import math
import mmap
import os
from typing import Any
import weakref

from absl import logging
import numpy as np

from fd_jax.data import elements
from fd_jax.data.elements import Element, Elements, Row

_Identity = tuple[int, int]  # of a file: device and inode


class SharedBatches:
    """A ring of slots for batches, in memory that processes share.

    Batch k lies in slot k mod `slots`, which is free again when nothing in the main process looks
    at it any more. So the same pages serve all the time; new ones for every batch would cost many
    times as much as copying the pictures (docs/performance.md, Input). Nobody waits for a slot:
    while it is used, and where memory cannot be shared, a batch travels by itself.

    The memory has no name. It takes no room in /dev/shm and is gone when the last process that
    looks at it is, however that one ended. It is had on Linux alone, by processes that the main
    one starts anew: a fork of it would free slots that are still looked at.

    Args:
      slots: batches that fit. A batch and the one `slots` later must come from one process.
      elements: of a batch.
      rows: of a batch.
    """

    def __init__(self, slots: int, elements: Elements, rows: int):
        self._slots, self._elements, self._rows = slots, dict(elements), rows
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

    def put(self, number: int, rows: Sequence[Row]) -> int | dict[str, np.ndarray]:
        """Stacks batch `number`, in a worker; returns its slot, or the batch if that is used.

        Raises:
          KeyError, ValueError, TypeError: the rows are not what `elements` says; see
            `elements.stack`.
        """
        if len(rows) != self._rows:
            raise ValueError(f"a batch of {len(rows)} rows in memory for {self._rows}")
        slot = number % self._slots
        if self._memory is None or self._used[slot]:
            return elements.stack(rows, self._elements)
        elements.stack(rows, self._elements, out=self._batch(slot)[1])
        self._used[slot] = True
        return slot

    def take(self, batch: int | dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What `put` returned, as a batch, in the main process.

        The slot stays used as long as any array of it lives, or any that looks at its memory.
        """
        if isinstance(batch, dict):
            return batch
        memory, arrays = self._batch(batch)
        weakref.finalize(memory, self._used.__setitem__, batch, False).atexit = False
        return arrays

    def close(self) -> None:
        """Lets no further process in; what was taken stays."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "slots": self._slots,
            "elements": self._elements,
            "rows": self._rows,
            "where": self._where,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._slots, self._elements = state["slots"], state["elements"]
        self._rows = state["rows"]
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
        self._used = np.ndarray(self._slots, bool, self._memory)

    @property
    def _size(self) -> int:
        return _pages(self._slots) + self._slots * self._stride

    @property
    def _stride(self) -> int:
        """Bytes from one slot to the next; whole pages for each element."""
        return sum(_pages(self._bytes(element)) for element in self._elements.values())

    def _bytes(self, element: Element) -> int:
        return self._rows * math.prod(element.shape) * np.dtype(element.dtype).itemsize

    def _batch(self, slot: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """All of a slot's memory as bytes, and the arrays in it, each of which keeps it alive."""
        # A new array each time, whose base is no array: NumPy lets views keep it alive.
        start = _pages(self._slots) + slot * self._stride
        memory = np.ndarray(self._stride, np.uint8, self._memory, start)
        arrays, offset = {}, 0
        for name, element in self._elements.items():
            size = self._bytes(element)
            flat = memory[offset : offset + size].view(element.dtype)
            arrays[name] = flat.reshape(self._rows, *element.shape)
            offset += _pages(size)
        return memory, arrays


def _identity(file: int) -> _Identity:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _warn(error: OSError) -> None:
    logging.warning("batches of data workers go through a pipe, which is slower: %s", error)


def _pages(size: int) -> int:
    """`size` bytes rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
