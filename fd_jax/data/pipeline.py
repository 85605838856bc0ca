"""Batches in a fixed order: global batch k is a function of the seed and k alone.

Grain reads ahead; which example comes where is arithmetic on the step, so a run resumes by
starting at its step, and every host can produce just its own rows.
"""

import atexit
from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import threading
from typing import Any, NamedTuple, Protocol

from absl import flags, logging
import grain
import numpy as np

from fd_jax.data import elements
from fd_jax.data.background import Background
from fd_jax.data.datasets import BrokenImageError, Dataset, SkippedError
from fd_jax.data.elements import Elements, Row
from fd_jax.data.shared import SharedBatches
from fd_jax.errors import DataError, HangError
from fd_jax.typing import Batch

HostBatch = dict[str, Any]

_FOREVER = 2**48
_AHEAD = 2  # batches that wait, decoded, for the step
_CHUNK = 4  # rows that a thread reads in one go: handing over each would cost a tenth of its time
_HELD = 4  # batches in the main process: taken up, waiting, being trained on, and the last one
_GOODBYE = 2.0  # seconds that workers get to end by themselves
_WORKER = "grain-process-prefetch"  # how Grain's worker processes are named

# What a random stream is for, so that no two purposes share one.
_ORDER, _AUGMENT, _EVALUATE = range(1, 4)
_ORDER_LOCK = threading.Lock()


class Transform(Protocol):
    """From an example, as the dataset gives it, to a row of a batch.

    Attributes:
      elements: what a row holds.
    """

    @property
    def elements(self) -> Elements:
        """Name, shape, dtype and padding of what `__call__` returns."""
        ...

    def __call__(self, example: Any, rng: np.random.Generator, /) -> Row:
        """The arrays and numbers of `elements`.

        Raises:
          BrokenImageError: the picture cannot be decoded.
        """
        ...


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Full batches in one pass over a dataset.

    Raises:
      DataError: there is not even one.
    """
    steps = len(dataset) // batch_size
    if not steps:
        raise DataError(
            f"{dataset.name} has {len(dataset)} examples, fewer than one batch of {batch_size}; "
            f"lower batch_size to at most {len(dataset)}"
        )
    return steps


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of one epoch. -> int64 [size]."""
    return _rng(_ORDER, seed, epoch).permutation(size)


class TrainLoader:
    """Endless training batches.

    Args:
      dataset: examples.
      transform: what makes a row of an example.
      batch_size: of the global batch.
      seed: of order and augmentation.
      rows: of each global batch that this process produces, ascending; None for all.
      start_step: the first global batch.
      threads: that decode in each process.
      workers: processes; 0 decodes in this one.
      max_broken: unreadable pictures that are replaced before the run stops.
      timeout: seconds without a batch after which reading counts as stuck.
      put_on_devices: what becomes of a batch in the thread that reads ahead; it stays as it is if
        not given.

    Yields:
      The transform's elements, "weight" float32 [n] of ones and "index" int32 [n], the position
      in the dataset, n = len(rows); or what `put_on_devices` makes of it.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        rows: np.ndarray | None = None,
        start_step: int = 0,
        threads: int = 16,
        workers: int = 0,
        max_broken: int = 100,
        timeout: float = 600.0,
        put_on_devices: Callable[[HostBatch], Batch] | None = None,
    ):
        self.steps_per_epoch = steps_per_epoch(dataset, batch_size)
        self.replaced: dict[int, str] = {}
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._max_broken, self._timeout = max_broken, timeout
        self._start, self._step = start_step, start_step
        self._pids: dict[int, int] = {}  # of workers that have delivered
        rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._workers = workers
        self._shared: SharedBatches | None = None
        if workers:
            self._shared = SharedBatches(
                shared_slots(workers), elements.of_batch(transform.elements), len(rows)
            )
        self._reads = _Reads(
            dataset, transform, batch_size, seed, rows, start_step, max(workers, 1), max_broken
        )
        self._put_on_devices = put_on_devices or (lambda batch: batch)
        self._others = {child.pid for child in multiprocessing.active_children()}
        atexit.register(self.close)  # Python would wait for workers that were never told to stop
        ahead = _read_ahead(self._reads, threads, workers, self._shared)
        self._batches = Background(ahead, self._deliver)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          HangError: nothing came in time.
          DataError: too many broken pictures, or a worker that died.
        """
        try:
            delivery = self._batches.get(self._timeout)
        except queue.Empty:
            raise HangError(
                f"no batch for step {self._step} within {self._timeout:.0f} s: {self._culprit()}. "
                "Either the storage hangs or that process is stuck; start the same command again "
                "once it answers"
            ) from None
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # Grain's word for a process that died
                raise
            raise DataError(
                f"a data worker died before step {self._step}: {self._culprit()}. {error} "
                "If memory ran out, lower data.workers (docs/running.md#input-pipeline)"
            ) from error
        self._pids[(self._step - self._start) % max(self._workers, 1)] = delivery.pid
        self._note_broken(delivery.broken)
        self._step += 1
        return delivery.batch

    def indices(self, step: int) -> np.ndarray:
        """Positions in the dataset of global batch `step`, before replacements. -> [B]."""
        return self._reads.indices(step)

    def state(self, step: int) -> dict[str, Any]:
        """The position of global batch `step`, JSON-able; hosts differ in "replaced" alone."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return {"epoch": epoch, "batch": batch, "replaced": sorted(self.replaced)}

    def close(self) -> None:
        """Stops reading ahead and ends the worker processes."""
        atexit.unregister(self.close)
        ended = self._batches.close(_GOODBYE)
        if self._shared is not None:
            self._shared.close()
        if ended:
            self._shared = None  # what was taken holds on to its memory
            return
        for child in multiprocessing.active_children():
            if child.name.startswith(_WORKER) and child.pid not in self._others:
                child.kill()

    def _deliver(self, batch: "_Stacked") -> "_Delivery":
        arrays = batch.arrays if self._shared is None else self._shared.take(batch.arrays)
        return _Delivery(self._put_on_devices(arrays), batch.pid, batch.broken)

    def _culprit(self) -> str:
        """Who was to deliver the next batch."""
        if not self._workers:
            return self._reads.in_flight()
        worker = (self._step - self._start) % self._workers
        process = f"process {self._pids[worker]}" if worker in self._pids else "not heard of yet"
        return f"it was the turn of data worker {worker} of {self._workers} ({process})"

    def _note_broken(self, broken: list[tuple[int, str]]) -> None:
        for index, reason in broken:
            if index not in self.replaced:
                self.replaced[index] = reason
                logging.warning(
                    "replaced broken image %s: %s", self._dataset.describe(index), reason
                )
        if len(self.replaced) > self._max_broken:
            raise _too_many(self._dataset, self.replaced.items(), self._max_broken)


def shared_slots(workers: int) -> int:
    """Batches that can be on their way from so many workers at once, a multiple of them."""
    # Grain keeps _AHEAD of each worker on either side of the pipe, and one that waits for room.
    return workers * (2 * (_AHEAD + 1) + -(-_HELD // workers))


def eval_batches(
    dataset: Dataset,
    transform: Transform,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    limit: int | None = None,
    threads: int = 16,
    max_broken: int = 0,
) -> Iterator[HostBatch]:
    """Every example once, in order, as batches like `TrainLoader`'s.

    The last batch is padded, so that all hosts see the same number of batches of the same size:
    padding has weight 0, index -1 and otherwise what its elements say. A broken picture keeps its
    index and becomes such padding, and is named in the log.

    Args:
      dataset: examples.
      transform: what makes a row of an example.
      batch_size: of the global batch.
      rows: of each global batch that this process produces; None for all.
      limit: number of batches at most.
      threads: that decode.
      max_broken: unreadable pictures that are left out before it stops.

    Raises:
      DataError: more broken pictures than that.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    count = -(-len(dataset) // batch_size)
    count = min(count, limit) if limit else count
    specified = elements.of_batch(transform.elements)
    padding = elements.padding(specified)

    def load(index: int) -> _Record:
        if index >= len(dataset):
            return _Record(padding, ())
        try:
            row = transform(dataset[index], _rng(_EVALUATE, index))
            return _Record({**row, "weight": 1.0, "index": index}, ())
        except SkippedError:
            return _Record({**padding, "index": index}, ())
        except BrokenImageError as error:
            return _Record({**padding, "index": index}, ((index, str(error)),))

    chunks = _chunks(rows)

    def load_chunk(position: int) -> _Chunk:
        step, chunk = divmod(position, len(chunks))
        return _Chunk(step, [load(step * batch_size + row) for row in chunks[chunk]])

    reads = grain.MapDataset.range(count * len(chunks)).map(load_chunk)
    left_out: list[tuple[int, str]] = []
    for batch in _batches(reads, len(chunks), threads, specified):
        for index, reason in batch.broken:
            logging.warning("evaluation leaves out %s: %s", dataset.describe(index), reason)
        left_out += batch.broken
        if len(left_out) > max_broken:
            raise _too_many(dataset, left_out, max_broken)
        yield batch.arrays


class _Record(NamedTuple):
    """One row of a batch, and the broken examples (index, reason) that it replaces."""

    row: Row
    broken: tuple[tuple[int, str], ...]


class _Chunk(NamedTuple):
    """Some rows of a batch, which is the `batch`-th since the start."""

    batch: int
    records: list[_Record]


class _Stacked(NamedTuple):
    """A batch of this host, or its slot in shared memory, with what `_Delivery` says."""

    arrays: Any
    pid: int
    broken: list[tuple[int, str]]


class _Delivery(NamedTuple):
    """A batch as the loader hands it out, the process that made it, and what it replaced."""

    batch: Batch
    pid: int
    broken: list[tuple[int, str]]


class _Reads:
    """Random access to training records by their position in this host's endless sequence."""

    def __init__(self, dataset, transform, batch_size, seed, rows, start_step, workers, max_broken):
        self.dataset, self.transform = dataset, transform
        self.batch_size, self.seed = batch_size, seed
        self.chunks, self.start_step = _chunks(rows), start_step
        self.workers, self.max_broken = workers, max_broken
        self.steps_per_epoch = steps_per_epoch(dataset, batch_size)
        self._busy: dict[int, int] = {}

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, index: int) -> _Chunk:
        # Grain hands worker w the indices w, w + W, ... and takes batches from the workers in
        # turn. Numbered like this, each worker's run of len(chunks) indices is one whole batch.
        position, worker = divmod(index, self.workers)
        turn, chunk = divmod(position, len(self.chunks))
        number = turn * self.workers + worker
        epoch, batch = divmod(self.start_step + number, self.steps_per_epoch)
        first = batch * self.batch_size
        return _Chunk(number, [self._read(epoch, first + row) for row in self.chunks[chunk]])

    def _read(self, epoch: int, position: int) -> _Record:
        """The example at a position of an epoch's order, or the next one that can be read."""
        order = _order(self.seed, epoch, len(self.dataset))
        broken: list[tuple[int, str]] = []
        for candidate in range(position, position + len(order)):
            index = int(order[candidate % len(order)])
            self._busy[threading.get_ident()] = index
            try:
                row = self.transform(self.dataset[index], _rng(_AUGMENT, self.seed, epoch, index))
                return _Record({**row, "weight": 1.0, "index": index}, tuple(broken))
            except SkippedError:
                continue
            except BrokenImageError as error:
                broken.append((index, str(error)))
                if len(broken) > self.max_broken:
                    break
            finally:
                self._busy.pop(threading.get_ident(), None)
        raise _too_many(self.dataset, broken, self.max_broken)

    def indices(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.dataset))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def in_flight(self) -> str:
        busy = sorted(set(self._busy.values()))
        if not busy:
            return "no example is being read"
        return "being read: " + ", ".join(map(self.dataset.describe, busy[:5]))

    def __getstate__(self):
        return {**self.__dict__, "_busy": {}}  # goes to worker processes without its threads


def _too_many(dataset: Dataset, broken: Iterable[tuple[int, str]], allowed: int) -> DataError:
    listing = [f"{dataset.describe(index)}: {reason}" for index, reason in sorted(broken)]
    return DataError(
        "\n  ".join(
            [
                f"{len(listing)} broken images in {dataset.name}, more than "
                f"data.max_broken={allowed}; repair or remove them, or raise that number:",
                *listing,
            ]
        )
    )


def _read_ahead(
    reads: _Reads, threads: int, workers: int, shared: SharedBatches | None
) -> Iterator[_Stacked]:
    dataset = grain.MapDataset.source(reads)
    specified = elements.of_batch(reads.transform.elements)
    batches = _batches(dataset, len(reads.chunks), threads, specified, shared)
    if not workers:
        return iter(batches)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own where it starts processes
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
    # What is not in our shared memory goes through the pipe, and not into segments of Grain's.
    through_pipe = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    batches = grain.experimental.WithOptionsIterDataset(batches, through_pipe)
    return iter(batches.mp_prefetch(options, worker_init_fn=_begin_worker))


def _begin_worker(index: int, count: int) -> None:
    """In a worker: it ends with the main process, and not by a signal meant for that one.

    Who stops a run often signals all of its processes; the main process still wants the batches
    of the steps that it makes until it has saved.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _batches(
    reads: grain.MapDataset,
    chunks: int,
    threads: int,
    specified: Elements,
    shared: SharedBatches | None = None,
) -> grain.IterDataset:
    """Reads ahead; `chunks` of them make a batch, in shared memory if it is given."""
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * chunks)
    stack = functools.partial(_stack, specified=specified, shared=shared)
    return reads.to_iter_dataset(ahead).batch(chunks, batch_fn=stack)


def _chunks(rows: np.ndarray) -> list[list[int]]:
    return [rows[start : start + _CHUNK].tolist() for start in range(0, len(rows), _CHUNK)]


def _stack(
    chunks: Sequence[_Chunk], *, specified: Elements, shared: SharedBatches | None
) -> _Stacked:
    records = list(itertools.chain.from_iterable(chunk.records for chunk in chunks))
    rows = [record.row for record in records]
    arrays = (
        elements.stack(rows, specified) if shared is None else shared.put(chunks[0].batch, rows)
    )
    broken = list(itertools.chain.from_iterable(record.broken for record in records))
    return _Stacked(arrays, os.getpid(), broken)


def _rng(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@functools.lru_cache(maxsize=3)
def _cached_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return epoch_order(seed, epoch, size)


def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    with _ORDER_LOCK:  # or every thread would permute the new epoch
        return _cached_order(seed, epoch, size)
