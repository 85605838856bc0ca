"""The evaluation transform in numpy against that of the data, which is Pillow's."""

import numpy as np
from PIL import Image
import pytest
from skimage import data

from fd_jax.data.transforms import EvalTransform
from fd_jax.models import cropping

SHAPES = [(300, 451), (451, 300), (64, 64), (20, 31), (97, 500)]


def picture(height, width):
    return np.asarray(Image.fromarray(data.astronaut()).resize((width, height)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [64, (48, 80)])
def test_it_equals_pillow_within_one_grey_level(shape, size):
    pixels = picture(*shape)
    got = cropping.for_evaluation(pixels, size)
    want = EvalTransform(size)(pixels)
    assert got.dtype == np.uint8 and got.shape == want.shape
    difference = np.abs(got.astype(int) - want)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


def test_another_filter_or_another_crop_would_be_noticed():
    pixels = picture(300, 451)
    want = EvalTransform(64)(pixels).astype(int)
    bilinear = np.asarray(Image.fromarray(pixels).resize((109, 73), Image.Resampling.BILINEAR))
    assert np.abs(cropping.centre(bilinear, (64, 64)) - want).max() > 10
    assert np.abs(EvalTransform(64, ratio=1.0)(pixels) - want).max() > 10
