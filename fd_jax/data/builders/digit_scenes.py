"""Photographs with handwritten digits on them, and the class of every pixel."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
import tensorflow_datasets as tfds

from fd_jax.data.base import IGNORED
from fd_jax.data.builders.digits import read_digits
from fd_jax.data.builders.photos import PHOTOS, TRAIN_SHARE, encode_png, load_photo

CLASS_NAMES = ("background", *(f"digit {digit}" for digit in range(10)))
PICTURES = {"train": 600, "test": 120}
SIDES = 128, 192  # limits of height and width; the narrowest held-out part of a photo is 135 wide
DIGIT_SIDES = 32, 64  # limits of the side of a digit of 8 x 8 pixels after it is enlarged
DIGITS = 12, 24  # limits of the number of digits that are placed; one without room is left out
BORDER = 2  # pixels around a digit that are ignored
_INK = 128  # level from which a pixel belongs to the digit
_SHADES = 56  # number of levels of each channel of a dark digit, and of a light one
_SEEDS = {"train": 0, "test": 1}


def draw_scene(
    rng: np.random.Generator, photo: np.ndarray, digits: Sequence[tuple[np.ndarray, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Puts digits at random places of a random part of a photo.

    Args:
      rng: source of the random numbers.
      photo: uint8 [h, w, 3].
      digits: digits to choose from, as pairs of the ink, uint8 [8, 8], and the digit.

    Returns:
      The picture, uint8 [h, w, 3], and the class of its pixels, uint8 [h, w].
    """
    height, width = (_between(rng, SIDES[0], min(SIDES[1], side)) for side in photo.shape[:2])
    top = _between(rng, 0, photo.shape[0] - height)
    left = _between(rng, 0, photo.shape[1] - width)
    picture = photo[top : top + height, left : left + width].astype(np.float32)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(_between(rng, *DIGITS)):
        digit, label = digits[_between(rng, 0, len(digits) - 1)]
        side = _between(rng, *DIGIT_SIDES)
        top, left = _between(rng, 0, height - side), _between(rng, 0, width - side)
        box = slice(top, top + side), slice(left, left + side)
        shade = rng.uniform(0, _SHADES, 3)
        if not mask[box].any():
            ink = enlarge(digit, side)
            share = ink[..., None].astype(np.float32) / 255
            colour = 255 - shade if picture[box].mean() < 128 else shade  # stands out
            picture[box] += share * (colour - picture[box])
            mask[box] = label_digit(ink, label + 1)
    return np.round(picture).astype(np.uint8), mask


def enlarge(digit: np.ndarray, side: int) -> np.ndarray:
    """Enlarges a digit bilinearly. uint8 [8, 8] -> uint8 [side, side], with a border of no ink"""
    inner = side - 2 * BORDER
    enlarged = Image.fromarray(digit).resize((inner, inner), Image.Resampling.BILINEAR)
    return np.pad(np.asarray(enlarged), BORDER)


def label_digit(ink: np.ndarray, label: int) -> np.ndarray:
    """Labels the pixels of a digit, and ignores those around it. uint8 [side, side] -> the same"""
    inside = ink >= _INK
    grown = Image.fromarray(inside.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * BORDER + 1))
    around = np.where(np.asarray(grown) > 0, IGNORED, 0)
    return np.where(inside, label, around).astype(np.uint8)


def photo_part(name: str, split: str) -> np.ndarray:
    """Returns the columns of a photo that belong to a split, as in the dataset `photos`."""
    photo = load_photo(name)
    cut = round(photo.shape[1] * TRAIN_SHARE)
    return photo[:, :cut] if split == "train" else photo[:, cut:]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Digits of scikit-learn on the photos of the dataset `photos`, in 11 classes.

    Class 0 is the background, and class k shows the digit k - 1. The two pixels around a digit are
    ignored (255). The splits share neither a digit nor a pixel of a photo.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    name = "digit_scenes"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Handwritten digits on photographs, with the class of every pixel.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "mask": tfds.features.LabeledImage(
                        labels=list(CLASS_NAMES), shape=(None, None, 1), encoding_format="png"
                    ),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in PICTURES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        photos = [photo_part(name, split) for name in PHOTOS]
        digits = [(ink, label) for _, ink, label in read_digits(split)]
        for key in range(PICTURES[split]):
            rng = np.random.default_rng((_SEEDS[split], key))
            photo = photos[key % len(photos)]
            picture, mask = draw_scene(rng, photo, digits)
            yield key, {"image": encode_png(picture), "mask": encode_png(mask)}
