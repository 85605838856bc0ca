"""What the data of every kind of run shares: a split to train on, and one that is held out."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np

from fd_jax.data import contents, elements, pipeline
from fd_jax.data.datasets import Source
from fd_jax.data.elements import Elements
from fd_jax.errors import DataError
from fd_jax.typing import Batch

Examples = TypeVar("Examples", bound=Source)


class Splits(Generic[Examples]):
    """The training split and the held-out split of a run. The constructor of a subclass sets all.

    Attributes:
      train_dataset: training split.
      eval_dataset: held-out split, or None.
      train_transform: makes rows of training examples.
      threads: number of decoding threads per process.
      workers: number of worker processes; 0 to decode in this process.
      max_broken: number of unreadable examples that each process may replace before the run stops.
    """

    train_dataset: Examples
    eval_dataset: Examples | None
    train_transform: pipeline.Transform
    threads: int
    workers: int
    max_broken: int

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full batches in an epoch; the remaining examples are left out of it."""
        return pipeline.steps_per_epoch(self.train_dataset, batch_size)

    def train(
        self,
        *,
        batch_size: int,
        seed: int,
        rows: np.ndarray,
        start_step: int,
        put_on_devices: Callable[[pipeline.HostBatch], Batch] | None = None,
    ) -> pipeline.TrainLoader:
        """Opens an endless loader of training batches.

        Args:
          batch_size: number of examples in the global batch.
          seed: seed of order and augmentation.
          rows: rows of each global batch that this process produces.
          start_step: step of the first batch.
          put_on_devices: function applied to each batch in the thread that reads ahead.
        """
        return pipeline.TrainLoader(
            self._train_source(),
            self.train_transform,
            batch_size=batch_size,
            seed=seed,
            rows=rows,
            start_step=start_step,
            threads=self.threads,
            workers=self.workers,
            max_broken=self.max_broken,
            put_on_devices=put_on_devices,
            transform_at=self._transform_at(seed, self.steps_per_epoch(batch_size)),
        )

    def _train_source(self) -> Source:
        """What training batches are made of; the training split itself, or a view of it."""
        return self.train_dataset

    def _transform_at(
        self, seed: int, steps_per_epoch: int
    ) -> Callable[[int], pipeline.Transform] | None:
        """The transform of the training batch of a step; None for the same one at every step."""
        del seed, steps_per_epoch
        return None

    @property
    def name(self) -> str:
        """Name of the training split, for messages."""
        return self.train_dataset.name

    @property
    def elements(self) -> Elements:
        """Specification of the arrays in every batch; in held-out ones where sizes vary."""
        return elements.of_batch(self.train_transform.elements)

    @property
    def train_elements(self) -> dict[int, Elements]:
        """Specification of the arrays in training batches, by the side of their images."""
        return {self.elements["image"].shape[0]: self.elements}

    def examples(self, split: str) -> int:
        """Number of examples in a split, "train" or "eval"."""
        return len(self._dataset(split))

    def contents(self) -> dict[str, dict[str, Any]]:
        """What each split consists of, see `contents.of_files`; by "train" and "eval"."""
        splits = {"train": self.train_dataset, "eval": self.eval_dataset}
        return {
            split: contents.of_files(dataset.files(), len(dataset))
            for split, dataset in splits.items()
            if dataset is not None
        }

    def _dataset(self, split: str) -> Examples:
        dataset = {"train": self.train_dataset, "eval": self.eval_dataset}[split]
        if dataset is None:
            raise DataError("this run has no held-out split; set data.eval_split")
        return dataset
