"""What a batch holds: the one place that names its entries, their shapes, dtypes and padding.

A transform says what it makes of one example; the loader adds what it knows itself. The loader, its
shared memory, evaluation, the compiled step and the planner all read the same specification, so
that another entry (a label map, a stored target, a crop box) is added in the transform alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from fd_jax.typing import Config


@dataclasses.dataclass(frozen=True)
class Element:
    """One entry of a batch, as a single example has it.

    Attributes:
      shape: without the batch axis; () for a number.
      dtype: NumPy's name of it.
      padding: the value in rows that hold no example.
    """

    shape: tuple[int, ...]
    dtype: str
    padding: float = 0

    def empty(self, rows: int) -> np.ndarray:
        """Memory for so many rows, [rows, *shape], not set to anything."""
        return np.empty((rows, *self.shape), self.dtype)

    def padded(self) -> np.ndarray:
        """A row that holds no example. -> [*shape]"""
        return np.full(self.shape, self.padding, self.dtype)


Elements = Mapping[str, Element]
Row = Mapping[str, Any]  # one example: an array or a number by the name of its element

# What the loader adds to each row: 0 for padding and for examples that cannot be read; the
# position in the dataset, -1 for padding.
LOADED: Elements = {"weight": Element((), "float32"), "index": Element((), "int32", -1)}


def labelled_image(image_size: int) -> dict[str, Element]:
    """A picture, [S, S, 3] uint8, and its class, -1 where there is none."""
    return {
        "image": Element((image_size, image_size, 3), "uint8"),
        "label": Element((), "int32", -1),
    }


def of_batch(example: Elements) -> dict[str, Element]:
    """The entries of a batch whose examples a transform makes into `example`."""
    return {**example, **LOADED}


def of_config(data: Config) -> dict[str, Element]:
    """The entries of a run's batches by its `config.data`, for those who do not open the data."""
    return of_batch(labelled_image(data.image_size))


def padding(elements: Elements) -> dict[str, np.ndarray]:
    """A row of every element that holds no example."""
    return {name: element.padded() for name, element in elements.items()}


def stack(
    rows: Sequence[Row], elements: Elements, out: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Rows to a batch, each element [n, *shape].

    Args:
      rows: with every element and nothing else.
      elements: what they hold.
      out: memory that receives it; new memory if not given.

    Raises:
      KeyError: a row lacks an element, or has one that is not specified.
      ValueError: an array has another shape than its element.
      TypeError: an array has another dtype.
    """
    for row in rows:
        if row.keys() != elements.keys():
            raise KeyError(f"a row has {sorted(row)}, its elements are {sorted(elements)}")
    made = {}
    for name, element in elements.items():
        made[name] = target = element.empty(len(rows)) if out is None else out[name]
        values = [row[name] for row in rows]
        if element.shape:
            np.stack(values, out=target, casting="no")
        else:
            target[:] = values
    return made
