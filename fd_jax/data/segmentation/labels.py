"""Pictures with a label per pixel: decoding, and the mapping from stored values to classes."""

import dataclasses
import functools
import io
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from fd_jax.data import transforms
from fd_jax.data.base import IGNORED
from fd_jax.data.datasets import BrokenImageError
from fd_jax.errors import ConfigError, DataError

_MODES = ("L", "P")  # Pillow's names of one 8-bit channel: grey, and indices into a palette


class Scene(NamedTuple):
    """One example, as it is stored.

    Attributes:
      image: encoded bytes, or decoded pixels as uint8 [h, w, 3].
      mask: encoded bytes, or stored labels as uint8 [h, w] or [h, w, 1].
      name: name of the picture within its split.
      origin: file or record of the mask, for messages.
    """

    image: bytes | np.ndarray
    mask: bytes | np.ndarray
    name: str
    origin: str


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which stored values are which classes.

    Attributes:
      classes: number of classes K.
      ignore: stored value of pixels that are neither trained on nor counted.
      reduce_zero: whether a stored 0 is ignored as well, and a stored k is class k - 1.

    Raises:
      ConfigError: the classes leave no value of a byte for ignored pixels.
    """

    classes: int
    ignore: int
    reduce_zero: bool

    def __post_init__(self):
        if not 1 <= self.classes <= IGNORED:
            raise ConfigError(
                f"segment.classes={self.classes}: expected 1 to {IGNORED}, since masks are bytes, "
                f"in which {IGNORED} means that a pixel is ignored"
            )

    def read(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Decodes a scene. -> uint8 [h, w, 3] in RGB, uint8 [h, w] of classes or 255 if ignored

        Raises:
          BrokenImageError: the picture or the mask cannot be decoded.
          DataError: the mask is not one of this picture, or has a label that is not a class.
        """
        pixels, stored = transforms.decode(scene.image), decode_mask(scene.mask, scene.origin)
        if pixels.shape[:2] != stored.shape:
            raise DataError(
                f"{scene.origin}: the mask has {_size(stored)} pixels, but its picture "
                f"{scene.name} has {_size(pixels)}; the two have to show the same pixels"
            )
        return pixels, self.classes_of(stored, scene.origin)

    def classes_of(self, stored: np.ndarray, origin: str) -> np.ndarray:
        """Maps stored values to classes. uint8 [h, w] -> uint8 [h, w], 255 where ignored

        Args:
          stored: labels as they are stored.
          origin: where they come from, for messages.

        Raises:
          DataError: a label is not a class.
        """
        unknown, table = self._tables
        wrong = cv2.LUT(stored, unknown)  # faster than NumPy's indexing
        if wrong.any():
            raise DataError(f"{origin}: {self._refusal(np.unique(stored[wrong > 0]).tolist())}")
        return cv2.LUT(stored, table)

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether each value is unknown, and its class. uint8 [256], uint8 [256]"""
        values = np.arange(256)
        classes = values - self.reduce_zero
        ignored = (values == self.ignore) | (classes < 0)
        unknown = ~ignored & (classes >= self.classes)
        return unknown.astype(np.uint8), np.where(ignored, IGNORED, classes).astype(np.uint8)

    def _refusal(self, values: list[int]) -> str:
        first = int(self.reduce_zero)
        ignored = f"0 or {self.ignore}" if self.reduce_zero else str(self.ignore)
        return (
            f"the mask holds {', '.join(map(str, values[:5]))}, which is no class: "
            f"segment.classes={self.classes} with data.reduce_zero_label={self.reduce_zero} "
            f"expects {first} to {self.classes - 1 + first}, or {ignored} for pixels that are "
            "ignored. Set these fields, or data.ignore, to what the masks hold"
        )


def decode_mask(mask: bytes | np.ndarray, origin: str) -> np.ndarray:
    """Decodes a mask; the indices of a palette are returned as they are. -> uint8 [h, w]

    Raises:
      BrokenImageError: the bytes are not an image, or the image is truncated.
      DataError: the mask is not one channel of 8 bits.
    """
    if isinstance(mask, np.ndarray):
        found, stored = f"{mask.dtype} {list(mask.shape)}", mask
        if stored.ndim == 3 and stored.shape[-1] == 1:
            stored = stored[..., 0]
        fits = stored.ndim == 2 and stored.dtype == np.uint8
    else:
        found, stored = _open(mask)
        fits = found in _MODES
    if not fits:
        raise DataError(
            f"{origin}: the mask is stored as {found}; expected one channel of 8 bits, which holds "
            "the number of the class (a grey picture, or one with a palette)"
        )
    return stored


def _open(data: bytes) -> tuple[str, np.ndarray]:
    """Returns mode and pixels of an encoded image."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            return opened.mode, np.asarray(opened)
    except Exception as error:  # Pillow's readers raise a dozen types of errors for bad bytes
        raise BrokenImageError(f"cannot decode the mask: {error}") from error


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]} x {pixels.shape[1]}"
