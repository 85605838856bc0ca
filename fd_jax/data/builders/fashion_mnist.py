"""Fashion-MNIST from the files of Debian's package dataset-fashion-mnist."""

from collections.abc import Iterator
import gzip
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fd_jax.data.builders.photos import encode_png

FOLDER = pathlib.Path("/usr/share/datasets/fashion-mnist")  # folder to which the package installs
_FILES = {"train": "train", "test": "t10k"}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads a gzipped array of bytes in MNIST's IDX format. -> uint8, of the stored shape

    The fourth byte is the rank, followed by one big-endian 32-bit size per axis.
    """
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


class FashionMnistDebian(tfds.core.GeneratorBasedBuilder):
    """Ten kinds of clothing, 28 x 28 pixels; 60,000 training and 10,000 test images."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    name = "fashion_mnist_debian"  # TFDS's own fashion_mnist downloads the same images

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="Zalando's Fashion-MNIST as Debian packages it, as RGB.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        if not FOLDER.exists():
            raise FileNotFoundError(
                f"{FOLDER} does not exist; install it with apt-get install dataset-fashion-mnist"
            )
        return {split: self._generate_examples(split) for split in _FILES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        images = read_idx(FOLDER / f"{_FILES[split]}-images-idx3-ubyte.gz")
        labels = read_idx(FOLDER / f"{_FILES[split]}-labels-idx1-ubyte.gz")
        for key, (grey, label) in enumerate(zip(images, labels, strict=True)):
            image = encode_png(np.repeat(grey[..., None], 3, axis=-1))
            yield key, {"image": image, "label": int(label)}
