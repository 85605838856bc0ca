"""Masks as they are stored, and the classes that their values stand for."""

import io

import numpy as np
from PIL import Image
import pytest

from fd_jax.data.datasets import BrokenImageError
from fd_jax.data.segmentation import Labels, Scene
from fd_jax.data.segmentation.labels import decode_mask
from fd_jax.errors import ConfigError, DataError
from tests.data.segmentation.scenes import blocks, encode, palette_png

VALUES = np.arange(256, dtype=np.uint8).reshape(16, 16)


def classes(labels, *values):
    return labels.classes_of(np.array([values], np.uint8), "one.png")[0].tolist()


def test_ade20k_loses_its_zero_and_moves_down_by_one():
    labels = Labels(150, ignore=255, reduce_zero=True)
    assert classes(labels, 0, 1, 2, 150, 255) == [255, 0, 1, 149, 255]
    for value in (151, 254):
        with pytest.raises(DataError, match=rf"one.png: the mask holds {value}, .* 1 to 150, or 0"):
            classes(labels, 1, value)


def test_other_masks_stay_as_they_are():
    voc = Labels(21, ignore=255, reduce_zero=False)
    assert classes(voc, 0, 20, 255) == [0, 20, 255]
    with pytest.raises(DataError, match=r"holds 21, 30, .* 0 to 20, or 255 for pixels"):
        classes(voc, 0, 30, 21)


def test_another_stored_value_can_be_ignored():
    assert classes(Labels(3, ignore=7, reduce_zero=False), 0, 2, 7) == [0, 2, 255]
    assert classes(Labels(3, ignore=0, reduce_zero=False), 0, 1, 2) == [255, 1, 2]
    with pytest.raises(DataError, match="holds 255"):
        classes(Labels(3, ignore=7, reduce_zero=False), 255)


def test_all_values_follow_the_rule():
    for number, ignore, reduce_zero in ((150, 255, True), (255, 255, False), (19, 254, False)):
        labels = Labels(number, ignore, reduce_zero)
        for value in range(256):
            if value == ignore or (reduce_zero and value == 0):
                assert classes(labels, value) == [255]
            elif value - reduce_zero < number:
                assert classes(labels, value) == [value - reduce_zero]
            else:
                with pytest.raises(DataError):
                    classes(labels, value)


@pytest.mark.parametrize("number", [0, 256, 3688])
def test_more_classes_than_a_byte_holds_are_refused(number):
    with pytest.raises(ConfigError, match=f"segment.classes={number}: expected 1 to 255"):
        Labels(number, 255, True)


def test_palettes_are_indices_and_not_colours():
    mask = blocks(0, 40, 50, (0, 7, 20, 255))
    data = palette_png(mask)
    np.testing.assert_array_equal(decode_mask(data, "voc.png"), mask)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P"
        assert not np.array_equal(np.asarray(image.convert("L")), mask)  # what colours would give


def test_grey_masks_and_arrays_are_returned_as_they_are():
    for stored in (encode(VALUES), VALUES, VALUES[..., None]):
        np.testing.assert_array_equal(decode_mask(stored, "one.png"), VALUES)


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        (encode(np.repeat(VALUES[..., None], 3, axis=-1)), "RGB"),
        (encode(VALUES, mode="LA"), "LA"),
        (encode(VALUES.astype(np.uint16)), "I;16"),
        (encode(VALUES, mode="1"), "1"),
        (VALUES.astype(np.int32), r"int32 \[16, 16\]"),
        (np.repeat(VALUES[..., None], 3, axis=-1), r"uint8 \[16, 16, 3\]"),
    ],
    ids=["RGB", "LA", "16 bits", "1 bit", "int32", "three channels"],
)
def test_masks_that_are_not_one_byte_per_pixel_are_refused(stored, found):
    with pytest.raises(DataError, match=f"one.png: the mask is stored as {found}; expected one ch"):
        decode_mask(stored, "one.png")


@pytest.mark.parametrize("data", [b"", b"no mask", encode(VALUES)[:-30]])
def test_a_mask_that_cannot_be_decoded_is_broken(data):
    with pytest.raises(BrokenImageError, match="cannot decode the mask"):
        decode_mask(data, "one.png")


def test_a_mask_of_another_size_than_its_picture_is_refused():
    scene = Scene(encode(np.zeros((40, 60, 3), np.uint8)), encode(VALUES), "one", "masks/one.png")
    with pytest.raises(DataError, match="masks/one.png: the mask has 16 x 16 .* one has 40 x 60"):
        Labels(255, 255, False).read(scene)
    turned = scene._replace(mask=encode(np.zeros((60, 40), np.uint8)))
    with pytest.raises(DataError, match="60 x 40"):
        Labels(255, 255, False).read(turned)
