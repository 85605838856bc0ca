"""What a measurement is: sums over images, computed on the devices, and the figures from them."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from fd_jax.typing import Batch, PyTree

# Names of the arrays that a measurement sums over images. On the devices they are float32 sums over
# one batch; on the host, where they are added up over batches, they are float64.
Sums = dict[str, Any]

# Results by figure, as they are written to figures.json: numbers, lists of numbers and, where a
# network's layers differ, lists of lists of different lengths.
Figures = dict[str, Any]


class Measurement(Protocol):
    """Sums over the images of a dataset for one network, or for two that are compared.

    All of a command's measurements share one pass over the images, so that each image is read and
    decoded once. A measurement must not depend on the size of a batch, on the number of devices and
    processes or on the order of the images, except for rounding.

    Attributes:
      params: arrays that `sums` needs, such as the weights; an argument of the compiled function,
        so that they are no constants in it.
    """

    params: PyTree

    @property
    def subject(self) -> str | tuple[str, str]:
        """The name of the network that is measured, or the names of the two that are compared."""
        ...

    def sums(self, params: PyTree, batch: Batch) -> Sums:
        """Sums over one batch; it is traced by jax.jit.

        Args:
          params: the attribute of the same name, on the devices.
          batch: "image" uint8 [B, H, W, 3], "label" int32 [B] (-1 if there is none), and "weight"
            float32 [B], which is 0 for padding and 1 otherwise. Everything that is summed has to
            be multiplied by the weight.

        Returns:
          Arrays by name, float32, none of which has a batch axis.
        """
        ...

    def figures(self, sums: Mapping[str, np.ndarray], images: int) -> Figures:
        """The results by figure.

        Args:
          sums: the arrays of `sums`, added up over all batches, float64.
          images: the number of images.
        """
        ...
