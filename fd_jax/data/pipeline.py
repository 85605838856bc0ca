"""Batches in a fixed order: global batch k depends on the seed and k alone.

Grain reads ahead. The order of examples is computed from the step, so a run resumes by starting at
its step, and each host produces only its own rows.
"""

import atexit
from collections.abc import Callable, Iterable, Iterator, Sequence
import errno
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

from fd_jax.data import elements, randomness
from fd_jax.data.background import Background
from fd_jax.data.datasets import BrokenImageError, SkippedError, Source
from fd_jax.data.elements import Elements, Row
from fd_jax.data.shared import SharedBatches
from fd_jax.errors import DataError, HangError, StorageError
from fd_jax.typing import Batch

HostBatch = dict[str, Any]

_FOREVER = 2**48
_PREFETCH = 2  # decoded batches that wait for the step
_CHUNK = 4  # rows that a thread reads at a time; handing over single rows costs 10 % of its time
_IN_USE = 4  # batches in the main process: received, waiting, being trained on, and the last one
_SHUTDOWN_TIMEOUT = 2.0  # seconds that workers get to stop by themselves
_WORKER = "grain-process-prefetch"  # prefix of the names of Grain's worker processes
_ORDER_LOCK = threading.Lock()


class Transform(Protocol):
    """Turns an example, as the dataset returns it, into a row of a batch.

    Attributes:
      elements: specification of the row.
    """

    @property
    def elements(self) -> Elements:
        """Name, shape, dtype and padding of what `__call__` returns."""
        ...

    def __call__(self, example: Any, rng: np.random.Generator, /) -> Row:
        """Returns the arrays and numbers that `elements` specifies.

        Raises:
          BrokenImageError: the image cannot be decoded.
        """
        ...


def steps_per_epoch(dataset: Source, batch_size: int) -> int:
    """Number of full batches in one pass over a dataset.

    Raises:
      DataError: the dataset is smaller than one batch.
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
    return randomness.generator(randomness.ORDER, seed, epoch).permutation(size)


class TrainLoader:
    """An endless iterator over training batches.

    Args:
      dataset: source of the examples.
      transform: function that turns an example into a row.
      batch_size: number of examples in the global batch.
      seed: seed of order and augmentation.
      rows: sorted rows of each global batch that this process produces; None for all of them.
      start_step: number of the first global batch.
      threads: number of decoding threads in each process.
      workers: number of worker processes; 0 to decode in this process.
      max_broken: number of unreadable images that are replaced before the run stops.
      timeout: seconds without a batch after which reading counts as stuck.
      put_on_devices: function applied to each batch in the thread that reads ahead; None to leave
        batches as they are.
      transform_at: the transform of the global batch of a step, where they differ; none makes
        larger rows than `transform`. None for `transform` in all of them.

    Yields:
      The elements of the transform, "weight" float32 [n] (all ones) and "index" int32 [n] (the
      position in the dataset), where n = len(rows); or the result of `put_on_devices`.
    """

    def __init__(
        self,
        dataset: Source,
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
        transform_at: Callable[[int], Transform] | None = None,
    ):
        self.steps_per_epoch = steps_per_epoch(dataset, batch_size)
        self.replaced: dict[int, str] = {}
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._max_broken, self._timeout = max_broken, timeout
        self._start, self._step = start_step, start_step
        self._pids: dict[int, int] = {}  # worker -> process id, once it has delivered a batch
        rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._workers = workers
        self._shared: SharedBatches | None = None
        if workers:
            self._shared = SharedBatches(
                shared_slots(workers), elements.of_batch(transform.elements), len(rows)
            )
        self._reads = _Reads(
            dataset,
            transform_at or _Same(transform),
            batch_size=batch_size,
            seed=seed,
            rows=rows,
            start_step=start_step,
            workers=max(workers, 1),
            max_broken=max_broken,
        )
        self._put_on_devices = put_on_devices or (lambda batch: batch)
        self._unrelated = {child.pid for child in multiprocessing.active_children()}
        # Python would otherwise wait forever for workers that were never told to stop.
        atexit.register(self.close)
        ahead = _read_ahead(self._reads, threads, workers, self._shared)
        self._batches = Background(ahead, self._deliver)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          HangError: no batch arrived in time.
          DataError: there are too many broken images, or a worker died.
          StorageError: /dev/shm is too small for workers.
        """
        try:
            delivery = self._batches.get(self._timeout)
        except queue.Empty:
            raise HangError(
                f"no batch for step {self._step} within {self._timeout:.0f} s: {self._culprit()}. "
                "Either the storage hangs or that process is stuck; run the same command again "
                "once the storage responds"
            ) from None
        except OSError as error:
            # Locks are the only files without a name.
            if not self._workers or error.errno != errno.ENOSPC or error.filename is not None:
                raise
            raise StorageError(
                f"/dev/shm has no room for the locks of data.workers={self._workers}, which need "
                "0.1 MB each; enlarge it (docker run --shm-size=1g), or set data.workers=0"
            ) from error
        except RuntimeError as error:
            # This is how Grain reports a process that died.
            if "terminated unexpectedly" not in str(error):
                raise
            raise DataError(
                f"a data worker died before step {self._step}: {self._culprit()}. {error} "
                "If the machine ran out of memory, lower data.workers "
                "(docs/running.md#input-pipeline)"
            ) from error
        self._pids[(self._step - self._start) % max(self._workers, 1)] = delivery.pid
        self._note_broken(delivery.broken)
        self._step += 1
        return delivery.batch

    def indices(self, step: int) -> np.ndarray:
        """Positions in the dataset of the examples of global batch `step`. -> int64 [B]

        Replacements of broken examples are not included.
        """
        return self._reads.indices(step)

    def state(self, step: int) -> dict[str, Any]:
        """Position of global batch `step`, JSON-serializable.

        Only "replaced", the indices of the broken examples, differs between hosts.
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        return {"epoch": epoch, "batch": batch, "replaced": sorted(self.replaced)}

    def close(self) -> None:
        """Stops reading ahead and ends the worker processes."""
        atexit.unregister(self.close)
        stopped = self._batches.close(_SHUTDOWN_TIMEOUT)
        if self._shared is not None:
            self._shared.close()
        if stopped:
            self._shared = None  # batches that were handed out keep their memory alive
            return
        for child in multiprocessing.active_children():
            if child.name.startswith(_WORKER) and child.pid not in self._unrelated:
                child.kill()

    def _deliver(self, batch: "_Stacked") -> "_Delivery":
        arrays = batch.arrays if self._shared is None else self._shared.take(batch.arrays)
        return _Delivery(self._put_on_devices(arrays), batch.pid, batch.broken)

    def _culprit(self) -> str:
        """Describes the worker or the example that the next batch is waiting for."""
        if not self._workers:
            return self._reads.in_flight()
        worker = (self._step - self._start) % self._workers
        known = worker in self._pids
        process = f"process {self._pids[worker]}" if known else "it has delivered nothing yet"
        return f"waiting for data worker {worker} of {self._workers} ({process})"

    def _note_broken(self, broken: list[tuple[int, str]]) -> None:
        for index, reason in broken:
            if index not in self.replaced:
                self.replaced[index] = reason
                logging.warning(
                    "replaced broken image %s: %s", self._dataset.describe(index), reason
                )
        if len(self.replaced) > self._max_broken:
            raise _too_many_broken(self._dataset, self.replaced.items(), self._max_broken)


def shared_slots(workers: int) -> int:
    """Number of slots for all batches that can be in flight at once; a multiple of `workers`."""
    # For each worker, Grain keeps _PREFETCH batches on either side of the pipe, and one more that
    # waits for room.
    return workers * (2 * (_PREFETCH + 1) + -(-_IN_USE // workers))


def eval_batches(
    dataset: Source,
    transform: Transform,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    limit: int | None = None,
    threads: int = 16,
    max_broken: int = 0,
) -> Iterator[HostBatch]:
    """Yields every example once, in order, in batches like those of `TrainLoader`.

    The last batch is padded, so that all hosts see the same number of batches of the same size.
    Padding has weight 0, index -1, and the padding values of the other elements. A broken image is
    replaced by padding that keeps its index, and is named in the log.

    Args:
      dataset: source of the examples.
      transform: function that turns an example into a row.
      batch_size: number of examples in the global batch.
      rows: rows of each global batch that this process produces; None for all of them.
      limit: maximum number of batches; None for no limit.
      threads: number of decoding threads.
      max_broken: number of unreadable images that are left out before the evaluation stops.

    Raises:
      DataError: there are more than `max_broken` broken images.
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
            rng = randomness.generator(randomness.EVALUATE, index)
            row = transform(dataset[index], rng)
            return _Record({**row, "weight": 1.0, "index": index}, ())
        except SkippedError:
            return _Record({**padding, "index": index}, ())
        except BrokenImageError as error:
            return _Record({**padding, "index": index}, ((index, str(error)),))

    chunks = _chunks(rows)

    def load_chunk(position: int) -> _Chunk:
        step, chunk = divmod(position, len(chunks))
        records = [load(step * batch_size + row) for row in chunks[chunk]]
        return _Chunk(step, records, specified)

    reads = grain.MapDataset.range(count * len(chunks)).map(load_chunk)
    left_out: list[tuple[int, str]] = []
    for batch in _batches(reads, len(chunks), threads):
        for index, reason in batch.broken:
            logging.warning("evaluation leaves out %s: %s", dataset.describe(index), reason)
        left_out += batch.broken
        if len(left_out) > max_broken:
            raise _too_many_broken(dataset, left_out, max_broken)
        yield batch.arrays


class _Record(NamedTuple):
    """A row of a batch, and the broken examples that it replaces, as (index, reason)."""

    row: Row
    broken: tuple[tuple[int, str], ...]


class _Chunk(NamedTuple):
    """Some rows of a batch, the number of that batch since the start, and what it holds."""

    batch: int
    records: list[_Record]
    elements: Elements


class _Stacked(NamedTuple):
    """The arrays of a host batch or their slot in shared memory, and the fields of `_Delivery`."""

    arrays: Any
    pid: int
    broken: list[tuple[int, str]]


class _Delivery(NamedTuple):
    """A batch to hand out, the process that decoded it, and the broken examples it replaces."""

    batch: Batch
    pid: int
    broken: list[tuple[int, str]]


class _Same(NamedTuple):
    """The same transform at every step; a class, since worker processes get a copy."""

    transform: Transform

    def __call__(self, step: int) -> Transform:
        return self.transform


class _Reads:
    """Random access to the chunks of this host's endless sequence of training batches."""

    def __init__(
        self, dataset, transform_at, *, batch_size, seed, rows, start_step, workers, max_broken
    ):
        self.dataset, self.transform_at = dataset, transform_at
        self.batch_size, self.seed = batch_size, seed
        self.chunks, self.start_step = _chunks(rows), start_step
        self.workers, self.max_broken = workers, max_broken
        self.steps_per_epoch = steps_per_epoch(dataset, batch_size)
        self._busy: dict[int, int] = {}

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, index: int) -> _Chunk:
        # Grain gives worker w the indices w, w + W, ... and takes batches from the workers in
        # turn. With this numbering, len(chunks) successive indices of a worker form one batch.
        position, worker = divmod(index, self.workers)
        turn, chunk = divmod(position, len(self.chunks))
        number = turn * self.workers + worker
        step = self.start_step + number
        epoch, batch = divmod(step, self.steps_per_epoch)
        first, transform = batch * self.batch_size, self.transform_at(step)
        records = [self._read(epoch, first + row, transform) for row in self.chunks[chunk]]
        return _Chunk(number, records, elements.of_batch(transform.elements))

    def _read(self, epoch: int, position: int, transform: Transform) -> _Record:
        """Reads the example at a position of an epoch, or the next one that can be read."""
        order = _order(self.seed, epoch, len(self.dataset))
        broken: list[tuple[int, str]] = []
        for candidate in range(position, position + len(order)):
            index = int(order[candidate % len(order)])
            self._busy[threading.get_ident()] = index
            try:
                rng = randomness.generator(randomness.AUGMENT, self.seed, epoch, index)
                row = transform(self.dataset[index], rng)
                return _Record({**row, "weight": 1.0, "index": index}, tuple(broken))
            except SkippedError:
                continue
            except BrokenImageError as error:
                broken.append((index, str(error)))
                if len(broken) > self.max_broken:
                    break
            finally:
                self._busy.pop(threading.get_ident(), None)
        raise _too_many_broken(self.dataset, broken, self.max_broken)

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
        return {**self.__dict__, "_busy": {}}  # the threads of this process are not in a worker


def _too_many_broken(dataset: Source, broken: Iterable[tuple[int, str]], allowed: int) -> DataError:
    listing = [f"{dataset.describe(index)}: {reason}" for index, reason in sorted(broken)]
    return DataError(
        "\n  ".join(
            [
                f"{len(listing)} broken images in {dataset.name}, more than "
                f"max_broken={allowed}; repair or remove them, or raise that limit:",
                *listing,
            ]
        )
    )


def _read_ahead(
    reads: _Reads, threads: int, workers: int, shared: SharedBatches | None
) -> Iterator[_Stacked]:
    dataset = grain.MapDataset.source(reads)
    batches = _batches(dataset, len(reads.chunks), threads, shared)
    if not workers:
        return iter(batches)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads its own flags when it starts processes
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_PREFETCH)
    # A batch that is not in our shared memory goes through the pipe, not through that of Grain.
    through_pipe = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    batches = grain.experimental.WithOptionsIterDataset(batches, through_pipe)
    return iter(batches.mp_prefetch(options, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    """Makes a worker ignore signals and exit when the main process does.

    A scheduler often signals all processes of a run, but the main process still needs batches for
    the steps until it has saved.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _batches(
    reads: grain.MapDataset,
    chunks: int,
    threads: int,
    shared: SharedBatches | None = None,
) -> grain.IterDataset:
    """Reads ahead and joins every `chunks` reads into a batch, in shared memory if it is given."""
    ahead = _PREFETCH * chunks
    # Grain warns of threads that could have nothing to do, for every evaluation of small batches.
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    stack = functools.partial(_stack, shared=shared)
    return reads.to_iter_dataset(options).batch(chunks, batch_fn=stack)


def _chunks(rows: np.ndarray) -> list[list[int]]:
    return [rows[start : start + _CHUNK].tolist() for start in range(0, len(rows), _CHUNK)]


def _stack(chunks: Sequence[_Chunk], *, shared: SharedBatches | None) -> _Stacked:
    records = list(itertools.chain.from_iterable(chunk.records for chunk in chunks))
    rows, (number, _, specified) = [record.row for record in records], chunks[0]
    arrays = (
        elements.stack(rows, specified) if shared is None else shared.put(number, rows, specified)
    )
    broken = list(itertools.chain.from_iterable(record.broken for record in records))
    return _Stacked(arrays, os.getpid(), broken)


@functools.lru_cache(maxsize=3)
def _cached_order(seed: int, epoch: int, size: int) -> np.ndarray:
    return epoch_order(seed, epoch, size)


def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    with _ORDER_LOCK:  # without it, every thread would compute the new permutation
        return _cached_order(seed, epoch, size)
