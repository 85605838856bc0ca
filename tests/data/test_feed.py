"""`Feed`: labels that can be used, and labels and splits that cannot."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import base
from fd_jax.data.feed import Feed
from fd_jax.errors import DataError


class HiddenLabels(tfds.core.GeneratorBasedBuilder):
    """Grey squares; the labels of the test split are hidden, like those of ImageNet."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for index in range(6):
            label = index % 3 if split == "train" else -1
            yield index, {"image": np.full((8, 8, 3), index, np.uint8), "label": label}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("hidden"))
    tfds.builder(
        "hidden_labels", data_dir=folder, file_format="array_record"
    ).download_and_prepare()
    return folder


def make_feed(data_dir, **fields):
    config = base.common().data
    config.update(name="hidden_labels", data_dir=data_dir, image_size=8, **fields)
    return Feed(**config)


def test_splits_with_labels_are_accepted(data_dir):
    for eval_split in ("", "train[3:]"):
        feed = make_feed(data_dir, eval_split=eval_split)
        feed.number_labels()
        assert feed.classes == 3


def test_a_split_with_hidden_labels_is_refused(data_dir):
    with pytest.raises(DataError, match=r"hidden_labels/test hides its class labels: .* is -1"):
        make_feed(data_dir, eval_split="test").number_labels()


def test_a_folder_cannot_be_training_and_held_out_at_once(tmp_path):
    (tmp_path / "one.png").write_bytes(b"not looked at")
    config = base.common().data
    config.update(name=f"folder:{tmp_path}", image_size=8)
    with pytest.raises(DataError, match="data.eval_split='validation' would hold nothing out"):
        Feed(**config)
    config.eval_split = ""
    assert Feed(**config).eval_dataset is None
