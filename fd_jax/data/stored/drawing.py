"""The views of pictures that a teacher sees before a run, drawn as the run would draw them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fd_jax.data import elements, randomness
from fd_jax.data.datasets import BrokenImageError, Dataset, Example, SkippedError, View
from fd_jax.data.decoding import decode
from fd_jax.data.elements import Element, Elements, Row
from fd_jax.data.stored.description import Views
from fd_jax.data.stored.records import SKIPPED, UNREADABLE, WHOLE
from fd_jax.data.transforms import Box, EvalTransform, TrainTransform


class Numbered(NamedTuple):
    """A labelled image and its position in its split."""

    image: bytes | np.ndarray
    label: int
    index: int


class WithIndex(View):
    """A dataset whose examples know their positions."""

    def __getitem__(self, index: int) -> Numbered:
        image, label = self.dataset[index]
        return Numbered(image, label, index)


class Viewer(Protocol):
    """Crop, resize and flip of pictures; `transforms.TrainTransform` is one."""

    image_size: int
    exif: bool

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[Box, bool]:
        """Draws a crop of a picture of this size, and whether it is mirrored."""
        ...

    def view(self, pixels: np.ndarray, box: Box, flipped: bool) -> np.ndarray:
        """The view of decoded pixels. uint8 [h, w, 3] -> [S, S, 3]"""
        ...


class HeldOut:
    """The view that an evaluation has of a picture, of which nothing is drawn.

    Args:
      image_size: side S of the result, in pixels.
      ratio, crop, exif: as in `transforms.EvalTransform`.
    """

    def __init__(self, image_size: int, *, ratio: float, crop: bool, exif: bool):
        self.image_size, self.exif = image_size, exif
        self._transform = EvalTransform(image_size, ratio=ratio, crop=crop, exif=exif)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[Box, bool]:
        """The whole picture, not mirrored."""
        del rng
        return (0, 0, height, width), False

    def view(self, pixels: np.ndarray, box: Box, flipped: bool) -> np.ndarray:
        """The view of decoded pixels. uint8 [h, w, 3] -> [S, S, 3]"""
        del box, flipped
        return self._transform(pixels)


def viewer_of(views: Views) -> Viewer:
    """The crop, resize and flip of the stored views."""
    if views.held_out:
        return HeldOut(
            views.image_size, ratio=views.eval_resize, crop=views.eval_crop, exif=views.exif
        )
    return TrainTransform(
        views.image_size,
        min_area=views.min_area,
        interpolation=views.interpolation,
        flip=views.flip,
        crop=views.crop,
        exif=views.exif,
    )


class Drawn:
    """All views of some pictures of a dataset; each example is a row, as `elements` says.

    A picture that cannot be read is a row, too: its state says so, and `failures` why.

    Args:
      dataset: the whole split.
      views: which views are drawn.
      pictures: positions of the pictures.

    Attributes:
      failures: reasons by position in the split.
    """

    def __init__(self, dataset: Dataset, views: Views, pictures: Sequence[int]):
        self.name, self.failures = dataset.name, dict[int, str]()
        self._dataset, self._views, self._pictures = dataset, views, pictures
        self._viewer = viewer_of(views)

    @property
    def elements(self) -> Elements:
        """Pixels [V, S, S, 3], boxes and flips of V views, size and state of a picture."""
        side, number = self._views.image_size, self._views.number
        return {
            "image": Element((number, side, side, 3), "uint8"),
            "box": Element((number, 4), "int32"),
            "flipped": Element((number,), "bool"),
            "size": Element((2,), "int32"),
            "state": Element((), "uint8", UNREADABLE),
        }

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Row:
        picture = self._pictures[index]
        try:
            return self._row(self._dataset[picture], picture)
        except SkippedError:
            return {**elements.padding(self.elements), "state": SKIPPED}
        except BrokenImageError as error:
            self.failures[picture] = str(error)
            return elements.padding(self.elements)

    def describe(self, index: int) -> str:
        """Returns the description of a picture in the dataset."""
        return self._dataset.describe(self._pictures[index])

    def files(self) -> list[tuple[str, str]]:
        """The files of the whole dataset."""
        return self._dataset.files()

    def _row(self, example: Example, index: int) -> Row:
        pixels = decode(example.image, exif=self._views.exif)
        size = pixels.shape[:2]
        drawn = [self._viewer.draw(self._rng(index, v), *size) for v in self._numbers]
        return {
            "image": np.stack([self._viewer.view(pixels, *each) for each in drawn]),
            "box": np.array([box for box, _ in drawn], np.int32),
            "flipped": np.array([flipped for _, flipped in drawn]),
            "size": np.array(size, np.int32),
            "state": WHOLE,
        }

    def _rng(self, index: int, view: int) -> np.random.Generator:
        return randomness.generator(randomness.AUGMENT, self._views.seed, view, index)

    @property
    def _numbers(self) -> range:
        return range(self._views.number)


class AsRow:
    """The transform of `Drawn`, whose examples are rows already."""

    def __init__(self, drawn: Drawn):
        self.elements: Elements = drawn.elements

    def __call__(self, row: Any, rng: np.random.Generator) -> Row:
        """Returns the row."""
        del rng
        return row
