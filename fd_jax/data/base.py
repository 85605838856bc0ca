"""The interfaces through which tasks and evaluation read data.

`feed.Feed` implements `Data`, and `segmentation.SegmentationFeed` implements `SegmentationData`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from fd_jax.data.class_names import Classes
from fd_jax.data.elements import Elements
from fd_jax.typing import Batch

# Settings of `transforms.TrainTransform`; they are here because that module needs OpenCV.
Interpolation = Literal["bilinear", "bicubic"]
Crop = Literal["retried", "single"]

IGNORED = 255  # label of pixels that are neither trained on nor counted, in masks of classes


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

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes; None if they have numbers only, or without labels."""
        ...

    def number_labels(self, head: Classes | None = None) -> None:
        """Gives the classes of each split the numbers of a head, or of the training split, by name.

        Args:
          head: classes of a trained head; None for those of the training split.

        Raises:
          DataError: there are no labels, a split hides them, or a split has a class that is not
            among those of the head or the training split.
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


class Picture(NamedTuple):
    """A held-out picture and the class of each of its pixels.

    Attributes:
      index: position in the split.
      name: name within the split.
      image: uint8 [h, w, 3] in RGB, at the original size.
      mask: uint8 [h, w], `IGNORED` where there is no class.
    """

    index: int
    name: str
    image: np.ndarray
    mask: np.ndarray


class SegmentationData(Protocol):
    """Training and held-out data of a run of semantic segmentation."""

    @property
    def name(self) -> str:
        """Name of the training split, for messages."""
        ...

    @property
    def elements(self) -> Elements:
        """Specification of the arrays in every training batch."""
        ...

    @property
    def classes(self) -> int | None:
        """Number of classes that the data says it has; None if it does not say."""
        ...

    def examples(self, split: str) -> int:
        """Number of pictures in a split, "train" or "eval"."""
        ...

    def pictures(self, split: str, indices: Sequence[int] | None = None) -> Iterator[Picture]:
        """Yields pictures at their original size, in order; all of the split without `indices`."""
        ...
