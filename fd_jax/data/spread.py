"""A few examples in place of all of a split, for figures that do not need more."""

from fd_jax.data.datasets import Dataset, Example


class Spread:
    """Evenly spread examples of a dataset, which is sorted by class more often than not.

    Args:
      dataset: the whole split.
      examples: number of examples; a dataset with fewer is used whole.
    """

    def __init__(self, dataset: Dataset, examples: int):
        self._dataset = dataset
        self._length = min(len(dataset), examples)
        self.name, self.num_classes = dataset.name, dataset.num_classes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        """Reads one image and its label."""
        return self._dataset[self._place(index)]

    def describe(self, index: int) -> str:
        """Returns a description of one example, for messages."""
        return self._dataset.describe(self._place(index))

    def _place(self, index: int) -> int:
        return index * len(self._dataset) // self._length
