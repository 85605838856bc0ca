"""The dataset `digit_scenes`, prepared by TFDS as users prepare it."""

import collections

import numpy as np
from PIL import Image
import pytest
from scipy import ndimage
from sklearn import datasets as sklearn_datasets

from fd_jax.data import prepare
from fd_jax.data.builders import digit_scenes, digits, photos
from tests.data.segmentation.scenes import feed


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("digit_scenes"))
    line = prepare.prepare("digit_scenes", data_dir=folder)
    assert "600 train" in line and "120 test" in line
    return folder


@pytest.fixture(scope="module")
def data(data_dir):
    return feed(
        name="digit_scenes",
        data_dir=data_dir,
        split="train",
        eval_split="test",
        classes=11,
        reduce_zero_label=False,
    )


@pytest.fixture(scope="module")
def pictures(data):
    return {split: list(data.pictures(split)) for split in ("train", "eval")}


def test_the_dataset_says_what_its_classes_are(data):
    assert data.classes == 11 and data.class_names == digit_scenes.CLASS_NAMES
    assert data.class_names[:2] == ("background", "digit 0") and len(data.class_names) == 11


def test_pictures_are_of_varying_size_and_every_class_is_in_many(pictures):
    for split, enough in (("train", 100), ("eval", 20)):
        sizes = {picture.mask.shape for picture in pictures[split]}
        assert len(sizes) > len(pictures[split]) / 2
        assert any(h > w for h, w in sizes) and any(h < w for h, w in sizes)
        assert min(map(min, sizes)) >= 128 and max(map(max, sizes)) <= 192
        held = collections.Counter(c for p in pictures[split] for c in np.unique(p.mask).tolist())
        assert set(held) == {*range(11), 255}
        assert min(held.values()) >= enough and held[0] == len(pictures[split])
        assert held[255] == len(pictures[split])  # no picture is without a digit


def test_each_card_has_a_border_of_two_ignored_pixels(pictures):
    """Dilation by SciPy: what is within two pixels of a card is of that card or ignored."""
    for picture in pictures["eval"]:
        inside = (picture.mask > 0) & (picture.mask != 255)
        near = ndimage.binary_dilation(inside, np.ones((5, 5)))
        np.testing.assert_array_equal(picture.mask == 255, near & ~inside)


def cards(picture):
    """(class, pixels as float [h, w]) of every card, 0 for black and 1 for white."""
    for label in range(1, 11):
        parts, _ = ndimage.label(picture.mask == label)
        for box in ndimage.find_objects(parts):
            yield label, picture.image[box].mean(axis=-1) / 255


def test_a_card_shows_the_digit_that_its_label_names(pictures):
    """Shrunk to 10 x 10 pixels, ink on a card is nearest to a digit of that class."""
    grey, target = sklearn_datasets.load_digits(return_X_y=True)
    shapes = np.pad(grey.reshape(-1, 8, 8) / 16, ((0, 0), (1, 1), (1, 1)))
    right = []
    for picture in pictures["eval"][:25]:
        for label, card in cards(picture):
            assert card.shape[0] == card.shape[1] >= 32
            assert card.max() - card.min() > 0.3  # dark ink on light paper
            small = np.asarray(Image.fromarray(card.astype(np.float32)).resize((10, 10)))
            ink = (small.max() - small) / np.ptp(small)
            right.append(target[np.abs(shapes - ink).sum((1, 2)).argmin()] == label - 1)
    assert len(right) > 50 and np.mean(right) > 0.9  # a tenth by chance


def test_about_two_thirds_of_the_pixels_are_background(pictures):
    for split in ("train", "eval"):
        shares = [np.mean(p.mask[p.mask != 255] == 0) for p in pictures[split]]
        assert 0.55 < np.mean(shares) < 0.7


def test_the_background_is_a_part_of_a_photo_of_its_split(pictures):
    """Rows of background are looked for in the photos; the columns of the splits are disjoint."""
    for split, columns in (("train", (0.0, 0.7)), ("eval", (0.7, 1.0))):
        found = 0
        for picture in pictures[split][:8]:
            free = np.flatnonzero((picture.mask[:, :16] == 0).all(axis=1))
            strip = picture.image[free[0], :16]
            found += any(holds(photo, strip, columns) for photo in map(load, photos.PHOTOS))
        assert found == 8


def load(name):
    return photos.load_photo(name)


def holds(photo, strip, columns):
    """Whether a row of pixels is in the given share of the columns of a photo."""
    low, high = (round(share * photo.shape[1]) for share in columns)
    starts = np.argwhere((photo[:, low : high - len(strip) + 1] == strip[0]).all(axis=-1))
    return any((photo[y, low + x : low + x + len(strip)] == strip).all() for y, x in starts)


def test_the_splits_share_no_digit():
    keys = {split: {key for key, _, _ in digits.read_digits(split)} for split in ("train", "test")}
    assert not keys["train"] & keys["test"] and len(keys["train"] | keys["test"]) == 1797


def test_a_scene_depends_on_its_number_alone(pictures):
    """The tenth training picture, drawn again by itself, is among the stored ones."""
    chosen = [(ink, label) for _, ink, label in digits.read_digits("train")]
    for key in (0, 9, 300):
        photo = digit_scenes.photo_part(list(photos.PHOTOS)[key % 13], "train")
        drawn, mask = digit_scenes.draw_scene(np.random.default_rng((0, key)), photo, chosen)
        same = [p for p in pictures["train"] if np.array_equal(p.image, drawn)]
        assert len(same) == 1
        np.testing.assert_array_equal(same[0].mask, mask)


def test_the_loader_makes_batches_of_it(data):
    loader = data.train(batch_size=8, seed=0, rows=np.arange(8), start_step=70)
    batch = next(loader)
    loader.close()
    assert batch["image"].shape == (8, 48, 48, 3) and batch["mask"].shape == (8, 48, 48)
    assert set(np.unique(batch["mask"]).tolist()) <= {*range(11), 255}
