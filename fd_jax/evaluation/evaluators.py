"""What a run measures on its way: each evaluator makes named numbers of the weights it is given.

A task lists its evaluators; the loop calls them without knowing what they are.
"""

import dataclasses
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from fd_jax.data.base import Data
from fd_jax.evaluation import neighbours, passes
from fd_jax.metrics import Mean
from fd_jax.typing import Config, PyTree


@dataclasses.dataclass(frozen=True)
class Weights:
    """What is evaluated.

    Attributes:
      params: that train.
      extra: state that is not trained.
      frozen: that take part but do not train.
      ema: moving average of `params`, or None.
    """

    params: PyTree
    extra: PyTree
    frozen: PyTree
    ema: PyTree | None = None


class Compiled(Protocol):
    """The jitted functions of a task on its mesh, as `training.program.Program` has them."""

    @property
    def mesh(self) -> Mesh:
        """Of the devices."""
        ...

    @property
    def eval_step(self) -> Any:
        """(params, extra, frozen, batch) -> metrics."""
        ...

    @property
    def features(self) -> Any:
        """(params, frozen, batch) -> [B, D] float32, split over the batch."""
        ...


class Evaluator(Protocol):
    """One measurement on held-out data."""

    def __call__(self, compiled: Compiled, weights: Weights, data: Data, /) -> dict[str, float]:
        """The numbers by name; the loop writes them as "eval_<name>"."""
        ...


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The task's own metrics over the held-out split, padding excluded by its weight.

    Attributes:
      batch_size: of the global batch.
      limit: batches; 0 for the whole split.
    """

    batch_size: int
    limit: int = 0

    def __call__(self, compiled: Compiled, weights: Weights, data: Data) -> dict[str, float]:
        """What `task.evaluate` measures, averaged over the split."""
        total = Mean()
        batches = passes.batches(compiled.mesh, data, "eval", self.batch_size, limit=self.limit)
        for batch in batches:
            total.add(compiled.eval_step(weights.params, weights.extra, weights.frozen, batch))
        return total.result()


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Weighted k-nearest-neighbour accuracy of the features, training split as the bank.

    Attributes:
      k: neighbours that vote.
      batch_size: of the global batch.
    """

    k: int
    batch_size: int

    def __call__(self, compiled: Compiled, weights: Weights, data: Data) -> dict[str, float]:
        """{"knn_top1", "knn_top5"}."""
        bank, queries = (self._features(compiled, weights, data, s) for s in ("train", "eval"))
        return neighbours.accuracy(
            bank, queries, mesh=compiled.mesh, classes=data.classes, k=self.k
        )

    def _features(
        self, compiled: Compiled, weights: Weights, data: Data, split: str
    ) -> neighbours.Features:
        rows = []
        for batch in passes.batches(compiled.mesh, data, split, self.batch_size):
            # One batch in flight is enough, and bounds the memory of what runs ahead.
            vectors = compiled.features(weights.params, weights.frozen, batch)
            rows.append((jax.block_until_ready(vectors), batch["label"], batch["weight"]))
        return neighbours.Features(*zip(*rows, strict=True))


@dataclasses.dataclass(frozen=True)
class Averaged:
    """Another evaluator on the moving average of the weights; its names begin with "ema_"."""

    evaluator: Evaluator

    def __call__(self, compiled: Compiled, weights: Weights, data: Data) -> dict[str, float]:
        """The numbers of the average."""
        averaged = dataclasses.replace(weights, params=weights.ema)
        found = self.evaluator(compiled, averaged, data)
        return {f"ema_{name}": value for name, value in found.items()}


def from_config(config: Config) -> list[Evaluator]:
    """Those of `config.eval`, and the same on the average where `config.ema_decay` keeps one."""
    found: list[Evaluator] = [HeldOut(config.batch_size, limit=config.eval.batches)]
    if config.eval.knn:
        found.append(Neighbours(config.eval.knn, config.batch_size))
    if config.ema_decay:
        found += [Averaged(evaluator) for evaluator in found]
    return found
