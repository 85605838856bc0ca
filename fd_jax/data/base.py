"""What tasks and evaluation ask of a run's data. `feed.Feed` is one."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from fd_jax.data.elements import Elements
from fd_jax.typing import Batch


class Data(Protocol):
    """Training and held-out data of one run."""

    @property
    def name(self) -> str:
        """Of the training split, as a message names it."""
        ...

    @property
    def elements(self) -> Elements:
        """What every batch holds."""
        ...

    @property
    def classes(self) -> int:
        """Number of labels.

        Raises:
          DataError: the data has none.
        """
        ...

    def check_labels(self) -> None:
        """Reads the first label of each split.

        Raises:
          DataError: there are no labels, a split hides them, or the splits differ in classes.
        """
        ...

    def sequential(
        self, which: str, *, batch_size: int, rows: np.ndarray | None = None, limit: int = 0
    ) -> Iterator[Batch]:
        """Every image of a split, "train" or "eval", once and in order, the last batch padded.

        `rows` of each global batch of `batch_size`, all if None; at most `limit` batches, or all.
        """
        ...
