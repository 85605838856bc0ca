"""Each operation against its rule in numpy, or against the documented function of Pillow.

The rules are those of docs/reference.md#rand-augment.
"""

import collections
import math

import numpy as np
from PIL import Image, ImageOps
import pytest

from fd_jax.data import randaugment
from fd_jax.data.randaugment import OPERATIONS, RandAugment
from fd_jax.errors import ConfigError

LEVELS = (0.0, 3.0, 9.0, 10.0)


def picture(height=23, width=31, seed=0):
    """Smooth colours with noise on top, so that every operation changes some pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], -1)
    return np.clip(base * 0.8 + 20 + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


def grey(pixels):
    r, g, b = (pixels[..., c].astype(int) for c in range(3))
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


def blend(base, pixels, factor):
    base, pixels = base.astype(np.float32), pixels.astype(np.float32)
    mixed = base + np.float32(factor) * (pixels - base)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def smoothed(pixels):
    out = pixels.astype(np.float64)
    inner = sum(
        (5 if (i, j) == (1, 1) else 1)
        * pixels[i : i + pixels.shape[0] - 2, j : j + pixels.shape[1] - 2].astype(float)
        for i in range(3)
        for j in range(3)
    )
    out[1:-1, 1:-1] = np.floor(inner / 13 + 0.5)
    return out.astype(np.uint8)


def sampled(pixels, source):
    """Samples each output pixel (x, y) at source(x, y), bicubic (a = -0.5), filled outside."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    corners = source(0.0, 0.0), source(1.0, 0.0), source(0.0, 1.0)
    (c, f), (x1, y1), (x2, y2) = corners
    matrix = (x1 - c, x2 - c, c, y1 - f, y2 - f, f)
    return np.asarray(
        image.transform(
            (width, height),
            Image.Transform.AFFINE,
            matrix,
            Image.Resampling.BICUBIC,
            fillcolor=(124, 116, 104),
        )
    )


def rotated(pixels, degrees):
    return np.asarray(
        Image.fromarray(pixels).rotate(
            degrees, Image.Resampling.BICUBIC, expand=False, fillcolor=(124, 116, 104)
        )
    )


def reference(name, pixels, level, sign):
    """The operation as defined in the table of docs/reference.md#rand-augment, L = level / 10."""
    L = level / 10  # noqa: N806
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    factor = 1 + sign * 0.9 * L
    if name == "AutoContrast":
        return np.asarray(ImageOps.autocontrast(image))
    if name == "Equalize":
        return np.asarray(ImageOps.equalize(image))
    if name == "Invert":
        return 255 - pixels
    if name == "Rotate":
        return rotated(pixels, sign * 30 * L)
    if name == "PosterizeIncreasing":
        bits = 4 - int(4 * L)
        return (pixels >> (8 - bits) << (8 - bits)).astype(np.uint8) if bits else 0 * pixels
    if name == "SolarizeIncreasing":
        return np.where(pixels >= 256 - int(256 * L), 255 - pixels, pixels)
    if name == "SolarizeAdd":
        added = np.minimum(255, pixels.astype(int) + int(110 * L))
        return np.where(pixels < 128, added, pixels).astype(np.uint8)
    if name == "ColorIncreasing":
        return blend(np.repeat(grey(pixels)[..., None], 3, -1), pixels, factor)
    if name == "ContrastIncreasing":
        return blend(np.full_like(pixels, int(grey(pixels).mean() + 0.5)), pixels, factor)
    if name == "BrightnessIncreasing":
        return blend(np.zeros_like(pixels), pixels, factor)
    if name == "SharpnessIncreasing":
        return blend(smoothed(pixels), pixels, factor)
    k = sign * 0.3 * L
    if name == "ShearX":
        return sampled(pixels, lambda x, y: (x + k * y, y))
    if name == "ShearY":
        return sampled(pixels, lambda x, y: (x, y + k * x))
    if name == "TranslateXRel":
        return sampled(pixels, lambda x, y: (x + sign * 0.45 * L * width, y))
    assert name == "TranslateYRel"
    return sampled(pixels, lambda x, y: (x, y + sign * 0.45 * L * height))


class Draws:
    """A generator without randomness: always the mean level, and a fixed sign."""

    def __init__(self, sign):
        self.sign = sign

    def normal(self, mean, spread):
        del spread
        return mean

    def random(self):
        return 0.1 if self.sign < 0 else 0.9


def applied(name, pixels, level, sign):
    image = RandAugment(magnitude=level).apply(
        Image.fromarray(pixels), OPERATIONS[name], Draws(sign)
    )
    return np.asarray(image)


def test_there_are_fifteen_randaugment_operations():
    assert len(OPERATIONS) == 15


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_each_randaugment_operation_follows_its_rule(name, level, sign):
    pixels = picture()
    sign = sign if OPERATIONS[name].signed else 1
    got = applied(name, pixels, level, sign)
    np.testing.assert_array_equal(got, reference(name, pixels, level, sign))


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_randaugment_operation_changes_the_image_and_depends_on_its_amount(name):
    """Negative control: the rule at another level gives other pixels."""
    pixels = picture()
    got = applied(name, pixels, 9.0, 1)
    assert np.any(got != pixels)
    if OPERATIONS[name].scale:
        assert np.any(got != reference(name, pixels, 7.0, 1))
    if OPERATIONS[name].signed:
        assert np.any(got != reference(name, pixels, 9.0, -1))


def test_posterize_at_the_maximum_level_is_black():
    assert not applied("PosterizeIncreasing", picture(), 10.0, 1).any()


class Counting(RandAugment):
    """Counts how often each operation is applied."""

    def __init__(self, **fields):
        super().__init__(**fields)
        object.__setattr__(self, "seen", collections.Counter())

    def apply(self, image, operation, rng):
        self.seen[next(k for k, v in OPERATIONS.items() if v is operation)] += 1
        return super().apply(image, operation, rng)


def test_one_operation_is_applied_on_average_and_all_occur():
    """Two operations are drawn with replacement, and each is applied with probability one half."""
    augment = Counting(magnitude=9.0, spread=0.5)
    rng = np.random.default_rng(0)
    for _ in range(1500):
        augment(picture(8, 8), rng)
    counts = augment.seen
    assert set(counts) == set(OPERATIONS)
    assert abs(sum(counts.values()) / 1500 - 1.0) < 0.06
    assert max(counts.values()) / min(counts.values()) < 1.7


def test_levels_are_normally_distributed_and_clipped():
    rng = np.random.default_rng(0)
    levels = []
    probe = randaugment.Operation(lambda image, amount: levels.append(amount) or image, 10.0)
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1")
    image = Image.fromarray(picture(4, 4))
    for _ in range(4000):
        augment.apply(image, probe, rng)
    levels = np.array(levels)
    assert levels.max() == 10.0
    clipped = np.mean(levels == 10.0)  # P(z > 2) = 2.275 %
    assert abs(clipped - 0.02275) < 0.008
    assert abs(levels.mean() - 9.0) < 0.03
    assert abs(levels.std() - 0.5) < 0.03


def test_generators_with_the_same_seed_give_the_same_image():
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1")
    pixels = picture()
    one, two, three = (augment(pixels, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, two)
    assert one.dtype == np.uint8
    assert np.any([np.any(augment(pixels, np.random.default_rng(s)) != one) for s in range(9)])
    assert three.shape == pixels.shape


def test_policies_in_timms_notation_are_parsed():
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, 2, 0.5)
    assert RandAugment.parse("rand-n3-m7-p0.8-inc1") == RandAugment(7.0, 0.0, 3, 0.8)


@pytest.mark.parametrize(
    "policy,message",
    [
        ("auto-m9", "expected something like"),
        ("rand-m9-q3-inc1", "part 'q3' is unknown"),
        ("rand-mx-inc1", "part 'mx' is unknown"),
        ("rand-m9", "add inc1"),
        ("rand-m9-inc0", "add inc1"),  # docs/reference.md#quirk-color-jitter: "0" is not a yes
        ("rand-m11-inc1", "magnitudes go from 0 to 10"),
        ("rand-m9-p2-inc1", "probabilities from 0 to 1"),
    ],
)
def test_invalid_randaugment_policies_are_refused(policy, message):
    with pytest.raises(ConfigError, match=message):
        RandAugment.parse(policy)


def test_rotate_turns_the_image_about_its_centre():
    """A bright point at the centre stays in place, and a corner is uncovered and filled."""
    pixels = np.zeros((33, 33, 3), np.uint8)
    pixels[15:18, 15:18] = 255
    out = applied("Rotate", pixels, 10.0, 1)
    assert out[16, 16].min() > 200
    np.testing.assert_array_equal(out[0, 0], randaugment.FILL)
    assert math.isclose(OPERATIONS["Rotate"].scale, 30.0)
