"""The pass of a teacher over the views of pictures, shard by shard."""

from collections.abc import Iterator
import time
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from fd_jax import sharding
from fd_jax.console import say
from fd_jax.data import pipeline
from fd_jax.data.datasets import Dataset
from fd_jax.data.stored import records
from fd_jax.data.stored.codecs import Constants
from fd_jax.data.stored.description import Description
from fd_jax.data.stored.drawing import AsRow, Drawn
from fd_jax.data.stored.records import View
from fd_jax.errors import DataError, first_few
from fd_jax.targets import measuring, shards
from fd_jax.tasks.teacher import Teacher
from fd_jax.typing import Batch, PyTree

REPORT_EVERY = 10.0  # seconds
ERROR = "error"  # beside the stored arrays in the result of a step


class Maker:
    """Computes the maps of shards on the devices of this process.

    Args:
      teacher: the teacher.
      content: what is made.
      constants: with which its maps are stored, see `Codec.encode`.
      dataset: the pictures.
      mesh: devices of this process.
      batch_size: number of pictures at a time, over these devices.
      threads: number of decoding threads.
      max_broken: number of unreadable pictures that this process may leave out.
    """

    def __init__(
        self,
        teacher: Teacher,
        content: Description,
        constants: Constants,
        dataset: Dataset,
        *,
        mesh: Mesh,
        batch_size: int,
        threads: int,
        max_broken: int,
    ):
        self._content, self._dataset = content, dataset
        self._batch_size, self._threads, self._max_broken = batch_size, threads, max_broken
        whole = sharding.replicated(mesh)
        self._split = sharding.batch_sharding(mesh)
        self._frozen = jax.device_put((teacher.load(), constants), whole)
        self._step = jax.jit(_step(teacher, content), out_shardings=self._split)
        self._failures: dict[int, str] = {}
        self._said = time.monotonic()

    def write(self, folder: epath.Path, number: int) -> None:
        """Writes one shard, completely or not at all.

        Raises:
          DataError: more pictures than allowed cannot be read.
          StorageError: the shard cannot be written.
        """
        drawn = Drawn(self._dataset, self._content.views, self._content.pictures(number))
        writer = shards.Writer(folder / self._content.shard_name(number))
        for batch, results in self._computed(drawn):
            self._add(writer, batch, results, first=self._content.pictures(number).start)
            self._check_failures(drawn)
            self._report(number, int(batch["index"].max()) + 1, len(drawn))
        writer.finish()

    def _computed(self, drawn: Drawn) -> Iterator[tuple[Batch, list[dict[str, np.ndarray]]]]:
        """Batches of rows with the results of each view, one batch late to keep devices busy."""
        pending: tuple[Batch, list[Any]] | None = None
        for batch in pipeline.eval_batches(
            drawn, AsRow(drawn), batch_size=self._batch_size, threads=self._threads
        ):
            done = [self._computed_view(batch["image"][:, view]) for view in self._numbers]
            if pending is not None:
                yield pending[0], jax.device_get(pending[1])
            pending = batch, done
        if pending is not None:
            yield pending[0], jax.device_get(pending[1])

    def _computed_view(self, images: np.ndarray) -> dict[str, jax.Array]:
        placed = jax.device_put(np.ascontiguousarray(images), self._split)
        return self._step(*self._frozen, placed)

    def _add(
        self,
        writer: shards.Writer,
        batch: Batch,
        results: list[dict[str, np.ndarray]],
        *,
        first: int,
    ) -> None:
        for row, position in enumerate(batch["index"].tolist()):
            if position < 0:  # padding at the end of the shard
                continue
            for number in self._numbers:
                view = _view(batch, row, first + position, number)
                if view.state == records.WHOLE:
                    arrays = {name: value[row] for name, value in results[number].items()}
                    writer.add(view, self._content.codec.pack(arrays), arrays[ERROR])
                else:
                    writer.add(view, b"", None)

    def _check_failures(self, drawn: Drawn) -> None:
        for index in sorted(drawn.failures.keys() - self._failures):
            self._failures[index] = drawn.failures[index]
            logging.warning("left out %s: %s", self._dataset.describe(index), drawn.failures[index])
        if len(self._failures) > self._max_broken:
            listed = [
                f"{self._dataset.describe(index)}: {reason}"
                for index, reason in sorted(self._failures.items())
            ]
            raise DataError(
                f"{len(listed)} pictures of {self._dataset.name} cannot be read, more than "
                f"--max_broken={self._max_broken}: {first_few(listed)}. Repair or remove them, or "
                "raise that limit"
            )

    def _report(self, number: int, done: int, pictures: int) -> None:
        if time.monotonic() - self._said > REPORT_EVERY:
            self._said = time.monotonic()
            say(
                f"shard {number + 1} of {self._content.number_of_shards}: {done} of {pictures} "
                "pictures"
            )

    @property
    def _numbers(self) -> range:
        return range(self._content.views.number)


def _step(teacher: Teacher, content: Description) -> Any:
    """(weights, constants, images [B, S, S, 3]) -> stored arrays and their error, [B, ...] each."""
    codec, after_norm = content.codec, content.teacher["after_norm"]

    def step(weights: PyTree, constants: Constants, images: jax.Array) -> dict[str, jax.Array]:
        features = teacher.features(weights, images, final_norm=after_norm, drops=None)
        # So that the network is compiled as it is without what follows.
        tokens = jax.lax.optimization_barrier(features.full).astype(jnp.float32)
        stored = codec.encode(tokens, constants)
        return {**stored, ERROR: measuring.apart(tokens, codec.decode(stored, constants))}

    return step


def _view(batch: Batch, row: int, index: int, number: int) -> View:
    top, left, height, width = batch["box"][row, number].tolist()
    rows, columns = batch["size"][row].tolist()
    return View(
        index,
        number,
        int(batch["state"][row]),
        bool(batch["flipped"][row, number]),
        (top, left, height, width),
        (rows, columns),
    )
