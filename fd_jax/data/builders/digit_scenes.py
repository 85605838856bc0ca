"""Photographs with cards on them, each with a handwritten digit, and the class of every pixel."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from fd_jax.data.base import IGNORED
from fd_jax.data.builders.digits import read_digits
from fd_jax.data.builders.photos import PHOTOS, TRAIN_SHARE, encode_png, load_photo

CLASS_NAMES = ("background", *(f"digit {digit}" for digit in range(10)))
PICTURES = {"train": 600, "test": 120}
SIDES = 128, 192  # limits of height and width; the narrowest held-out part of a photo is 135 wide
CARD_SIDES = 36, 56  # limits of the side of a card, with its border
CARDS = 40, 60  # limits of the number of cards that are tried; one without room is left out
BORDER = 2  # pixels around a card that are ignored
_MARGIN = 1  # pixels of paper around a digit of 8 x 8 pixels, before it is enlarged
_SHADES = 80  # number of levels of each channel of ink, and of paper
_SEEDS = {"train": 0, "test": 1}


def draw_scene(
    rng: np.random.Generator, photo: np.ndarray, digits: Sequence[tuple[np.ndarray, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Puts cards with a digit at random places of a random part of a photo.

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
    picture = photo[top : top + height, left : left + width].copy()
    mask = np.zeros((height, width), np.uint8)
    for _ in range(_between(rng, *CARDS)):
        digit, label = digits[_between(rng, 0, len(digits) - 1)]
        side = _between(rng, *CARD_SIDES)
        top, left = _between(rng, 0, height - side), _between(rng, 0, width - side)
        box = slice(top, top + side), slice(left, left + side)
        card = draw_card(rng, digit, side - 2 * BORDER)
        if not mask[box].any():
            mask[box] = IGNORED
            inside = tuple(slice(s.start + BORDER, s.stop - BORDER) for s in box)
            mask[inside], picture[inside] = label + 1, card
    return picture, mask


def draw_card(rng: np.random.Generator, digit: np.ndarray, side: int) -> np.ndarray:
    """Draws a digit in dark ink on light paper, of random colours.

    Args:
      rng: source of the random numbers.
      digit: ink, uint8 [8, 8].
      side: side of the card in pixels.

    Returns:
      uint8 [side, side, 3].
    """
    ink, paper = rng.uniform(0, _SHADES, 3), 255 - rng.uniform(0, _SHADES, 3)
    small = Image.fromarray(np.pad(digit, _MARGIN))
    large = small.resize((side, side), Image.Resampling.BILINEAR)
    share = np.asarray(large, np.float32)[..., None] / 255
    return np.round(paper + share * (ink - paper)).astype(np.uint8)


def photo_part(name: str, split: str) -> np.ndarray:
    """Returns the columns of a photo that belong to a split, as in the dataset `photos`."""
    photo = load_photo(name)
    cut = round(photo.shape[1] * TRAIN_SHARE)
    return photo[:, :cut] if split == "train" else photo[:, cut:]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """Cards with digits of scikit-learn on the photos of `photos`, in 11 classes.

    Class 0 is the background, and class k is a card with the digit k - 1. The two pixels around a
    card are ignored (255). The splits share neither a digit nor a pixel of a photo.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"1.0.0": "First version.", "2.0.0": "Cards with digits, labelled as a whole."}
    name = "digit_scenes"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Cards with digits on photographs, with the class of every pixel.",
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
