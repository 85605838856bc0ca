"""Labels for pictures of any size, as mmsegmentation makes them.

`Sliding` needs a network of one size. The picture is scaled and cut into square windows that
overlap. Logits of a window are enlarged to the window, added up, divided by the number of windows
that cover a pixel, and resized to the picture's own size; the class with the highest one is the
label. Windows form a grid and all of these steps are linear along each axis, so they are one matrix
for rows and one for columns, applied to the logits as they leave the network. It happens on the
host: nothing is compiled for the size of a picture, and logits at the size of a picture exist only
for a tile of it at a time. `Whole` takes the scaled picture itself as the only window, so its
network has to take every size.
"""

import abc
from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from fd_jax.errors import ConfigError, check_positive
from fd_jax.models import sizes
from fd_jax.models.segmenter.resampling import bilinear_matrix

# Pixels; rows and columns of a picture whose logits are computed together. With 150 classes, those
# of a tile stay in the cache of a core; tiles of twice the side take several times as long.
TILE = 32


def starts(length: int, side: int, stride: int) -> list[int]:
    """First pixels of the windows along an axis of at least `side` pixels.

    They are `stride` apart, but the last window ends with the axis.
    """
    if length < side:
        raise ValueError(f"{length} pixels are fewer than those of a window, {side}")
    count = -(-(length - side) // stride) + 1
    return [min(i * stride, length - side) for i in range(count)]


def windows(height: int, width: int, side: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of the windows that cover a picture, row by row. See `starts`."""
    lefts = starts(width, side, stride)
    return [(top, left) for top in starts(height, side, stride) for left in lefts]


def scaled_size(
    height: int, width: int, scale: tuple[float, float], *, side: int
) -> tuple[int, int]:
    """The size at which a picture is cut into windows.

    It keeps its aspect, and is the largest within `scale`, the bounds of the long and the short
    side in either order. A short side below that of a window becomes `side`: this is what
    mmsegmentation's `min_size` does for networks of a fixed input size, so that windows need no
    padding.
    """
    factor = max(sizes.fitting_factor(height, width, scale), side / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize_picture(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resizing without antialiasing, as OpenCV's INTER_LINEAR within one grey level.

    Args:
      picture: uint8 [h, w, 3].
      size: (height, width) wanted.

    Returns:
      uint8 [height, width, 3].
    """
    if picture.shape[:2] == tuple(size):
        return picture
    x = picture.astype(np.float32)
    for source, target in zip(picture.shape[:2], size, strict=True):
        matrix = bilinear_matrix(source, target, align_corners=False).astype(np.float32)
        x = _banded_product(matrix, x).swapaxes(0, 1)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


class View(NamedTuple):
    """One of the versions of a picture that a network sees.

    Attributes:
      windows: uint8 [N, S, T, 3], row by row.
      size: (height, width) of the picture out of which they are cut.
      flipped: whether that is the mirror image.
    """

    windows: np.ndarray
    size: tuple[int, int]
    flipped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views(abc.ABC):
    """How a network sees a picture, and how its logits become labels.

    Attributes:
      scale: bounds of the long and the short side, see `scaled_size`.
      scales: factors on `scale`, of which each gives a view of the picture.
      flip: whether the mirror image of each is a view too.

    Raises:
      ConfigError: there is no scale, or one that is not above 0.
    """

    scale: tuple[float, float]
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self):
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"scales={self.scales}: expected at least one factor above 0")

    @property
    @abc.abstractmethod
    def smallest(self) -> int:
        """Pixels that the short side of a scaled picture has at least."""

    @abc.abstractmethod
    def windows(self, picture: np.ndarray) -> np.ndarray:
        """What the network sees of a scaled picture: uint8 [N, S, T, 3], row by row."""

    @abc.abstractmethod
    def matrix(self, length: int, target: int, *, low: int) -> np.ndarray:
        """From the logits of windows beside each other to those of a picture, along one axis.

        Args:
          length: pixels of the scaled picture.
          target: pixels of the result.
          low: logits of a window.

        Returns:
          float32 [target, windows * low].
        """

    def views(self, picture: np.ndarray) -> list[View]:
        """All views of a picture, uint8 [h, w, 3] RGB."""
        return [
            self._view(picture, size, flipped)
            for size, flipped in self._kinds(picture.shape[0], picture.shape[1])
        ]

    def _kinds(self, height: int, width: int) -> Iterator[tuple[tuple[int, int], bool]]:
        """The size of the scaled picture for each view, and whether that is the mirror image."""
        for factor in self.scales:
            scale = int(self.scale[0] * factor), int(self.scale[1] * factor)
            size = scaled_size(height, width, scale, side=self.smallest)
            yield from ((size, flipped) for flipped in ((False, True) if self.flip else (False,)))

    def _view(self, picture: np.ndarray, size: tuple[int, int], flipped: bool) -> View:
        picture = resize_picture(picture, size)
        return View(self.windows(picture[:, ::-1] if flipped else picture), size, flipped)

    def labels(
        self, views: Sequence[View], logits: Sequence[np.ndarray], size: tuple[int, int]
    ) -> np.ndarray:
        """The class of every pixel.

        Of several views, the means of the probabilities are compared, as in mmsegmentation.

        Args:
          views: what `views` returned.
          logits: float32 [N, h, w, K] of the windows of each view.
          size: (height, width) of the labels, which is the picture's own.

        Returns:
          int32 [height, width].
        """
        stitched = [
            self._stitched(view, part, size) for view, part in zip(views, logits, strict=True)
        ]
        labels = np.empty(size, np.int32)
        for top in range(0, size[0], TILE):
            for left in range(0, size[1], TILE):
                ys, xs = slice(top, top + TILE), slice(left, left + TILE)
                labels[ys, xs] = _scores(stitched, ys, xs).argmax(axis=-1)
        return labels

    def _stitched(self, view: View, logits: np.ndarray, size: tuple[int, int]) -> "_Stitched":
        _, height, width, classes = logits.shape
        rows = self.matrix(view.size[0], size[0], low=height)
        columns = self.matrix(view.size[1], size[1], low=width)
        if view.flipped:
            columns = columns[::-1]
        grid = rows.shape[1] // height, columns.shape[1] // width
        beside = logits.reshape(*grid, height, width, classes).transpose(0, 2, 1, 3, 4)
        return _Stitched(rows, columns, beside.reshape(grid[0] * height, grid[1] * width, classes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliding(Views):
    """A picture is cut into windows, whose logits are put together.

    Attributes:
      side: side of a window, the network's input size.
      stride: pixels between two windows.

    Raises:
      ConfigError: windows leave pixels out.
    """

    side: int
    stride: int

    def __post_init__(self):
        super().__post_init__()
        check_positive("the side of a window", self.side)
        if not 0 < self.stride <= self.side:
            raise ConfigError(
                f"windows of {self.side} pixels with a stride of {self.stride}: expected a stride "
                f"from 1 to {self.side}, so that every pixel is in a window"
            )

    @property
    def smallest(self) -> int:
        """See `Views`."""
        return self.side

    def windows(self, picture: np.ndarray) -> np.ndarray:
        """See `Views`."""
        places = windows(picture.shape[0], picture.shape[1], self.side, self.stride)
        cut = [picture[top : top + self.side, left : left + self.side] for top, left in places]
        return np.stack(cut)

    def matrix(self, length: int, target: int, *, low: int) -> np.ndarray:
        """See `Views`."""
        return stitching_matrix(length, target, side=self.side, stride=self.stride, low=low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Views):
    """A picture is one window, filled at the bottom and on the right up to whole patches.

    Attributes:
      patch: side of a patch.
      fill: grey levels of the pixels that are added, RGB.
    """

    patch: int
    fill: tuple[int, int, int]

    @property
    def smallest(self) -> int:
        """See `Views`."""
        return 1

    def windows(self, picture: np.ndarray) -> np.ndarray:
        """See `Views`."""
        height, width = picture.shape[:2]
        window = np.empty((self.filled(height), self.filled(width), 3), np.uint8)
        window[:] = self.fill
        window[:height, :width] = picture
        return window[None]

    def matrix(self, length: int, target: int, *, low: int) -> np.ndarray:
        """See `Views`."""
        return cutting_matrix(length, target, filled=self.filled(length), low=low)

    def shapes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """(height, width) of the window of each view of a picture, without making any."""
        kinds = self._kinds(height, width)
        return tuple((self.filled(size[0]), self.filled(size[1])) for size, _ in kinds)

    def filled(self, length: int) -> int:
        """Pixels of a side after it is filled: a pyramid needs two patches at least."""
        return max(-(-length // self.patch), 2) * self.patch


class _Stitched(NamedTuple):
    """The logits of all windows beside each other, and the matrices that put them in place."""

    rows: np.ndarray  # [H, windows * h]
    columns: np.ndarray  # [W, windows * w]
    logits: np.ndarray  # [windows * h, windows * w, K]

    def at(self, ys: slice, xs: slice) -> np.ndarray:
        """The logits of a tile of the picture. [y, x, K]"""
        rows, columns = self.rows[ys], self.columns[xs]
        needed = _columns_in_use(rows), _columns_in_use(columns)
        part = np.tensordot(rows[:, needed[0]], self.logits[np.ix_(*needed)], axes=1)
        return columns[:, needed[1]] @ part


@functools.lru_cache(maxsize=128)
def stitching_matrix(length: int, target: int, *, side: int, stride: int, low: int) -> np.ndarray:
    """From the logits of windows beside each other to those of a picture, along one axis.

    Args:
      length: pixels of the picture out of which the windows are cut.
      target: pixels of the result.
      side: pixels of a window.
      stride: pixels between windows.
      low: logits of a window.

    Returns:
      float32 [target, windows * low].
    """
    places = starts(length, side, stride)
    enlarged = bilinear_matrix(low, side, align_corners=False)
    canvas = np.zeros((length, len(places), low))
    covered = np.zeros((length, 1, 1))
    for index, start in enumerate(places):
        canvas[start : start + side, index] = enlarged
        covered[start : start + side] += 1
    mean = (canvas / covered).reshape(length, -1)
    return (bilinear_matrix(length, target, align_corners=False) @ mean).astype(np.float32)


@functools.lru_cache(maxsize=128)
def cutting_matrix(length: int, target: int, *, filled: int, low: int) -> np.ndarray:
    """From the logits of a filled picture to those of the picture, along one axis.

    Args:
      length: pixels of the picture before it was filled.
      target: pixels of the result.
      filled: pixels of the filled picture.
      low: logits of the filled picture.

    Returns:
      float32 [target, low].
    """
    enlarged = bilinear_matrix(low, filled, align_corners=False)[:length]
    return (bilinear_matrix(length, target, align_corners=False) @ enlarged).astype(np.float32)


def _scores(stitched: Sequence[_Stitched], ys: slice, xs: slice) -> np.ndarray:
    if len(stitched) == 1:
        return stitched[0].at(ys, xs)
    return np.sum([_softmax(view.at(ys, xs)) for view in stitched], axis=0)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _banded_product(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The product of [M, N], whose rows have a few entries side by side, and [N, ...]."""
    parts = []
    for top in range(0, len(matrix), TILE):
        rows = matrix[top : top + TILE]
        needed = _columns_in_use(rows)
        parts.append(np.tensordot(rows[:, needed], x[needed], axes=1))
    return np.concatenate(parts)


def _columns_in_use(matrix: np.ndarray) -> np.ndarray:
    return np.flatnonzero(matrix.any(axis=0))
