"""The 1,797 handwritten digits of scikit-learn."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fd_jax.data.builders.photos import encode_png

TEST_EVERY = 5  # every fifth digit of each class is in the test split


def read_digits(split: str) -> Iterator[tuple[int, np.ndarray, int]]:
    """Yields the digits of a split: position in scikit-learn, ink as uint8 [8, 8], and digit."""
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    seen = np.zeros(10, int)  # digits so far, by class
    for key, (grey, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        is_test = seen[label] % TEST_EVERY == TEST_EVERY - 1
        seen[label] += 1
        if is_test == (split == "test"):
            ink = np.round(grey / 16 * 255).astype(np.uint8)  # scikit-learn stores 0..16
            yield key, ink, int(label)


class Digits(tfds.core.GeneratorBasedBuilder):
    """Digits of 8 x 8 pixels in ten classes; every fifth of each class is in the test split."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    name = "digits"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="scikit-learn's handwritten digits, 0..255, as RGB.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, ink, label in read_digits(split):
            image = encode_png(np.repeat(ink[..., None], 3, axis=-1))
            yield key, {"image": image, "label": label}
