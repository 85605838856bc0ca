"""Measurements during training: an evaluator computes named numbers from the current weights.

A task lists its evaluators; the loop calls them without knowing what they are.
"""

import dataclasses
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from fd_jax.data.base import Data
from fd_jax.evaluation import classification, neighbours, passes
from fd_jax.metrics import Mean
from fd_jax.typing import Config, PyTree


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights to evaluate.

    Attributes:
      params: trained parameters.
      extra: state that is updated but not trained, such as BatchNorm statistics.
      frozen: weights that are used but not trained.
      ema: exponential moving average of `params`, or None.
    """

    params: PyTree
    extra: PyTree
    frozen: PyTree
    ema: PyTree | None = None


class Compiled(Protocol):
    """The jitted functions of a task on a mesh; `training.program.Program` provides them."""

    @property
    def mesh(self) -> Mesh:
        """The mesh of devices."""
        ...

    @property
    def batch(self) -> PyTree:
        """Shapes of a batch."""
        ...

    @property
    def eval_step(self) -> Any:
        """(params, extra, frozen, batch) -> metrics."""
        ...

    @property
    def features(self) -> Any:
        """(params, extra, frozen, batch) -> [B, D] float32, split over the batch."""
        ...

    @property
    def predict(self) -> Any:
        """(params, extra, frozen, batch) -> what `task.predict` returns, split over the batch."""
        ...


class Evaluator(Protocol):
    """One measurement on held-out data."""

    def __call__(self, compiled: Compiled, weights: Weights, data: Data, /) -> dict[str, float]:
        """The measured numbers by name; the loop logs them as "eval_<name>"."""
        ...

    def names(self, compiled: Compiled, weights: Weights, data: Data, /) -> list[str]:
        """The names of these numbers, for weights of which only the shapes are known."""
        ...


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The task's own metrics over the held-out split; padding has weight 0 and does not count.

    Attributes:
      batch_size: size of the global batch.
      limit: number of batches, or 0 for the whole split.
    """

    batch_size: int
    limit: int = 0

    def __call__(self, compiled: Compiled, weights: Weights, data: Data) -> dict[str, float]:
        """The metrics of `task.evaluate`, averaged over the split."""
        total = Mean()
        batches = passes.batches(compiled.mesh, data, "eval", self.batch_size, limit=self.limit)
        for batch in batches:
            total.add(compiled.eval_step(weights.params, weights.extra, weights.frozen, batch))
        return total.result()

    def names(self, compiled: Compiled, weights: Weights, data: Data) -> list[str]:
        """The names of the metrics of `task.evaluate`, which is traced."""
        del data
        arguments = weights.params, weights.extra, weights.frozen, compiled.batch
        return sorted(jax.eval_shape(compiled.eval_step, *arguments))


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Weighted k-nearest-neighbour accuracy of the features, with the training split as the bank.

    Attributes:
      k: number of neighbours that vote.
      batch_size: size of the global batch.
    """

    k: int
    batch_size: int

    def __call__(self, compiled: Compiled, weights: Weights, data: Data) -> dict[str, float]:
        """Returns {"knn_top1": accuracy, "knn_top5": accuracy}."""
        bank, queries = (self._features(compiled, weights, data, s) for s in ("train", "eval"))
        return neighbours.accuracy(
            bank, queries, mesh=compiled.mesh, classes=data.classes, k=self.k
        )

    def names(self, compiled: Compiled, weights: Weights, data: Data) -> list[str]:
        """Top-5 accuracy says nothing of five classes or fewer."""
        del compiled, weights
        return [f"knn_top{k}" for k in classification.reported(data.classes)]

    def _features(
        self, compiled: Compiled, weights: Weights, data: Data, split: str
    ) -> neighbours.Features:
        rows = []
        for batch in passes.batches(compiled.mesh, data, split, self.batch_size):
            # Waiting for each batch bounds the memory of batches that are computed ahead.
            vectors = compiled.features(weights.params, weights.extra, weights.frozen, batch)
            rows.append((jax.block_until_ready(vectors), batch["label"], batch["weight"]))
        return neighbours.Features(*zip(*rows, strict=True))


@dataclasses.dataclass(frozen=True)
class Averaged:
    """Runs another evaluator on the moving average of the weights, with the prefix "ema_"."""

    evaluator: Evaluator

    def __call__(self, compiled: Compiled, weights: Weights, data: Data) -> dict[str, float]:
        """The other evaluator's numbers for the averaged weights."""
        averaged = dataclasses.replace(weights, params=weights.ema)
        metrics = self.evaluator(compiled, averaged, data)
        return {f"ema_{name}": value for name, value in metrics.items()}

    def names(self, compiled: Compiled, weights: Weights, data: Data) -> list[str]:
        """The other evaluator's names with the prefix."""
        averaged = dataclasses.replace(weights, params=weights.ema)
        return [f"ema_{name}" for name in self.evaluator.names(compiled, averaged, data)]


def from_config(config: Config, *, held_out: bool = True) -> list[Evaluator]:
    """The evaluators of `config.eval`, repeated on the average if `config.ema_decay` is set.

    Args:
      config: config of the run.
      held_out: whether the task's own metrics can be measured on held-out pictures.
    """
    evaluators: list[Evaluator] = []
    if held_out:
        evaluators.append(HeldOut(config.batch_size, limit=config.eval.batches))
    if config.eval.knn:
        evaluators.append(Neighbours(config.eval.knn, config.batch_size))
    if config.ema_decay:
        evaluators += [Averaged(evaluator) for evaluator in evaluators]
    return evaluators
