"""Passes over a held-out split: exact for any dataset size, mesh and number of hosts."""

from collections.abc import Iterator

import jax

from fd_jax import metrics, sharding
from fd_jax.data import global_batch
from fd_jax.data.feed import Feed
from fd_jax.evaluation import neighbours as knn
from fd_jax.training.program import Program
from fd_jax.typing import Batch, Config, PyTree


def evaluate(
    program: Program,
    feed: Feed,
    config: Config,
    params: PyTree,
    extra: PyTree,
    frozen: PyTree,
    *,
    limit: int = 0,
) -> dict[str, float]:
    """The task's metrics over the held-out split, padding excluded by its weight.

    Args:
      program: of the task on its mesh.
      feed: of the run.
      config: of the run.
      params: to evaluate.
      extra: untrained state.
      frozen: frozen weights.
      limit: batches; 0 for the whole split.
    """
    total = metrics.Mean()
    for batch in batches(program, feed, "eval", config.batch_size, limit=limit):
        total.add(program.eval_step(params, extra, frozen, batch))
    return total.result()


def neighbours(
    program: Program, feed: Feed, config: Config, params: PyTree, frozen: PyTree
) -> dict[str, float]:
    """Weighted k-nearest-neighbour accuracy of the features, training split as the bank."""

    def features(which: str) -> knn.Features:
        rows = []
        for batch in batches(program, feed, which, config.batch_size):
            # One batch in flight is enough, and bounds the memory of what runs ahead.
            vectors = jax.block_until_ready(program.features(params, frozen, batch))
            rows.append((vectors, batch["label"], batch["weight"]))
        return knn.Features(*zip(*rows, strict=True))

    bank = features("train")
    return knn.accuracy(
        bank, features("eval"), mesh=program.mesh, classes=feed.classes, k=config.eval.knn
    )


def batches(
    program: Program, feed: Feed, which: str, batch_size: int, *, limit: int = 0
) -> Iterator[Batch]:
    """Every image of a split once, as global arrays on the mesh, the last batch padded."""
    split = sharding.batch_sharding(program.mesh)
    rows = global_batch.local_rows(split, batch_size)
    for host in feed.sequential(which, batch_size=batch_size, rows=rows, limit=limit):
        yield global_batch.to_global(host, split, rows=rows, batch_size=batch_size)
