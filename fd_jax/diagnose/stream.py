"""One pass over images for all measurements, with sums on disk from which a killed pass goes on."""

from collections.abc import Callable, Iterator, Sequence
import datetime
import json
import time
from typing import Any, NamedTuple
import zipfile

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from fd_jax import sharding
from fd_jax.console import say
from fd_jax.data import pipeline, transforms
from fd_jax.data.datasets import Dataset, Subset
from fd_jax.data.global_batch import Placement
from fd_jax.diagnose.measurement import Measurement
from fd_jax.errors import DataError, UserError
from fd_jax.typing import Batch, PyTree

REPORT_EVERY = 10.0  # seconds between two lines of progress


class Totals(NamedTuple):
    """Sums over the first batches of a pass.

    Attributes:
      batches: number of batches.
      images: number of images that could be read.
      sums: sums of each measurement by name, float64.
    """

    batches: int
    images: int
    sums: list[dict[str, np.ndarray]]


def accumulate(
    measurements: Sequence[Measurement],
    dataset: Dataset,
    *,
    transform: transforms.EvalTransform,
    mesh: Mesh,
    batch_size: int,
    partial: epath.Path,
    identity: str,
    save_every: float = 30.0,
    threads: int = 16,
    max_broken: int = 0,
) -> Totals:
    """Sums all measurements over every image of a dataset.

    Each batch is computed on all devices of the mesh, and each measurement before the next, so that
    the activations in memory are those of one. The first process writes the partial sums; with
    several processes, `partial` has to be on a file system that all of them read. The result is the
    same, bit for bit, whether or not a pass was killed in between, as long as the mesh is the same.

    Args:
      measurements: what is measured.
      dataset: images to measure.
      transform: transform of the images.
      mesh: mesh of the devices.
      batch_size: size of the global batch.
      partial: file of the partial sums; read if it exists.
      identity: text that names everything on which the sums depend.
      save_every: seconds between two versions of the partial sums.
      threads: number of decoding threads per process.
      max_broken: number of unreadable images that may be left out.

    Raises:
      DataError: no image is readable, or more than `max_broken` are not.
      UserError: a sum is not finite, or the partial sums belong to another pass.
    """
    totals = _read(partial, identity) or Totals(0, 0, [{} for _ in measurements])
    _check_agreement(totals, partial)
    if totals.batches:
        say(f"going on after {totals.images} images, from {partial}")
    steps = _compiled(measurements, mesh)
    start = totals.batches * batch_size
    left_out = min(start, len(dataset)) - totals.images
    batches = _batches(dataset, transform, mesh, batch_size, start, threads, max_broken - left_out)
    clock = _Clock(len(dataset), start)
    for current in _added(totals, steps, batches):
        totals = current
        _check_finite(totals, measurements)
        clock.report(totals.batches * batch_size)
        if clock.wants_save(save_every):
            _write(partial, totals, identity)
    if not totals.images:
        raise DataError(f"{dataset.name} has no readable image")
    _write(partial, totals, identity)
    sharding.barrier("partial sums are written")
    return totals


def _check_agreement(totals: Totals, partial: epath.Path) -> None:
    """Refuses processes that would start at different batches, in all of them.

    Raises:
      UserError: the processes do not read the same partial sums.
    """
    if np.ptp(sharding.gathered(np.int32(totals.batches))):
        raise UserError(
            f"the processes read different versions of {partial}; --output has to be a folder that "
            "all of them share"
        )


Step = Callable[[Batch], Any]


def _compiled(measurements: Sequence[Measurement], mesh: Mesh) -> list[Step]:
    """A function of a batch for each measurement, and first one that counts images."""
    whole = sharding.replicated(mesh)
    placed: dict[int, jax.Array] = {}  # networks that several measurements share exist once
    count = jax.jit(lambda batch: {"images": jnp.sum(batch["weight"])}, out_shardings=whole)

    def step(measurement: Measurement) -> Step:
        params = _replicated(measurement.params, mesh, placed)
        compute = jax.jit(measurement.sums, out_shardings=whole)
        return lambda batch: compute(params, batch)

    return [count, *map(step, measurements)]


def _replicated(tree: PyTree, mesh: Mesh, placed: dict[int, jax.Array]) -> PyTree:
    """Puts a tree on all devices; `placed` has what is there already, by the id of its source."""
    whole = sharding.replicated(mesh)

    def place_once(leaf):
        if id(leaf) not in placed:
            placed[id(leaf)] = sharding.place(np.asarray(leaf), whole)
        return placed[id(leaf)]

    return jax.tree.map(place_once, tree)


def _batches(dataset, transform, mesh, batch_size, start, threads, max_broken) -> Iterator[Batch]:
    placement = Placement(mesh, batch_size)
    for host_batch in pipeline.eval_batches(
        Subset(dataset, range(start, len(dataset))),
        transforms.LabelledImage(transform),
        batch_size=batch_size,
        rows=placement.rows,
        threads=threads,
        max_broken=max_broken,
    ):
        yield placement.put(host_batch)


def _added(totals: Totals, steps: list[Step], batches: Iterator[Batch]) -> Iterator[Totals]:
    """The totals after each batch. They are read one batch late, to keep the devices busy."""

    def compute(batch: Batch | None) -> list[Any] | None:
        return None if batch is None else [step(batch) for step in steps]

    pending = compute(next(batches, None))
    while pending is not None:
        done, pending = pending, compute(next(batches, None))
        count, *new = jax.device_get(done)
        sums = [_sum(old, more) for old, more in zip(totals.sums, new, strict=True)]
        totals = Totals(totals.batches + 1, totals.images + int(count["images"]), sums)
        yield totals


def _sum(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: old.get(name, 0.0) + value.astype(np.float64) for name, value in new.items()}


def _check_finite(totals: Totals, measurements: Sequence[Measurement]) -> None:
    for measurement, sums in zip(measurements, totals.sums, strict=True):
        for name, value in sums.items():
            if not np.all(np.isfinite(value)):
                subject = measurement.subject
                raise UserError(
                    f"{subject if isinstance(subject, str) else ' and '.join(subject)}: the sum of "
                    f"{name!r} is not finite after {totals.images} images, so that its weights or "
                    "its input statistics are damaged, or a --radius is too large"
                )


def _write(partial: epath.Path, totals: Totals, identity: str) -> None:
    """Replaces the partial sums, so that a kill leaves the old ones or the new ones."""
    if jax.process_index() != 0:
        return
    header = {"identity": identity, "batches": totals.batches, "images": totals.images}
    arrays = {
        f"{index}/{name}": value
        for index, sums in enumerate(totals.sums)
        for name, value in sums.items()
    }
    staging = partial.with_name(f"{partial.name}.new")
    try:
        with staging.open("wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]
        staging.replace(partial)
    except OSError as error:
        raise UserError(f"cannot write the partial sums {partial}: {error}") from error


def _read(partial: epath.Path, identity: str) -> Totals | None:
    if not partial.exists():
        return None
    try:
        with partial.open("rb") as file, np.load(file) as stored:
            header = json.loads(str(stored["header"]))
            arrays = {name: stored[name] for name in stored.files if name != "header"}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the partial sums {partial} cannot be read ({error}); delete that file to start again"
        ) from error
    if header["identity"] != identity:
        raise UserError(
            f"{partial} holds partial sums of another command; delete it, or use another --output"
        )
    numbers = [int(name.partition("/")[0]) for name in arrays]
    sums: list[dict[str, np.ndarray]] = [{} for _ in range(max(numbers, default=-1) + 1)]
    for name, value in arrays.items():
        index, _, key = name.partition("/")
        sums[int(index)][key] = value
    return Totals(header["batches"], header["images"], sums)


class _Clock:
    """Says how far the pass is and how long it takes, and when to save."""

    def __init__(self, total: int, start: int):
        self._total, self._start = total, start
        self._began = self._saved = self._said = time.monotonic()

    def report(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said < REPORT_EVERY:
            return
        self._said = now
        done = min(done, self._total)
        rate = (done - self._start) / (now - self._began)
        left = datetime.timedelta(seconds=round((self._total - done) / rate))
        say(f"{done} of {self._total} images  {rate:.1f} images/s  {left} left")

    def wants_save(self, every: float) -> bool:
        if time.monotonic() - self._saved < every:
            return False
        self._saved = time.monotonic()
        return True
