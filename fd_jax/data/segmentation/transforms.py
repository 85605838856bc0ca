"""The training transform of mmsegmentation's ADE20K recipe, and the resize of its test.

See docs/reference.md#ade20k-pipeline. Both resize with OpenCV and without antialiasing, as the
sources do. All random numbers come from the generator that is passed in.
"""

import cv2
import numpy as np

from fd_jax.data import elements, transforms
from fd_jax.data.base import IGNORED
from fd_jax.data.elements import Elements, Row
from fd_jax.data.segmentation.labels import Labels, Scene
from fd_jax.errors import ConfigError
from fd_jax.models import sizes

_TRIES = 10  # crops that are looked at; the one after them is taken as it is
_BRIGHTNESS = 32.0  # largest shift, in grey levels
_FACTORS = 0.5, 1.5  # of contrast and of saturation
_HUE = 18  # OpenCV's hue has 180 steps of two degrees
_HUES = 180


def test_size(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int]:
    """Returns the largest size with the aspect of a picture that fits a scale.

    Args:
      height: height of the picture.
      width: width of the picture.
      scale: limits of the long and of the short side, in any order.

    Returns:
      Height and width, rounded to the nearest pixel, halves upwards.
    """
    factor = sizes.fitting_factor(height, width, scale)
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def resize_image(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes bilinearly without antialiasing. uint8 [h, w, 3] -> uint8 [height, width, 3]"""
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a mask; each pixel takes a label of the source. uint8 [h, w] -> [height, width]"""
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)


class TrainTransform:
    """Turns a `Scene` into a row: random resize, crop, flip, distortion and padding.

    Args:
      image_size: side S of the crop, in pixels.
      labels: which stored values are which classes.
      fill: grey levels outside the picture, RGB. The sources put 0 there after normalisation. That
        is the mean of the pixel statistics before it, and rounding it to whole grey levels is off
        by at most half a level, about 0.01 after normalisation.
      scale: long and short side in pixels within which pictures are resized.
      ratio: limits of the factor on `scale`.
      max_share: largest share of a crop's labelled pixels that one class may have; 1 for any.
      flip: whether half of the pictures are mirrored.
      distort: whether the colours are distorted.

    Raises:
      ConfigError: the limits of `ratio` are in the wrong order, or a setting is out of its range.
    """

    def __init__(
        self,
        image_size: int,
        *,
        labels: Labels,
        fill: tuple[int, int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        max_share: float,
        flip: bool,
        distort: bool,
    ):
        if not 0 < ratio[0] <= ratio[1]:
            raise ConfigError(f"data.ratio={ratio}: expected two factors above 0, ascending")
        if min(scale) < 1:
            raise ConfigError(f"data.scale={scale}: expected two sides in pixels")
        if not 0 < max_share <= 1:
            raise ConfigError(f"data.max_share={max_share}: expected a share in (0, 1]")
        self.image_size, self.labels = image_size, labels
        self.fill = tuple(map(int, fill))
        self.scale, self.ratio, self.max_share = scale, ratio, max_share
        self.flip, self.distort = flip, distort

    @property
    def elements(self) -> Elements:
        """Elements of a square picture and the class of each pixel."""
        return elements.labelled_pixels(self.image_size)

    def __call__(self, scene: Scene, rng: np.random.Generator) -> Row:
        """Transforms a scene. -> {"image": uint8 [S, S, 3], "mask": uint8 [S, S]}

        Raises:
          BrokenImageError: the picture or the mask cannot be decoded.
          DataError: the mask is not one of this picture, or has a label that is not a class.
        """
        pixels, mask = self.labels.read(scene)
        pixels, mask = random_resize(rng, pixels, mask, scale=self.scale, ratio=self.ratio)
        box = random_crop_box(rng, mask, self.image_size, max_share=self.max_share)
        pixels, mask = pixels[box], mask[box]
        if self.flip and rng.random() < 0.5:
            pixels, mask = transforms.mirror(pixels), transforms.mirror(mask)
        if self.distort:
            pixels = distort(rng, pixels)
        return {
            "image": pad(pixels, self.image_size, self.fill),
            "mask": pad(mask, self.image_size, (IGNORED,)),
        }


def random_resize(
    rng: np.random.Generator,
    pixels: np.ndarray,
    mask: np.ndarray,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes within `scale` times a random factor, keeping the aspect.

    The sides of the scale are cut to whole pixels, as in the sources.

    Returns:
      The picture, uint8 [h, w, 3], and the mask, uint8 [h, w].
    """
    factor = rng.uniform(*ratio)
    scaled = max(int(scale[0] * factor), 1), max(int(scale[1] * factor), 1)
    height, width = test_size(mask.shape[0], mask.shape[1], scaled)
    return resize_image(pixels, height, width), resize_mask(mask, height, width)


def random_crop_box(
    rng: np.random.Generator, mask: np.ndarray, size: int, *, max_share: float
) -> tuple[slice, slice]:
    """Draws a crop in which no class dominates.

    Up to ten crops are refused for having one class only, or one with `max_share` or more of the
    pixels that are not ignored. The eleventh is taken without being looked at, as in the sources.

    Args:
      rng: source of the random numbers.
      mask: labels of the picture, uint8 [h, w].
      size: side of the crop; a side of the picture that is shorter is kept whole.
      max_share: share from which a class dominates; 1 to take the first crop.

    Returns:
      The rows and columns of the crop.
    """
    box = _crop_box(rng, mask, size)
    for _ in range(_TRIES if max_share < 1 else 0):
        counts = np.bincount(mask[box].ravel(), minlength=256)
        counts[IGNORED] = 0
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < max_share:
            break
        box = _crop_box(rng, mask, size)
    return box


def _crop_box(rng: np.random.Generator, mask: np.ndarray, size: int) -> tuple[slice, slice]:
    height, width = mask.shape
    top = int(rng.integers(0, max(height - size, 0) + 1))
    left = int(rng.integers(0, max(width - size, 0) + 1))
    return slice(top, top + size), slice(left, left + size)


def distort(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Distorts brightness, contrast, saturation and hue, each with probability one half.

    A coin decides whether contrast comes before saturation and hue or after them. Levels are cut to
    whole numbers after each change, and the picture goes to HSV and back for each of the last two.
    A hue moves by -18 to 17 steps, since the sources leave out the upper limit.

    Args:
      rng: source of the random numbers.
      pixels: uint8 [h, w, 3] in RGB.

    Returns:
      uint8 [h, w, 3].
    """
    if _coin(rng):
        pixels = cv2.LUT(pixels, levels(shift=rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)))
    contrast_first = _coin(rng)
    if contrast_first:
        pixels = _random_contrast(rng, pixels)
    if _coin(rng):
        pixels = change_hsv(pixels, saturation=levels(factor=rng.uniform(*_FACTORS)))
    if _coin(rng):
        pixels = change_hsv(pixels, hue=hues(int(rng.integers(-_HUE, _HUE))))
    if not contrast_first:
        pixels = _random_contrast(rng, pixels)
    return pixels


def _coin(rng: np.random.Generator) -> bool:
    return rng.random() < 0.5


def _random_contrast(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    return cv2.LUT(pixels, levels(factor=rng.uniform(*_FACTORS))) if _coin(rng) else pixels


def levels(*, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Tabulates a level times a factor plus a shift, clipped and cut to a byte. -> uint8 [256]"""
    changed = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
    return np.clip(changed, 0, 255).astype(np.uint8)


def hues(steps: int) -> np.ndarray:
    """Tabulates a turn of OpenCV's hue, which begins again at 180. -> uint8 [256]"""
    return ((np.arange(256) + steps) % _HUES).astype(np.uint8)


def change_hsv(
    pixels: np.ndarray, *, hue: np.ndarray | None = None, saturation: np.ndarray | None = None
) -> np.ndarray:
    """Replaces hue or saturation by the values of a table. uint8 [h, w, 3] -> [h, w, 3], RGB

    Args:
      pixels: picture in RGB.
      hue: uint8 [256], new value of each hue; None to leave it.
      saturation: the same for the saturation.
    """
    same = np.arange(256, dtype=np.uint8)
    tables = [same if table is None else table for table in (hue, saturation, None)]
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, np.stack(tables, axis=-1)[None]), cv2.COLOR_HSV2RGB)


def pad(pixels: np.ndarray, size: int, value: tuple[int, ...]) -> np.ndarray:
    """Pads with a value at the bottom and on the right. [h, w, ...] -> [size, size, ...]"""
    below, right = size - pixels.shape[0], size - pixels.shape[1]
    return cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_CONSTANT, value=value)
