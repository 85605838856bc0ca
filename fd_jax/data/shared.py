"""Shared memory through which worker processes pass batches to the main process."""

from collections.abc import Sequence
import math
import mmap
import os
from typing import Any, NamedTuple
import weakref

from absl import logging
import numpy as np

from fd_jax.data import elements
from fd_jax.data.elements import Element, Elements, Row

_FileId = tuple[int, int]  # device and inode of a file


class SharedBatches:
    """A ring of slots for batches, in memory that the processes share.

    Batch k goes into slot k mod `slots`, which becomes free once nothing in the main process refers
    to it any more. The same pages are therefore used again and again; new pages for every batch
    would cost many times as much as copying the images (docs/performance.md, Input). No process
    waits for a slot: if it is in use, or if memory cannot be shared, the batch is returned as
    ordinary arrays and goes through the pipe.

    The memory has no name. It takes no room in /dev/shm and disappears with the last process that
    maps it, however that process ended. It works on Linux only, and only for processes that are
    spawned: a fork of the main process would free slots that are still in use.

    Args:
      slots: number of batches that fit. Batches k and k + `slots` must come from the same process.
      elements: specification of the largest batch.
      rows: number of rows in a batch.
    """

    def __init__(self, slots: int, elements: Elements, rows: int):
        self._slots, self._elements, self._rows = slots, dict(elements), rows
        self._memory: mmap.mmap | None = None
        self._file: int | None = None
        # The path at which other processes open the file, and which file they must find there.
        self._location: tuple[str, _FileId] | None = None
        if not hasattr(os, "memfd_create"):
            return
        try:
            self._file = os.memfd_create("fd_jax-batches")
            os.truncate(self._file, self._size)
            self._map(self._file)
            self._location = (f"/proc/{os.getpid()}/fd/{self._file}", _file_id(self._file))
        except OSError as error:
            _warn(error)

    def put(
        self, number: int, rows: Sequence[Row], specified: Elements | None = None
    ) -> "Held | dict[str, np.ndarray]":
        """Stacks batch `number`. Called in a worker.

        Args:
          number: number of the batch.
          rows: its rows.
          specified: its elements, none of them larger than those of the memory; None for those.

        Returns:
          Where the batch is held, or the batch itself if its slot is in use.

        Raises:
          KeyError, ValueError, TypeError: the rows do not match the specification; see
            `elements.stack`.
        """
        if len(rows) != self._rows:
            raise ValueError(f"the batch has {len(rows)} rows, its memory is for {self._rows}")
        contents: Elements = self._elements if specified is None else dict(specified)
        held = Held(number % self._slots, contents)
        if self._memory is None or self._used[held.slot]:
            return elements.stack(rows, contents)
        elements.stack(rows, contents, out=self._batch(held)[1])
        self._used[held.slot] = True
        return held

    def take(self, batch: "Held | dict[str, np.ndarray]") -> dict[str, np.ndarray]:
        """Returns the batch for a result of `put`. Called in the main process.

        The slot stays in use as long as any of its arrays, or any view of them, is alive.
        """
        if isinstance(batch, dict):
            return batch
        memory, arrays = self._batch(batch)
        weakref.finalize(memory, self._used.__setitem__, batch.slot, False).atexit = False
        return arrays

    def close(self) -> None:
        """Stops further processes from opening the memory; batches already taken stay valid."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "slots": self._slots,
            "elements": self._elements,
            "rows": self._rows,
            "location": self._location,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._slots, self._elements = state["slots"], state["elements"]
        self._rows = state["rows"]
        self._memory = self._file = None
        self._location = state["location"]
        if self._location is None:
            return
        path, file_id = self._location
        try:
            file = os.open(path, os.O_RDWR)
            try:
                if _file_id(file) != file_id:  # it was closed and another file got its number
                    raise FileNotFoundError(f"{path} is no longer the shared memory")
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
        """Bytes from one slot to the next; each element takes whole pages."""
        return sum(_pages(self._bytes(element)) for element in self._elements.values())

    def _bytes(self, element: Element) -> int:
        return self._rows * math.prod(element.shape) * np.dtype(element.dtype).itemsize

    def _batch(self, held: "Held") -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns the memory of a slot as bytes, and the arrays in it, which keep it alive."""
        # This has to be a new array, whose base is not an array: then it is the base of the views,
        # and they keep it alive.
        start = _pages(self._slots) + held.slot * self._stride
        memory = np.ndarray(self._stride, np.uint8, self._memory, start)
        arrays, offset = {}, 0
        # By name, since Grain sorts the dicts in what it passes on.
        for name, element in sorted(held.elements.items()):
            size = self._bytes(element)
            flat = memory[offset : offset + size].view(element.dtype)
            arrays[name] = flat.reshape(self._rows, *element.shape)
            offset += _pages(size)
        return memory, arrays


class Held(NamedTuple):
    """The slot of a batch, and what the batch holds."""

    slot: int
    elements: Elements


def _file_id(file: int) -> _FileId:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _warn(error: OSError) -> None:
    logging.warning("data workers send their batches through a pipe, which is slower: %s", error)


def _pages(size: int) -> int:
    """`size` bytes rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
