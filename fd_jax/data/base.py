"""The interface through which tasks and evaluation read data. `feed.Feed` implements it."""

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

from fd_jax.data.elements import Elements
from fd_jax.typing import Batch

# Settings of `transforms.TrainTransform`; they are here because that module needs OpenCV.
Interpolation = Literal["bilinear", "bicubic"]
Crop = Literal["retried", "single"]


class Data(Protocol):
    """Training and held-out data of one run."""

    @property
    def name(self) -> str:
        """Name of the training split, for messages."""
        ...

    @property
    def elements(self) -> Elements:
        """Specification of the arrays in every batch."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes.

        Raises:
          DataError: the data has no labels.
        """
        ...

    def check_labels(self) -> None:
        """Checks the number of classes and the first label of each split.

        Raises:
          DataError: there are no labels, a split hides them, or the splits have different numbers
            of classes.
        """
        ...

    def sequential(
        self, split: str, *, batch_size: int, rows: np.ndarray | None = None, limit: int = 0
    ) -> Iterator[Batch]:
        """Yields every image of a split once and in order; the last batch is padded.

        Args:
          split: "train" or "eval".
          batch_size: number of examples in the global batch.
          rows: rows of each global batch to produce; None for all of them.
          limit: maximum number of batches; 0 for no limit.
        """
        ...
