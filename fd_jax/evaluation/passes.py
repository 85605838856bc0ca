"""Passes over a split: exact for any dataset size, mesh and number of hosts."""

from collections.abc import Iterator

from jax.sharding import Mesh

from fd_jax.data.base import Data
from fd_jax.data.global_batch import Placement
from fd_jax.typing import Batch


def batches(
    mesh: Mesh, data: Data, split: str, batch_size: int, *, limit: int = 0
) -> Iterator[Batch]:
    """Every image of a split once, as global arrays on the mesh, the last batch padded.

    Args:
      mesh: over whose batch axes they are split.
      data: of the run.
      split: "train" or "eval".
      batch_size: of the global batch.
      limit: batches; 0 for the whole split.
    """
    placement = Placement(mesh, batch_size)
    for host in data.sequential(split, batch_size=batch_size, rows=placement.rows, limit=limit):
        yield placement.put(host)
