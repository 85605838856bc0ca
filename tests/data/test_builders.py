"""The datasets with builders of ours, compared with the packages they come from."""

import collections
import functools
import gzip
import os
import pathlib
import shutil

import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets

from fd_jax.data import datasets, prepare, transforms
from fd_jax.data.builders import fashion_mnist as fashion_mnist_builder
from fd_jax.data.builders import photos
from fd_jax.errors import DataError


@functools.cache
def photo_of(name):
    return photos.load_photo(name)


@pytest.fixture(scope="module")
def tiles(embedded_data):
    """All stored tiles: split -> list of (photo, top, left, pixels)."""
    stored = {}
    for split in ("train", "test"):
        dataset = datasets.open_dataset("photos", split, data_dir=embedded_data)
        stored[split] = []
        for index in range(len(dataset)):
            name = dataset.describe(index).split("(")[1].rstrip(")")
            photo, top, left = name.rsplit("_", 2)
            example = dataset[index]
            assert list(photos.PHOTOS)[example.label] == photo
            stored[split].append((photo, int(top), int(left), transforms.decode(example.image)))
    return stored


def test_tiles_hold_the_pixels_of_their_photo_at_the_position_in_their_name(tiles):
    for split, entries in tiles.items():
        side = photos.TILE[split]
        for photo, top, left, pixels in entries:
            wanted = photo_of(photo)[top : top + side, left : left + side]
            assert pixels.shape == (side, side, 3)
            np.testing.assert_array_equal(pixels, wanted)


def test_no_pixel_is_in_both_splits(tiles):
    for name in photos.PHOTOS:
        height, width, _ = photo_of(name).shape
        covered = {}
        for split, entries in tiles.items():
            mask = covered[split] = np.zeros((height, width), bool)
            for photo, top, left, pixels in entries:
                if photo == name:
                    mask[top : top + pixels.shape[0], left : left + pixels.shape[1]] = True
        assert not (covered["train"] & covered["test"]).any()
        columns = np.flatnonzero(covered["train"].any(axis=0))
        assert columns.max() + 1 == round(0.7 * width)
        assert covered["train"][:, columns].all()  # every training pixel is in some tile


def test_there_are_enough_tiles_and_no_photo_dominates(tiles):
    counts = collections.Counter(entry[0] for entry in tiles["train"])
    assert sum(counts.values()) >= 1000
    assert set(counts) == set(photos.PHOTOS)
    assert max(counts.values()) <= 1.2 * min(counts.values())
    positions = [entry[:3] for split in tiles.values() for entry in split]
    assert len(set(positions)) == len(positions)


def test_tiles_overlap_as_documented():
    shares = {}
    for name in photos.PHOTOS:
        boxes = photos.tile_boxes(*photo_of(name).shape[:2])["train"]
        strides = [np.diff(sorted({box[axis] for box in boxes})).max() for axis in (0, 1)]
        shares[name] = 1 - max(strides) / photos.TILE["train"]
    assert shares.pop("retina") == pytest.approx(0.26, abs=0.005)
    assert shares.pop("hubble_deep_field") == pytest.approx(0.55, abs=0.005)
    assert min(shares.values()) >= 0.73 and max(shares.values()) < 0.9


def test_grey_photos_become_rgb():
    brick = photos.load_photo("brick")
    assert brick.shape == (512, 512, 3)
    np.testing.assert_array_equal(brick[..., 0], brick[..., 2])


def test_every_digit_is_stored_once_and_splits_are_stratified(embedded_data):
    stored, counts = [], {}
    for split in ("train", "test"):
        dataset = datasets.open_dataset("digits", split, data_dir=embedded_data)
        assert dataset.num_classes == 10
        examples = [dataset[index] for index in range(len(dataset))]
        counts[split] = np.bincount([example.label for example in examples])
        for image, label in examples:
            pixels = transforms.decode(image)
            assert pixels.shape == (8, 8, 3)
            stored.append((label, pixels[..., 1].tobytes()))
    grey, target = sklearn_datasets.load_digits(return_X_y=True)
    scaled = np.round(grey / 16 * 255).astype(np.uint8)
    wanted = [(int(label), image.tobytes()) for image, label in zip(scaled, target, strict=True)]
    assert sorted(stored) == sorted(wanted)
    share = counts["test"] / (counts["train"] + counts["test"])
    assert np.all(np.abs(share - 0.2) < 0.005)


@pytest.fixture(scope="module")
def fashion_mnist(tmp_path_factory):
    """A data_dir with Debian's Fashion-MNIST; the package may only be missing outside CI."""
    if not fashion_mnist_builder.FOLDER.exists() and not os.environ.get("CI"):
        pytest.skip("needs the data of apt-get install dataset-fashion-mnist")
    folder = str(tmp_path_factory.mktemp("fashion_mnist"))
    line = prepare.prepare("fashion_mnist_debian", data_dir=folder)
    assert "60000 train" in line and "10000 test" in line
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("test", "t10k")])
def test_fashion_mnist_equals_the_files_of_the_package(fashion_mnist, split, file):
    """The expected values skip the headers of the files: 16 bytes for pixels, 8 for labels."""
    folder = fashion_mnist_builder.FOLDER
    with gzip.open(folder / f"{file}-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read()[16:], np.uint8).reshape(-1, 28, 28)
    with gzip.open(folder / f"{file}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read()[8:], np.uint8)
    dataset = datasets.open_dataset("fashion_mnist_debian", split, data_dir=fashion_mnist)
    assert len(dataset) == len(pixels) and dataset.num_classes == 10
    seen = []
    for index in range(0, len(dataset), len(dataset) // 100):
        image = transforms.decode(dataset[index].image)
        assert image.shape == (28, 28, 3) and (image == image[..., :1]).all()
        (position,) = np.flatnonzero((pixels == image[..., 0]).all(axis=(1, 2)))
        assert dataset[index].label == labels[position]
        seen.append(position)
    assert len(set(seen)) == len(seen)


def test_the_error_for_missing_fashion_mnist_files_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(fashion_mnist_builder, "FOLDER", tmp_path / "nowhere")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        prepare.prepare("fashion_mnist_debian", data_dir=str(tmp_path / "data"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe"], ids=str)
def test_a_damaged_description_of_prepared_data_is_one_message(embedded_data, tmp_path, content):
    for path in pathlib.Path(embedded_data, "digits").rglob("*.json"):
        copy = tmp_path / path.relative_to(embedded_data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    description = next(tmp_path.rglob("dataset_info.json"))
    description.write_bytes(content)
    message = f"TFDS cannot read {description} .*move its folder away and run\n.*--name=digits"
    with pytest.raises(DataError, match=message):
        datasets.open_dataset("digits", "train", data_dir=str(tmp_path))
