"""Turns the rows of each host into arrays that span all devices."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from fd_jax import sharding as shardings


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this process has to produce. -> int64 [n], sorted

    These are the rows that its devices hold. If a mesh axis that does not split the batch spans
    several processes, these processes produce the same rows.
    """
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def to_global(
    batch: dict[str, np.ndarray], sharding: NamedSharding, *, rows: np.ndarray, batch_size: int
) -> dict[str, Any]:
    """Turns a host batch into global arrays.

    Args:
      batch: arrays whose first axis follows `rows`.
      sharding: sharding of the first axis.
      rows: sorted rows of the global batch, as returned by `local_rows`.
      batch_size: number of examples in the global batch.
    """

    def put(leaf):
        def rows_of(index):
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return leaf[first : first + stop - start]  # contiguous, because `rows` is sorted

        shape = (batch_size, *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, rows_of)

    return {name: put(leaf) for name, leaf in batch.items()}


class Placement:
    """Puts this process's rows of global batches onto its devices, split over the batch axes.

    Attributes:
      rows: rows of each global batch that this process has to produce; see `local_rows`.
    """

    def __init__(self, mesh: Mesh, batch_size: int):
        self._sharding, self._batch_size = shardings.batch_sharding(mesh), batch_size
        self.rows = local_rows(self._sharding, batch_size)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Turns a host batch that holds `rows` into global arrays."""
        return to_global(batch, self._sharding, rows=self.rows, batch_size=self._batch_size)
