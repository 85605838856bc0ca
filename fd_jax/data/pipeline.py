"""Batches in a fixed order: global batch k is a function of the seed and k alone.

Grain reads ahead; which example stands where is arithmetic on the step, so a run resumes by
starting at its step, and every host can produce just its own rows.
"""

from collections.abc import Callable, Iterator
import functools
import queue
import threading
from typing import Any

from absl import logging
import grain
import numpy as np

from fd_jax.data.sources import Source
from fd_jax.errors import DataError

Transform = Callable[[Any, np.random.Generator], np.ndarray]
HostBatch = dict[str, Any]

_FOREVER = 2**48
_AHEAD = 2  # batches that wait, decoded, for the step


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Full batches in one pass over a source.

    Raises:
      DataError: there is not even one.
    """
    steps = len(source) // batch_size
    if not steps:
        raise DataError(
            f"{source.name} has {len(source)} examples, fewer than one batch of {batch_size}; "
            f"lower batch_size to at most {len(source)}"
        )
    return steps


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of one epoch. -> int64 [size]."""
    return _rng(seed, epoch).permutation(size)


class TrainLoader:
    """Endless training batches.

    Args:
      source: examples.
      transform: picture and generator to uint8 [S, S, 3].
      batch_size: of the global batch.
      seed: of order and augmentation.
      rows: of each global batch that this process produces, ascending; None for all.
      start_step: the first global batch.
      threads: that decode in each process.
      workers: processes; 0 decodes in this one.
      max_broken: unreadable pictures that are replaced before the run stops.
      timeout: seconds without a batch after which the workers count as stuck.

    Yields:
      {"image": uint8 [n, S, S, 3], "label": int32 [n], "weight": float32 [n],
      "index": int32 [n] position in the source}, n = len(rows).
    """

    def __init__(
        self,
        source: Source,
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
    ):
        self.steps_per_epoch = steps_per_epoch(source, batch_size)
        self.replaced: dict[int, str] = {}
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._max_broken, self._timeout = max_broken, timeout
        self._step = start_step
        rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._reads = _Reads(source, transform, batch_size, seed, rows, start_step)
        self._batches = _Background(_read_ahead(self._reads, len(rows), threads, workers))

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
          DataError: too many broken pictures, a worker that died, or none that answers.
        """
        try:
            batch = self._batches.get(self._timeout)
        except queue.Empty:
            raise DataError(
                f"no batch for step {self._step} within {self._timeout:.0f} s; "
                f"{self._reads.in_flight()}. The storage may hang, or a worker process is stuck"
            ) from None
        self._note_broken(batch.pop("broken"))
        self._step += 1
        return batch

    def indices(self, step: int) -> np.ndarray:
        """Positions in the source of global batch `step`, before replacements. -> [B]."""
        return self._reads.indices(step)

    def state(self, step: int) -> dict[str, Any]:
        """Where global batch `step` stands; JSON-able, the same on every host but for broken."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return {"epoch": epoch, "batch": batch, "replaced": sorted(self.replaced)}

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()

    def _note_broken(self, broken: list[tuple[int, str]]) -> None:
        for index, reason in broken:
            if index in self.replaced:
                continue
            self.replaced[index] = reason
            logging.warning("replaced broken image %s: %s", self._source.describe(index), reason)
        if len(self.replaced) > self._max_broken:
            listing = "\n  ".join(
                f"{self._source.describe(index)}: {reason}"
                for index, reason in sorted(self.replaced.items())
            )
            raise DataError(
                f"{len(self.replaced)} broken images, more than data.max_broken="
                f"{self._max_broken}:\n  {listing}"
            )


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    rows: np.ndarray | None = None,
    limit: int | None = None,
    threads: int = 16,
) -> Iterator[HostBatch]:
    """Every example once, in order, as batches like `TrainLoader`'s.

    The last batch is padded with examples of weight 0, so that all hosts see the same number of
    batches; a broken picture becomes a black one of weight 0 and is named in the log.

    Args:
      source: examples.
      transform: picture and generator to uint8 [S, S, 3].
      batch_size: of the global batch.
      rows: of each global batch that this process produces; None for all.
      limit: number of batches at most.
      threads: that decode.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    count = -(-len(source) // batch_size)
    count = min(count, limit) if limit else count

    def load(place: int) -> HostBatch:
        step, row = divmod(place, len(rows))
        index = step * batch_size + int(rows[row])
        real = index < len(source)
        index = index if real else len(source) - 1
        label = -1
        try:
            image, label = source[index]
            pixels = transform(image, _rng(0, 0, index))
        except Exception as error:  # whatever a reader raises for a broken file
            logging.warning("evaluation leaves out %s: %s", source.describe(index), error)
            pixels, real = None, False
        return _record(pixels, label, float(real), index, [])

    reads = grain.MapDataset.range(count * len(rows)).map(load)
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * len(rows))
    for batch in reads.to_iter_dataset(ahead).batch(len(rows), batch_fn=_stack):
        batch.pop("broken")
        yield batch


class _Reads:
    """Random access to training records by their place in this host's endless sequence."""

    def __init__(self, source, transform, batch_size, seed, rows, start_step):
        self.source, self.transform = source, transform
        self.batch_size, self.seed = batch_size, seed
        self.rows, self.start_step = rows, start_step
        self.steps_per_epoch = steps_per_epoch(source, batch_size)
        self._busy: dict[int, int] = {}

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, place: int) -> HostBatch:
        step, row = divmod(place, len(self.rows))
        epoch, batch = divmod(self.start_step + step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.source))
        position = batch * self.batch_size + int(self.rows[row])
        broken = []
        for tried in range(len(order)):
            # A broken picture gives way to the next one of the epoch's order, on every host alike.
            index = int(order[(position + tried) % len(order)])
            self._busy[threading.get_ident()] = index
            try:
                image, label = self.source[index]
                pixels = self.transform(image, _rng(self.seed, epoch, index))
                return _record(pixels, label, 1.0, index, broken)
            except Exception as error:  # whatever a reader raises for a broken file
                broken.append((index, str(error)))
            finally:
                self._busy.pop(threading.get_ident(), None)
        raise DataError(f"every image of {self.source.name} is broken; the last: {broken[-1][1]}")

    def indices(self, step: int) -> np.ndarray:
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = _order(self.seed, epoch, len(self.source))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def in_flight(self) -> str:
        busy = sorted(set(self._busy.values()))
        if not busy:
            return "no example is being read in this process"
        return "being read: " + ", ".join(map(self.source.describe, busy[:5]))

    def __getstate__(self):
        return {**self.__dict__, "_busy": {}}  # goes to worker processes without its threads


def _read_ahead(reads: _Reads, rows: int, threads: int, workers: int) -> Iterator[HostBatch]:
    dataset = grain.MapDataset.source(reads)
    if not workers:
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * rows)
        return iter(dataset.to_iter_dataset(ahead).batch(rows, batch_fn=_stack))
    # Whole batches go to workers in turn, so that the order is that of one process.
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD)
    batches = dataset.batch(rows, batch_fn=_stack).to_iter_dataset(ahead)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
    return iter(batches.mp_prefetch(options))


class _Background:
    """Runs an iterator in a thread, so that waiting for it can have a limit."""

    def __init__(self, iterator: Iterator[HostBatch]):
        self._queue: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(iterator,), daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> HostBatch:
        item = self._queue.get(timeout=timeout)
        if isinstance(item, DataError):
            raise item
        if isinstance(item, BaseException):
            raise DataError(f"a data worker died: {type(item).__name__}: {item}") from item
        return item

    def close(self) -> None:
        self._closed.set()

    def _run(self, iterator: Iterator[HostBatch]) -> None:
        try:
            for item in iterator:
                if not self._put(item):
                    return
        except BaseException as error:  # handed to the thread that waits
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


def _record(pixels, label, weight, index, broken) -> HostBatch:
    return {"image": pixels, "label": label, "weight": weight, "index": index, "broken": broken}


def _stack(records: list[HostBatch]) -> HostBatch:
    shape = next((r["image"].shape for r in records if r["image"] is not None), None)
    if shape is None:
        raise DataError("every image of a batch is broken; see the log for their names")
    black = np.zeros(shape, np.uint8)
    return {
        "image": np.stack([black if r["image"] is None else r["image"] for r in records]),
        "label": np.array([r["label"] for r in records], np.int32),
        "weight": np.array([r["weight"] for r in records], np.float32),
        "index": np.array([r["index"] for r in records], np.int32),
        "broken": [item for r in records for item in r["broken"]],
    }


def _rng(*words: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


_order = functools.lru_cache(maxsize=3)(epoch_order)
