"""From an encoded picture to a uint8 square: decode, crop, antialiased resize, flip.

Everything random comes from the generator that is passed in, so a picture's augmentation is a
function of the seed, the epoch and its place in the dataset.
"""

import io
import math
from typing import Literal

import numpy as np
from PIL import Image

Interpolation = Literal["bilinear", "bicubic"]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
EVAL_RATIO = 256 / 224  # of the short side before the centre crop to the side after it


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Decodes to RGB. -> uint8 [h, w, 3].

    Raises:
      ValueError: the bytes are no picture, or it is cut off.
    """
    if isinstance(image, np.ndarray):
        return image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    import cv2

    # Like torchvision's loader, the EXIF orientation is not applied.
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), flags)
    if pixels is None:  # CMYK JPEGs and a few rare formats that Pillow knows
        try:
            return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        except OSError as error:
            raise ValueError(f"cannot decode: {error}") from error
    return pixels


def resize(pixels: np.ndarray, height: int, width: int, method: Interpolation) -> np.ndarray:
    """Antialiased resize, Pillow's and so torchvision's. uint8 [h, w, 3] -> [height, width, 3]."""
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), _FILTERS[method]))


def random_resized_crop_box(
    rng: np.random.Generator, height: int, width: int, *, min_area: float, max_area: float = 1.0
) -> tuple[int, int, int, int]:
    """A crop of random area and aspect, as torchvision draws it (reference 4.1).

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
    log_aspect = tuple(math.log(value) for value in _ASPECT)
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


class DistillTransform:
    """The paper's only augmentation: random resized crop and horizontal flip (reference 4.1).

    Args:
      image_size: side of the result in pixels.
      min_area: least share of the picture in a crop.
      interpolation: of the resize.
      flip: whether half of the pictures are mirrored.
    """

    def __init__(
        self, image_size: int, *, min_area: float, interpolation: Interpolation, flip: bool
    ):
        self.image_size = image_size
        self.min_area = min_area
        self.interpolation: Interpolation = interpolation
        self.flip = flip

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Encoded or decoded picture -> uint8 [S, S, 3]."""
        pixels = decode(image)
        top, left, h, w = random_resized_crop_box(
            rng, *pixels.shape[:2], min_area=self.min_area
        )
        crop = pixels[top : top + h, left : left + w]
        out = resize(crop, self.image_size, self.image_size, self.interpolation)
        return out[:, ::-1] if self.flip and rng.random() < 0.5 else out


class EvalTransform:
    """Short side to int(256/224 * S), bicubic, then the centre S x S (reference 4.4).

    Args:
      image_size: S.
      ratio: of the short side to S.
    """

    def __init__(self, image_size: int, *, ratio: float = EVAL_RATIO):
        self.image_size = image_size
        self.short_side = int(ratio * image_size)

    def __call__(
        self, image: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Encoded or decoded picture -> uint8 [S, S, 3]; `rng` is not used."""
        del rng
        pixels = decode(image)
        height, width = pixels.shape[:2]
        if height < width:
            height, width = self.short_side, int(self.short_side * width / height)
        else:
            height, width = int(self.short_side * height / width), self.short_side
        pixels = resize(pixels, height, width, "bicubic")
        top, left = (round((side - self.image_size) / 2) for side in (height, width))
        return pixels[top : top + self.image_size, left : left + self.image_size]
