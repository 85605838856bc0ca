"""Specification of a batch: the names of its arrays, with their shapes, dtypes and padding.

A transform specifies the elements that it makes from one example, and the loader adds its own. The
loader, its shared memory, evaluation, the compiled step and the planner all read this
specification, so a new element (a label map, a stored target, a crop box) is only added in the
transform.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from fd_jax.models.sizes import ImageSize, sides


@dataclasses.dataclass(frozen=True)
class Element:
    """One array of a batch, described for a single example.

    Attributes:
      shape: shape without the batch axis; () for a number.
      dtype: NumPy name of the dtype.
      padding: value in rows that hold no example.
    """

    shape: tuple[int, ...]
    dtype: str
    padding: float = 0

    def empty(self, rows: int) -> np.ndarray:
        """Returns uninitialised memory for this many rows. -> [rows, *shape]"""
        return np.empty((rows, *self.shape), self.dtype)

    def padded(self) -> np.ndarray:
        """Returns the value of a row that holds no example. -> [*shape]"""
        return np.full(self.shape, self.padding, self.dtype)


Elements = Mapping[str, Element]
Row = Mapping[str, Any]  # one example: element name -> array or number

# The elements that the loader adds to each row. "weight" is 1, or 0 for padding and for examples
# that cannot be read. "index" is the position in the dataset, or -1 for padding.
LOADED: Elements = {"weight": Element((), "float32"), "index": Element((), "int32", -1)}


def labelled_image(image_size: ImageSize) -> dict[str, Element]:
    """Returns the elements of an image, uint8 [H, W, 3], and its class, -1 if it has none."""
    return {
        "image": Element((*sides(image_size), 3), "uint8"),
        "label": Element((), "int32", -1),
    }


def labelled_pixels(image_size: ImageSize) -> dict[str, Element]:
    """Returns the elements of an image, uint8 [H, W, 3], and the class of each of its pixels.

    The mask, uint8 [H, W], is 255 where there is no class.
    """
    return {
        "image": Element((*sides(image_size), 3), "uint8"),
        "mask": Element(sides(image_size), "uint8", 255),
    }


def of_batch(example: Elements) -> dict[str, Element]:
    """Returns the elements of a batch, given the elements that the transform makes."""
    return {**example, **LOADED}


def padding(elements: Elements) -> dict[str, np.ndarray]:
    """Returns a row that holds no example."""
    return {name: element.padded() for name, element in elements.items()}


def stack(
    rows: Sequence[Row], elements: Elements, out: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Stacks rows into a batch, in which each element has the shape [n, *shape].

    Args:
      rows: examples that have exactly the specified elements.
      elements: specification of the rows.
      out: arrays to write to; None to allocate new ones.

    Raises:
      KeyError: a row lacks an element, or has one that is not specified.
      ValueError: the shape of an array is not that of its element.
      TypeError: the dtype of an array is not that of its element.
    """
    for row in rows:
        if row.keys() != elements.keys():
            raise KeyError(f"a row has {sorted(row)}, its elements are {sorted(elements)}")
    batch = {}
    for name, element in elements.items():
        batch[name] = target = element.empty(len(rows)) if out is None else out[name]
        values = [row[name] for row in rows]
        if element.shape:
            np.stack(values, out=target, casting="no")
        else:
            target[:] = values
    return batch
