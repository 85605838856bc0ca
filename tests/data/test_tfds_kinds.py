"""TFDS datasets with other labels and pictures than usual, and with damaged shards."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fd_jax import features
from fd_jax.data import datasets
from fd_jax.data.decoding import decode
from fd_jax.data.feed import check_labelled
from fd_jax.errors import DataError

COUNT = 6
NAMES = ("zebra", "ant", "bee")


class Kinds(tfds.core.GeneratorBasedBuilder):
    """Pictures of one colour, with labels of the kind that the config names."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, version="1.0.0")
        for name in ("several", "text", "named", "scalar", "none", "deep", "floats")
    ]

    def _info(self):
        kind = self.builder_config.name
        labels = {
            "several": tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)),
            "text": tfds.features.Text(),
            "named": tfds.features.ClassLabel(names=NAMES),
            "scalar": tfds.features.Scalar(np.int64),
        }
        dtype = {"deep": np.uint16, "floats": np.float32}.get(kind, np.uint8)
        channels = 1 if kind in ("deep", "floats") else 3
        features = {"image": tfds.features.Image(shape=(8, 8, channels), dtype=dtype)}
        if kind in labels:
            features["label"] = labels[kind]
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(COUNT), "test": self._generate_examples(COUNT - 1)}

    def _generate_examples(self, count):
        kind = self.builder_config.name
        image = self.info.features["image"]
        labels = {
            "several": lambda i: [i % 3, 0],
            "text": lambda i: f"number {i}",
            "named": lambda i: i % 3,
            "scalar": lambda i: i,
        }
        for index in range(count):
            value = index * 257 if kind == "deep" else index
            example = {"image": np.full(image.shape, value, image.np_dtype)}
            if kind in labels:
                example["label"] = labels[kind](index)
            yield index, example


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("kinds"))
    for config in Kinds.BUILDER_CONFIGS:
        builder = tfds.builder(f"kinds/{config.name}", data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    return folder


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("several", r"\(its feature 'label' is Sequence\(ClassLabel"),
        ("text", r"\(its feature 'label' is Text\("),
        ("scalar", r"\(its feature 'label' is Scalar\("),
        ("none", r"\(it has no feature 'label'; its features are \['image'\]\)"),
    ],
)
def test_other_labels_do_no_harm_and_are_named_where_they_are_needed(kind, why, data_dir):
    dataset = datasets.open_dataset(f"kinds/{kind}", "train", data_dir=data_dir)
    assert dataset.num_classes is None and dataset.class_names is None
    labels = [dataset[index].label for index in range(COUNT)]
    assert labels == [-1] * COUNT if kind != "scalar" else sorted(labels) == list(range(COUNT))
    for view in (dataset, datasets.Subset(dataset, [0])):
        with pytest.raises(DataError, match=f"kinds/{kind}/train has no class labels {why}"):
            check_labelled(view)


def test_features_need_no_labels(data_dir, teacher, tmp_path):
    output = tmp_path / "features.npz"
    command = [f"--model={teacher}", "--input=kinds/several", f"--data_dir={data_dir}"]
    assert features.main([*command, f"--output={output}"]) == 0
    with np.load(output) as file:
        assert list(file["labels"]) == [-1] * COUNT and len(file["cls"]) == COUNT


def test_class_names_are_those_of_the_dataset(data_dir):
    dataset = datasets.open_dataset("kinds/named", "train", data_dir=data_dir)
    assert dataset.class_names == NAMES
    assert datasets.Subset(dataset, [0]).class_names == NAMES


def test_pictures_of_16_bits_are_scaled(data_dir):
    dataset = datasets.open_dataset("kinds/deep", "train", data_dir=data_dir)
    levels = {int(decode(dataset[index].image)[0, 0, 0]) for index in range(COUNT)}
    assert levels == set(range(COUNT))


def test_pictures_of_floats_are_refused(data_dir):
    """TFDS stores a float as the four channels of a PNG, which would decode without an error."""
    with pytest.raises(DataError, match="kinds/floats: its feature 'image' is Image.*float32"):
        datasets.open_dataset("kinds/floats", "train", data_dir=data_dir)


# --- shards ----------------------------------------------------------------------------------


@pytest.fixture
def shards(data_dir, tmp_path):
    """A copy of a dataset, and its shards by split."""
    shutil.copytree(f"{data_dir}/kinds/named", tmp_path / "kinds" / "named")
    found = {split: next(tmp_path.rglob(f"*-{split}.array_record*")) for split in ("train", "test")}
    return str(tmp_path), found


def test_whole_shards_are_accepted_and_those_of_other_splits_are_not_looked_at(shards):
    data_dir, files = shards
    files["test"].unlink()
    assert len(datasets.open_dataset("kinds/named", "train[2:]", data_dir=data_dir)) == COUNT - 2


@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_shard_that_is_cut_off_is_named(shards, share):
    data_dir, files = shards
    data = files["train"].read_bytes()
    files["train"].write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        DataError, match=f"1 of its 1 shards .*{files['train']} is cut off"
    ) as error:
        datasets.open_dataset("kinds/named", "train", data_dir=data_dir)
    assert "python -m fd_jax.data.prepare --name=kinds/named" in str(error.value)


def test_a_shard_that_is_missing_is_named(shards):
    data_dir, files = shards
    files["train"].unlink()
    with pytest.raises(DataError, match=f"{files['train']} is missing"):
        datasets.open_dataset("kinds/named", "train[:2]", data_dir=data_dir)


def test_the_shard_of_another_split_is_noticed_by_its_length(shards):
    data_dir, files = shards
    shutil.copy(files["test"], files["train"])
    with pytest.raises(DataError, match="holds 5 examples, and dataset_info.json says 6"):
        datasets.open_dataset("kinds/named", "train", data_dir=data_dir)
