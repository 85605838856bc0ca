"""From an example to a row of a batch: decode, crop, antialiased resize, flip.

Everything random comes from the generator that is passed in, so a picture's augmentation is a
function of the seed, the epoch and its position in the dataset.
"""

import io
import math
import struct
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from fd_jax.data.datasets import BrokenImageError, Example
from fd_jax.data.elements import Elements, Row, labelled_image
from fd_jax.data.randaugment import RandAugment
from fd_jax.errors import ConfigError, check_choice

Interpolation = Literal["bilinear", "bicubic"]
Crop = Literal["retried", "single"]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman
EVAL_RATIO = 256 / 224  # of the short side before the centre crop to the side after it


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Decodes to RGB as torchvision's loader does: no EXIF rotation, alpha dropped.

    OpenCV takes the everyday case, a whole JPEG in grey or YCbCr: the same pixels as Pillow's in
    three quarters of the time. Everything else is Pillow's, whose word on a file that is cut off,
    which OpenCV fills with grey, also counts.

    Args:
      image: encoded bytes, or pixels [h, w, 3 or 1] that need no decoding.

    Returns:
      uint8 [h, w, 3].

    Raises:
      BrokenImageError: the bytes are no picture, or not all of one.
    """
    if isinstance(image, np.ndarray):
        return image if image.shape[-1] == 3 else np.repeat(image, 3, axis=-1)
    if _is_plain_jpeg(image):
        import cv2

        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
        if pixels is not None:
            return pixels
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow's readers raise a dozen kinds for bytes that are wrong
        raise BrokenImageError(f"cannot decode: {error}") from error


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether bytes are a JPEG of one or three 8-bit channels that reaches its end marker."""
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-64:]:
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, at + 1)
        if marker in _JPEG_FRAMES:
            bits, _, _, channels = struct.unpack_from(">BHHB", data, at + 4)
            return bits == 8 and channels in (1, 3)
        at += 2 + length
    return False


def resize(pixels: np.ndarray, height: int, width: int, method: Interpolation) -> np.ndarray:
    """Antialiased resize, Pillow's and so torchvision's. uint8 [h, w, 3] -> [height, width, 3]."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), _FILTERS[method]))


def mirror(pixels: np.ndarray) -> np.ndarray:
    """Left to right. uint8 [h, w, 3] -> [h, w, 3], in memory order: a view is slow to batch."""
    import cv2

    return cv2.flip(pixels, 1)


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, *, min_area: float, max_area: float = 1.0
) -> tuple[int, int, int, int]:
    """A crop of random area and aspect, as torchvision draws it.

    See docs/reference.md#distillation-crop.

    Args:
      rng: where the numbers come from.
      height: of the picture.
      width: of the picture.
      min_area: least share of the picture's area.
      max_area: largest share.

    Returns:
      (top, left, crop height, crop width). After ten misses the largest centred crop whose aspect
      lies in the allowed range.
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
    """A crop drawn once and cut to the picture, as in MAE's probe (docs/reference.md#probe-crop).

    Arguments and result as in `random_resized_crop_box`.
    """
    area = height * width * rng.uniform(min_area, 1.0)
    aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
    w = min(round(math.sqrt(area * aspect)), width)
    h = min(round(math.sqrt(area / aspect)), height)
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w


_CROPS = {"retried": random_resized_crop_box, "single": single_crop_box}


class TrainTransform:
    """Random resized crop and horizontal flip, then RandAugment where asked.

    See docs/reference.md#distillation-crop and docs/reference.md#fine-tune-augmentation.

    Args:
      image_size: side of the result in pixels.
      min_area: least share of the picture in a crop.
      interpolation: of the resize.
      flip: whether half of the pictures are mirrored.
      crop: "retried" until it fits into the picture, or "single".
      rand_augment: policy in timm's notation; "" for none.

    Raises:
      ConfigError: a share, a filter, a crop or a policy that does not exist.
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
        self.augment = RandAugment.parse(rand_augment) if rand_augment else None

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Encoded or decoded picture -> uint8 [S, S, 3]."""
        pixels = decode(image)
        top, left, h, w = self.crop_box(rng, *pixels.shape[:2], min_area=self.min_area)
        crop = pixels[top : top + h, left : left + w]
        out = resize(crop, self.image_size, self.image_size, self.interpolation)
        if self.flip and rng.random() < 0.5:
            out = mirror(out)
        return out if self.augment is None else self.augment(out, rng)


class EvalTransform:
    """Short side to int(ratio * S), bicubic, then the centre S x S.

    See docs/reference.md#evaluation-transform.

    Args:
      image_size: S.
      ratio: of the short side to S.
      crop: False squashes the whole picture to S x S instead.

    Raises:
      ConfigError: a ratio below 1, which would leave the picture smaller than the crop.
    """

    def __init__(self, image_size: int, *, ratio: float = EVAL_RATIO, crop: bool = True):
        if ratio < 1:
            raise ConfigError(f"data.eval_resize={ratio}; expected 1 or more")
        self.image_size = image_size
        self.short_side = int(ratio * image_size)
        self.crop = crop

    def __call__(
        self, image: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Encoded or decoded picture -> uint8 [S, S, 3]; `rng` is not used."""
        del rng
        pixels = decode(image)
        if not self.crop:
            return resize(pixels, self.image_size, self.image_size, "bicubic")
        height, width = pixels.shape[:2]
        if height < width:
            height, width = self.short_side, int(self.short_side * width / height)
        else:
            height, width = int(self.short_side * height / width), self.short_side
        pixels = resize(pixels, height, width, "bicubic")
        top, left = (round((side - self.image_size) / 2) for side in (height, width))
        return pixels[top : top + self.image_size, left : left + self.image_size]


class PictureTransform(Protocol):
    """From a picture, encoded or uint8 [h, w, 3], to uint8 [image_size, image_size, 3]."""

    image_size: int

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Raises BrokenImageError where the picture cannot be decoded."""
        ...


class LabelledImage:
    """Makes a row {"image", "label"} of an `Example`; the label is as it was."""

    def __init__(self, picture: PictureTransform):
        self.picture = picture

    @property
    def elements(self) -> Elements:
        """Of a square picture and its class."""
        return labelled_image(self.picture.image_size)

    def __call__(self, example: Example, rng: np.random.Generator) -> Row:
        """The picture transformed. -> {"image": uint8 [S, S, 3], "label": int}"""
        return {"image": self.picture(example.image, rng), "label": example.label}
