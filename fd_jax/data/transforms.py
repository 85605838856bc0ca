"""Transforms that turn an example into a row of a batch: decode, crop, antialiased resize, flip.

All random numbers come from the generator that is passed in, so the augmentation of an image
depends on the seed, the epoch and its position in the dataset alone.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Protocol

import numpy as np
from PIL import Image

from fd_jax.data.base import Crop, Interpolation
from fd_jax.data.datasets import Example
from fd_jax.data.decoding import decode
from fd_jax.data.elements import Elements, Row, labelled_image
from fd_jax.data.randaugment import RandAugment
from fd_jax.data.resolutions import Resolutions
from fd_jax.errors import ConfigError, check_choice
from fd_jax.models import cropping, sizes
from fd_jax.models.cropping import EVAL_RATIO
from fd_jax.models.sizes import ImageSize

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10

Box = tuple[int, int, int, int]  # (top, left, height, width) in pixels


def resize(pixels: np.ndarray, height: int, width: int, method: Interpolation) -> np.ndarray:
    """Resizes with antialiasing, as Pillow and torchvision do.

    uint8 [h, w, 3] -> uint8 [height, width, 3].
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), _FILTERS[method]))


def mirror(pixels: np.ndarray) -> np.ndarray:
    """Mirrors left to right. uint8 [h, w, 3] -> [h, w, 3].

    The result is a copy, because stacking reversed views into a batch is slow.
    """
    import cv2

    return cv2.flip(pixels, 1)


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, *, min_area: float, max_area: float = 1.0
) -> tuple[int, int, int, int]:
    """Draws a crop of random area and aspect, as torchvision does.

    See docs/reference.md#distillation-crop.

    Args:
      rng: source of the random numbers.
      height: height of the image.
      width: width of the image.
      min_area: minimum area, as a share of the image.
      max_area: maximum area, as a share of the image.

    Returns:
      (top, left, crop height, crop width). If ten draws do not fit into the image, this is the
      largest centred crop with an allowed aspect.
    """
    log_aspect = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    for _ in range(_TRIES):
        area = height * width * rng.uniform(min_area, max_area)
        aspect = math.exp(rng.uniform(*log_aspect))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h + 1))
            left = int(rng.integers(0, width - w + 1))
            return top, left, h, w
    ratio = width / height
    if ratio < _ASPECT[0]:
        w, h = width, round(width / _ASPECT[0])
    elif ratio > _ASPECT[1]:
        w, h = round(height * _ASPECT[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def single_crop_box(
    rng: np.random.Generator, height: int, width: int, *, min_area: float
) -> tuple[int, int, int, int]:
    """Draws a crop once and clips it to the image, as MAE's probe does.

    See docs/reference.md#probe-crop. Arguments and result are those of `random_resized_crop_box`.
    """
    area = height * width * rng.uniform(min_area, 1.0)
    aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
    w = min(round(math.sqrt(area * aspect)), width)
    h = min(round(math.sqrt(area / aspect)), height)
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w


_CROPS = {"retried": random_resized_crop_box, "single": single_crop_box}


class TrainTransform:
    """Random resized crop and horizontal flip, optionally followed by RandAugment.

    See docs/reference.md#distillation-crop and docs/reference.md#fine-tune-augmentation.

    Args:
      image_size: side S of the result, in pixels.
      min_area: minimum area of the crop, as a share of the image.
      interpolation: filter of the resize, "bilinear" or "bicubic".
      flip: whether half of the images are mirrored.
      crop: "retried" to draw until the crop fits into the image, or "single" to draw once and clip.
      rand_augment: policy in timm's notation; "" for none.
      exif: whether pictures are turned as their EXIF orientation says.

    Raises:
      ConfigError: `min_area` is out of range, or a filter, crop or policy is unknown.
    """

    def __init__(
        self,
        image_size: int,
        *,
        min_area: float,
        interpolation: Interpolation,
        flip: bool,
        crop: Crop = "retried",
        rand_augment: str = "",
        exif: bool = False,
    ):
        check_choice("data.interpolation", interpolation, _FILTERS)
        check_choice("data.crop", crop, _CROPS)
        if not 0 < min_area <= 1:
            raise ConfigError(f"data.min_area={min_area}; expected a share in (0, 1]")
        self.image_size = image_size
        self.min_area = min_area
        self.interpolation: Interpolation = interpolation
        self.flip = flip
        self.crop_box = _CROPS[crop]
        self.exif = exif
        self.augment = RandAugment.parse(rand_augment) if rand_augment else None

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transforms an encoded or decoded image. -> uint8 [S, S, 3]"""
        pixels = decode(image, exif=self.exif)
        out = self.view(pixels, *self.draw(rng, *pixels.shape[:2]))
        return out if self.augment is None else self.augment(out, rng)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[Box, bool]:
        """Draws a crop of an image of this size, and whether it is mirrored."""
        box = self.crop_box(rng, height, width, min_area=self.min_area)
        return box, self.flip and rng.random() < 0.5

    def view(self, pixels: np.ndarray, box: Box, flipped: bool) -> np.ndarray:
        """Crops, resizes and mirrors as `draw` says. uint8 [h, w, 3] -> [S, S, 3]"""
        top, left, h, w = box
        crop = pixels[top : top + h, left : left + w]
        out = resize(crop, self.image_size, self.image_size, self.interpolation)
        return mirror(out) if flipped else out


class EvalTransform:
    """Resizes, bicubic, until int(ratio * H) x int(ratio * W) is covered; crops the centre H x W.

    For a square this resizes the short side, see docs/reference.md#evaluation-transform.

    Args:
      image_size: side of a square result in pixels, or its height H and width W.
      ratio: ratio of the area that the resized image covers to the result, per side.
      crop: whether to crop; if False, the whole image is squashed to H x W instead.
      exif: whether pictures are turned as their EXIF orientation says.

    Raises:
      ConfigError: the ratio is below 1, which would make the image smaller than the crop.
    """

    def __init__(
        self,
        image_size: ImageSize,
        *,
        ratio: float = EVAL_RATIO,
        crop: bool = True,
        exif: bool = False,
    ):
        if ratio < 1:
            raise ConfigError(f"data.eval_resize={ratio}; expected 1 or more")
        self.image_size = image_size
        self.sides = sizes.sides(image_size)
        self.covered = int(ratio * self.sides[0]), int(ratio * self.sides[1])
        self.crop, self.exif = crop, exif

    @property
    def short_side(self) -> int:
        """Short side in pixels of what the resized image covers."""
        return min(self.covered)

    def __call__(
        self, image: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Transforms an encoded or decoded image. -> uint8 [H, W, 3]; `rng` is not used."""
        del rng
        pixels = decode(image, exif=self.exif)
        if not self.crop:
            return resize(pixels, *self.sides, "bicubic")
        height, width = cropping.covering(pixels, self.covered)
        return cropping.centre(resize(pixels, height, width, "bicubic"), self.sides)


class ImageTransform(Protocol):
    """Turns an image, encoded or uint8 [h, w, 3], into uint8 [H, W, 3] of its `image_size`."""

    @property
    def image_size(self) -> ImageSize:
        """Side of a square result in pixels, or its height and width."""
        ...

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Transforms one image.

        Raises:
          BrokenImageError: the image cannot be decoded.
        """
        ...


class LabelledImage:
    """Turns an `Example` into a row {"image", "label"}; the label stays unchanged."""

    def __init__(self, transform: ImageTransform):
        self.transform = transform

    @property
    def elements(self) -> Elements:
        """Elements of a square image and its class."""
        return labelled_image(self.transform.image_size)

    def __call__(self, example: Example, rng: np.random.Generator) -> Row:
        """Transforms the image. -> {"image": uint8 [S, S, 3], "label": int}"""
        return {"image": self.transform(example.image, rng), "label": example.label}


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """The transform of the training batch of each step, where the side of images varies.

    Attributes:
      by_side: transforms by the side of their images.
      resolutions: the side at each step.
    """

    by_side: Mapping[int, LabelledImage]
    resolutions: Resolutions

    def __call__(self, step: int) -> LabelledImage:
        """The transform of the batch of a step."""
        return self.by_side[self.resolutions.at(step)]
